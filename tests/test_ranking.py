from __future__ import annotations

import math

from orchestrator.ranking import WORST, Goal


def test_accuracy_is_good_when_high_and_everything_else_when_low_unless_a_user_says_otherwise() -> None:
    assert Goal.of("eval/accuracy").higher_is_better
    assert not Goal.of("eval/loss").higher_is_better
    assert not Goal.of("eval/bits_per_byte", "auto").higher_is_better
    assert Goal.of("train/tokens_per_second", "max").higher_is_better
    assert not Goal.of("eval/accuracy", "min").higher_is_better


def test_what_is_no_number_or_infinite_or_absent_is_worst_either_way() -> None:
    for goal in (Goal.of("eval/accuracy"), Goal.of("eval/loss")):
        for value in (math.nan, math.inf, -math.inf, None):
            assert goal.goodness(value) == WORST
            assert goal.best_of([value, 1e300, value]) == 1


def test_the_best_is_the_largest_accuracy_or_the_smallest_loss_and_of_equals_the_first() -> None:
    assert Goal.of("eval/accuracy").best_of([0.5, 0.9, 0.9]) == 1
    assert Goal.of("eval/loss").best_of([0.5, 0.4, 0.9, 0.4]) == 1
