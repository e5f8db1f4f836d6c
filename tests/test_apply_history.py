from __future__ import annotations

import math

import pytest

from orchestrator.policy.advise import advise
from orchestrator.policy.apply_history import learn
from orchestrator.policy.candidates import candidates
from orchestrator.policy.corrections import RunRecord, corrections
from orchestrator.policy.question import Question
from tests.questions import MINILM, labelled


def record(number: int, *, pace: float, accuracy: float, data: str = "reviews.csv") -> RunRecord:
    """A full fine-tuning of MiniLM on an A100 at `pace` times the predicted throughput."""
    return RunRecord(
        run_id=f"run-{number}",
        name="past",
        kind="finetune",
        method="full",
        task="text-classification",
        device_name="A100-80GB",
        workers=1,
        precision="bf16",
        parameters=MINILM.parameters,
        trainable_parameters=MINILM.parameters,
        sequence_length=128,
        tokens_per_step=2048,
        flops_per_step=2.8e11,
        steps=500,
        measured_steps=490,
        predicted_tokens_per_second=1e5,
        measured_tokens_per_second=1e5 * pace,
        predicted_peak_gib=1.0,
        measured_peak_gib=1.2,
        predicted_gpu_hours=0.01,
        measured_gpu_hours=0.01 / pace,
        train_samples=2000,
        train_tokens=256_000,
        tokens_seen=1_024_000,
        data_source=data,
        eval_accuracy=accuracy,
    )


def learnt(count: int, *, pace: float = 0.5, accuracy: float = 0.95, data: str | None = "reviews.csv") -> Question:
    records = [record(number, pace=pace, accuracy=accuracy) for number in range(count)]
    return learn(labelled(2000, base=MINILM, gpu="A100"), corrections(records), data=data)


def full(question: Question) -> tuple[float, float]:
    """(device hours, expected accuracy) of full fine-tuning."""
    one = next(one for one in candidates(question) if one.strategy == "full")
    assert one.price is not None
    assert one.expectation is not None
    assert one.expectation.score is not None
    return one.price.gpu_hours.mid, one.expectation.score.mid


def test_slow_runs_lengthen_the_hours_and_the_answer_says_so() -> None:
    before, _ = full(labelled(2000, base=MINILM, gpu="A100"))
    question = learnt(8)
    after, _ = full(question)
    assert after == pytest.approx(2 * before, rel=0.25)
    said = " ".join(advise(question).changed_by_history)
    assert "8 runs on A100-80GB" in said
    assert "hours" in said


def test_runs_on_the_same_data_move_the_expected_accuracy_and_narrow_it() -> None:
    _, before = full(labelled(2000, base=MINILM, gpu="A100"))
    _, after = full(learnt(8, accuracy=0.95))
    assert abs(after - 0.95) < abs(before - 0.95) / 3
    one = next(one for one in candidates(learnt(8)) if one.strategy == "full")
    assert one.expectation is not None
    assert one.expectation.shared < 0.3


def test_what_is_learnt_is_common_to_all_strategies() -> None:
    def gap(question: Question) -> float:
        found = {one.strategy: one.expectation for one in candidates(question)}
        features, tuned = found["features"], found["full"]
        assert features is not None
        assert tuned is not None
        return features.badness - tuned.badness

    assert gap(learnt(8)) == pytest.approx(gap(labelled(2000, base=MINILM, gpu="A100")), abs=0.05)


def test_runs_on_other_data_say_nothing_about_accuracy() -> None:
    assert full(learnt(8, data="other.csv"))[1] == full(labelled(2000, base=MINILM, gpu="A100"))[1]


def test_an_empty_history_changes_nothing() -> None:
    question = learnt(0)
    assert full(question) == full(labelled(2000, base=MINILM, gpu="A100"))
    assert advise(question).changed_by_history == ()
    assert math.isfinite(full(question)[0])
