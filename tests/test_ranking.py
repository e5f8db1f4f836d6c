from __future__ import annotations

import math
from dataclasses import replace

import pytest

from orchestrator.errors import SpecError
from orchestrator.ranking import WORST, Goal, Measured, check_alike
from tests.specs import CLASSIFY, PRETRAIN, spec

CAUSAL = Measured(task="causal-lm", held_out="aaaa", tokenizer="tttttttt")
MASKED = replace(CAUSAL, task="masked-lm", masking_rate=0.15)


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


def test_each_task_has_its_measure_and_a_search_may_name_another() -> None:
    assert spec(PRETRAIN).goal == Goal(metric="eval/bits_per_byte", higher_is_better=False)
    assert spec(PRETRAIN, task="masked-lm", model__config="bert", model__overrides={}).goal.metric == "eval/loss"
    assert spec(CLASSIFY).goal == Goal(metric="eval/accuracy", higher_is_better=True)
    search = {"space": {"training.seed": {"grid": [1]}}, "scheduler": "none", "metric": "eval/loss"}
    assert spec(CLASSIFY, search=search).goal == Goal(metric="eval/loss", higher_is_better=False)
    assert spec(CLASSIFY, search={**search, "mode": "max"}).goal == Goal(metric="eval/loss", higher_is_better=True)


def test_of_two_vocabularies_the_better_in_bits_per_byte_wins_not_the_one_with_fewer_nats_a_token() -> None:
    """`search.space.model.vocab_size: {grid: [260, 3000]}`: short tokens are easy to predict, and there are more."""
    nats = {"260": 1.9, "3000": 4.0}
    tokens_per_byte = {"260": 1.0, "3000": 0.4}
    bits = [nats[size] * tokens_per_byte[size] / math.log(2) for size in nats]
    goal = spec(PRETRAIN).goal
    check_alike({"00": CAUSAL, "01": replace(CAUSAL, tokenizer="uuuuuuuu")}, goal.metric)
    assert Goal.of("eval/loss").best_of(list(nats.values())) == 0
    assert goal.best_of(bits) == 1


@pytest.mark.parametrize("metric", ["eval/loss", "eval/perplexity", "train/loss"])
def test_means_over_the_tokens_of_two_tokenizers_are_not_ranked(metric: str) -> None:
    trials = {"00": CAUSAL, "01": CAUSAL, "02": replace(CAUSAL, tokenizer="uuuuuuuu")}
    with pytest.raises(SpecError, match=rf"have {metric} in different units[\s\S]*00: .*tttttt; 02: .*uuuuuu") as error:
        check_alike(trials, metric)
    assert "search.metric=eval/bits_per_byte" in str(error.value)
    check_alike(trials, "eval/bits_per_byte")
    with pytest.raises(SpecError, match=r"in different units[\s\S]*runs of their own"):
        check_alike({"00": MASKED, "01": replace(MASKED, tokenizer="uuuuuuuu")}, "eval/loss")
    with pytest.raises(SpecError, match=r"15% hidden; 01: .*40% hidden"):
        check_alike({"00": MASKED, "01": replace(MASKED, masking_rate=0.4)}, "eval/loss")


def test_trials_on_other_held_out_data_or_of_another_task_are_not_ranked() -> None:
    with pytest.raises(SpecError, match=r"same held-out data[\s\S]*00: aaaa; 01: bbbb[\s\S]*data.validation"):
        check_alike({"00": CAUSAL, "01": replace(CAUSAL, held_out="bbbb")}, "eval/bits_per_byte")
    with pytest.raises(SpecError, match="same task"):
        check_alike({"00": CAUSAL, "01": MASKED}, "eval/loss")


def test_classification_is_measured_alike_with_any_tokenizer() -> None:
    rows = Measured(task="text-classification", held_out="aaaa", tokenizer="tttttttt")
    for metric in ("eval/accuracy", "eval/loss"):
        check_alike({"00": rows, "01": replace(rows, tokenizer="uuuuuuuu")}, metric)
