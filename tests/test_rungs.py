from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import StorageError
from orchestrator.ranking import WORST
from orchestrator.scheduling.search.rungs import RungDecision, Rungs, decide, rung_steps, rungs_of_trials


def steps(grace: int | None, *intervals: int, longest: int = 100, factor: int = 3) -> tuple[int, ...]:
    return rung_steps(grace=grace, intervals=intervals, reduction_factor=factor, longest=longest)


# Where the rungs are


def test_rungs_begin_at_the_first_evaluation_and_are_a_factor_apart() -> None:
    assert steps(None, 10) == (10, 30, 90)
    assert steps(20, 10) == (20, 60)
    assert steps(None, 5, longest=50, factor=2) == (5, 10, 20, 40)


def test_a_grace_below_the_evaluation_interval_adds_no_halving() -> None:
    for grace in range(1, 11):
        assert steps(grace, 10, longest=50) == (10, 30)


def test_a_grace_between_two_evaluations_is_the_second() -> None:
    assert steps(5, 2, longest=50) == (6, 16, 46)


def test_of_unequal_intervals_the_shortest_says_where_rungs_are() -> None:
    assert steps(None, 1000, 10, 7) == (7, 21, 63)


def test_nobody_is_stopped_at_the_end_of_the_longest_trial_or_without_evaluations() -> None:
    assert steps(None, 10, longest=30) == (10,)
    assert steps(None, 10, longest=10) == ()
    assert steps(None, 1000) == ()
    assert steps(None) == ()


def test_each_trial_has_the_rungs_within_its_length_and_one_without_evaluations_has_none() -> None:
    trials = [(None, 219), (42, 63), (42, 110), (1000, 400), (42, 42), (42, 41)]
    assert rungs_of_trials(trials, grace=None, reduction_factor=3) == [(), (42,), (42,), (42, 126, 378), (42,), ()]
    assert rungs_of_trials([(None, 100)], grace=10, reduction_factor=3) == [()]


def left_of(trials: int, *, grace: int, interval: int, longest: int, seed: int) -> int:
    """How many of so many trials that come to each rung together reach their end."""
    alive = list(range(trials))
    order = random.Random(seed)
    for _ in steps(grace, interval, longest=longest):
        order.shuffle(alive)
        earlier: list[float] = []
        kept = []
        for trial in alive:
            if decide(float(trial), earlier, reduction_factor=3).go_on:
                kept.append(trial)
            earlier.append(float(trial))
        alive = kept
    return len(alive)


@pytest.mark.parametrize("seed", range(5))
def test_with_a_small_grace_as_many_of_27_trials_are_left_as_with_none(seed: int) -> None:
    setting = {"interval": 10, "longest": 30, "seed": seed}
    assert left_of(27, grace=1, **setting) == left_of(27, grace=10, **setting) >= 27 / 4


# Who goes on


def test_the_first_at_a_rung_goes_on_whatever_it_has() -> None:
    assert decide(WORST, [], reduction_factor=3) == RungDecision(go_on=True, reason="it is the first here")


def test_the_best_third_goes_on_and_what_equals_it() -> None:
    earlier = [1.0, 2.0, 3.0, 4.0]  # two thirds of the way from the first to the last: 3
    assert decide(3.0, earlier, reduction_factor=3).go_on
    stopped = decide(2.99, earlier, reduction_factor=3)
    assert stopped == RungDecision(go_on=False, reason="below what the best 1 of 3 had here")


def test_between_two_values_the_cutoff_is_interpolated() -> None:
    assert decide(1.5, [1.0, 2.0], reduction_factor=2).go_on
    assert not decide(1.49, [1.0, 2.0], reduction_factor=2).go_on


def test_what_is_no_number_is_worse_than_any_number() -> None:
    assert not decide(WORST, [-1e300], reduction_factor=3).go_on
    assert decide(-1e300, [WORST, WORST, 5.0], reduction_factor=3).go_on, "second of four"
    assert decide(WORST, [WORST], reduction_factor=3).go_on, "nobody is better"
    assert not decide(1.0, [WORST, 2.0, 2.0, 2.0], reduction_factor=3).go_on


values = st.floats(allow_nan=False, allow_infinity=False, width=64) | st.just(WORST)


@given(earlier=st.lists(values, max_size=30), factor=st.integers(2, 9))
@settings(max_examples=300, deadline=None)
def test_a_trial_that_is_at_least_as_good_as_all_others_at_a_rung_goes_on(earlier: list[float], factor: int) -> None:
    assert decide(max(earlier, default=0.0), earlier, reduction_factor=factor).go_on


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_trial_that_is_better_at_every_step_is_never_stopped(data: st.DataObject) -> None:
    """Whatever the intervals, lengths, grace and order of coming."""
    count = data.draw(st.integers(2, 6))
    intervals = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    grace = data.draw(st.none() | st.integers(1, 30))
    factor = data.draw(st.integers(2, 4))
    rungs = steps(grace, *intervals, longest=max(lengths), factor=factor)
    earlier: dict[int, list[float]] = {step: [] for step in rungs}
    waiting = {trial: [step for step in rungs if step <= lengths[trial]] for trial in range(count)}
    while any(waiting.values()):
        trial = data.draw(st.sampled_from([trial for trial, left in waiting.items() if left]))
        step = waiting[trial].pop(0)
        goodness = 100.0 if trial == 0 else data.draw(st.floats(-99, 99) | st.just(WORST))
        goodness += step  # all get better
        if not decide(goodness, earlier[step], reduction_factor=factor).go_on:
            assert trial != 0
            waiting[trial] = []
        earlier[step].append(goodness)


# What is kept


def test_a_trial_that_replays_its_evaluations_is_not_judged_again(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path / "rungs.json", reduction_factor=3)
    judge = {"is_its_end": False}
    assert rungs.judge("00", 10, -5.0, **judge).go_on
    assert rungs.judge("01", 10, -1.0, **judge).go_on
    assert not rungs.judge("02", 10, -9.0, **judge).go_on
    again = Rungs(tmp_path / "rungs.json", reduction_factor=3)  # after a kill of the driver
    assert not again.judge("02", 10, -9.0, **judge).go_on
    assert again.judge("01", 10, -1.0, **judge).go_on
    assert again.judge("00", 10, -5.0, **judge).go_on, "as when it came first, though others are better"
    assert not again.judge("03", 10, -4.0, **judge).go_on, "it meets the three that were there, once each"


def test_a_trial_at_its_end_goes_on_and_counts_for_the_others(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path / "rungs.json", reduction_factor=3)
    assert rungs.judge("long", 10, 3.0, is_its_end=False).go_on
    assert rungs.judge("short", 10, 1.0, is_its_end=True).go_on
    assert not rungs.judge("other", 10, 2.0, is_its_end=False).go_on
    assert rungs.judge("short", 30, 1.0, is_its_end=True).go_on, "another rung, another comparison"


def test_a_value_that_is_no_number_is_kept_as_the_worst(tmp_path: Path) -> None:
    Rungs(tmp_path / "rungs.json", reduction_factor=3).judge("00", 10, -math.inf, is_its_end=False)
    assert "Infinity" not in (tmp_path / "rungs.json").read_text()
    again = Rungs(tmp_path / "rungs.json", reduction_factor=3)
    assert again.judge("01", 10, -1e9, is_its_end=False).go_on


def test_rungs_that_cannot_be_kept_are_an_error_that_says_where(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path / "gone" / "rungs.json", reduction_factor=3)
    with pytest.raises(StorageError, match=r"gone"):
        rungs.judge("00", 10, 1.0, is_its_end=False)
