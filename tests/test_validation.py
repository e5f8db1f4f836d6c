from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.runs.job import LoopState, TrainingJob
from orchestrator.samples.masking import Masking
from orchestrator.samples.metric_names import FORGETTING, RETAINED_LOSS
from orchestrator.worker.model_inputs import ModelInputs
from orchestrator.worker.objectives import Batch
from orchestrator.worker.validation import Validation, evaluated_samples
from tests import specs
from tests.training_runs import pretrain

EVERY = {"training__eval_every_steps": 2}


class FakeEngine:
    """Has the same loss for every token, and one weight."""

    def __init__(self, loss: float = 3.0, weight: float = 0.0) -> None:
        self.loss, self.weight, self.samples = loss, torch.tensor(weight), 0

    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.samples += len(batch["input_ids"])
        return torch.tensor([[self.loss, 0.0, 1.0]]).repeat(len(batch["input_ids"]), 1)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.weight.expand(batch["input_ids"].shape)

    def full_state(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight, "frozen": torch.tensor(7.0)}

    def trained_state(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}


class FakeRecovery:
    """Of an attempt that may write; notes what is removed instead of removing it."""

    def __init__(self) -> None:
        self.hidden: list[str] = []

    def holds(self) -> bool:
        return True

    def hide(self, part: str) -> None:
        self.hidden.append(part)


def validation_of(job: TrainingJob, recovery: Any = None) -> Any:
    masking, nothing = Masking(rate=0.15, seed=0), lambda *_: None
    return Validation(
        job,
        ModelInputs(job, masking=masking, device=torch.device("cpu"), say=nothing, before_batch=nothing),
        recovery or FakeRecovery(),
        masking=masking,
        rank=0,
        agree=lambda value: value,
        before_batch=nothing,
    )


def with_general_data(job: TrainingJob) -> TrainingJob:
    """Its own data is the general data too."""
    return replace(job, data=replace(job.data, retained=job.data))


def evaluate(validation: Any, step: int, loss: float, *, is_last: bool = False, **metrics: float) -> dict[str, float]:
    """The figures of an evaluation that is judged; the only weight of the model is the step's number."""
    engine = FakeEngine(loss, weight=float(step))
    figures: dict[str, float] = validation.evaluate(engine, step)
    validation.judge(engine, figures, metrics={**figures, **metrics}, is_last=is_last)
    return figures


@pytest.mark.parametrize("has_general", [False, True])
def test_an_evaluation_takes_as_many_samples_as_its_cost_is_foreseen_by(tmp_path: Path, has_general: bool) -> None:
    job = pretrain(tmp_path, training__micro_batch=1)
    job = with_general_data(job) if has_general else job
    engine = FakeEngine()
    validation_of(job).evaluate(engine, 1)
    assert engine.samples == evaluated_samples(job) > 0


def test_an_evaluation_is_due_once_after_every_so_many_steps_and_at_rungs(tmp_path: Path) -> None:
    validation = validation_of(replace(pretrain(tmp_path, **EVERY), rungs=(3,)))
    assert [step for step in range(6) if validation.is_due(step)] == [2, 3, 4]
    evaluate(validation, 3, loss=1.0)
    assert [step for step in range(6) if validation.is_due(step)] == [2, 4]
    assert validation.is_evaluated(3)


def test_forgetting_needs_the_loss_before_the_first_step_and_rises_from_there(tmp_path: Path) -> None:
    job = pretrain(tmp_path)
    assert not validation_of(job).needs_baseline
    assert validation_of(job).baseline(FakeEngine()) == {}
    validation = validation_of(with_general_data(job))
    assert validation.needs_baseline
    assert validation.baseline(FakeEngine(3.0)) == {RETAINED_LOSS: 3.0, FORGETTING: 0.0}
    assert not validation.needs_baseline
    figures = evaluate(validation, 2, loss=3.5)
    assert (figures["eval/loss"], figures[RETAINED_LOSS], figures[FORGETTING]) == (3.5, 3.5, 0.5)


def test_a_checkpoint_knows_what_a_resumed_run_must_know_of_the_evaluations_before(tmp_path: Path) -> None:
    job = with_general_data(pretrain(tmp_path, **EVERY, training__stop={"patience": 3}))
    validation = validation_of(job)
    validation.baseline(FakeEngine(5.0))
    for step, loss in ((2, 3.0), (4, 4.0)):
        evaluate(validation, step, loss=loss)
    state = validation.added_to(LoopState(step=4, tokens=7))
    assert (state.step, state.tokens, state.evaluated_step, state.best_step) == (4, 7, 4, 2)
    assert (state.waited, state.retained_before) == (1, 5.0)
    assert state.best_metrics["eval/loss"] == 3.0
    resumed = validation_of(job)
    resumed.take_up(state)
    assert resumed.added_to(LoopState(step=4, tokens=7)) == state
    resumed.take_up(LoopState())
    assert resumed.added_to(LoopState()) == LoopState(retained_before=5.0), "back at the start, on the same base"


def waits(job: TrainingJob, losses: Sequence[tuple[int, float]], **last: Any) -> int:
    validation = validation_of(job)
    for step, loss in losses:
        evaluate(validation, step, loss=loss, **(last if step == losses[-1][0] else {}))
    return validation.added_to(LoopState()).waited


def test_evaluations_every_so_many_steps_count_for_stopping_and_no_others(tmp_path: Path) -> None:
    job = replace(pretrain(tmp_path, **EVERY, training__stop={"patience": 2}), rungs=(3, 5))
    assert waits(job, [(2, 3.0), (4, 3.0)]) == 1
    assert waits(job, [(2, 3.0), (3, 3.0), (4, 3.0), (5, 3.0)]) == 1, "rungs do not count"
    assert waits(job, [(2, 3.0), (4, 3.0), (6, 3.0)], is_last=True) == 1, "nothing is left to stop"
    assert waits(job, [(2, 3.0), (0, 3.0)]) == 0, "before the first step nothing is better or worse"
    assert waits(pretrain(tmp_path, **EVERY), [(2, 3.0), (4, 3.0)]) == 0


def test_a_run_has_a_reason_to_stop_once_patience_is_used_up(tmp_path: Path) -> None:
    validation = validation_of(pretrain(tmp_path, **EVERY, training__stop={"patience": 2}))
    reasons = []
    for step in (2, 4, 6):
        evaluate(validation, step, loss=3.0)
        reasons.append(validation.stop_reason())
    assert reasons[:2] == [None, None]
    assert "in 2 evaluations (training.stop)" in reasons[2]


def test_stopping_goes_by_the_metric_that_a_search_ranks_by_also_one_of_the_training(tmp_path: Path) -> None:
    space = {"training.seed": {"grid": [1, 2]}}
    search = {"space": space, "metric": "train/loss"}
    job = pretrain(tmp_path, **EVERY, training__stop={"patience": 2})
    job = replace(job, spec=specs.spec(job.spec.model_dump(exclude_unset=True), search=search))
    validation = validation_of(job)
    for step, train_loss in ((2, 3.0), (4, 2.0), (6, 2.5)):
        evaluate(validation, step, loss=1.0, **{"train/loss": train_loss})
    state = validation.added_to(LoopState())
    assert (state.best, state.waited) == (2.0, 1)


def test_the_model_that_is_left_is_that_of_the_best_evaluation(tmp_path: Path) -> None:
    validation = validation_of(pretrain(tmp_path, **EVERY))
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5)):
        evaluate(validation, step, loss=loss, is_last=step == 6)
    assert (validation.best_before(6), validation.best_before(4)) == (4, None)
    assert validation.best_metrics["eval/loss"] == 2.0
    assert validation.best_in_words({"eval/bits_per_byte": 9.0}).startswith("the model is that of step 4, the best of")
    engine = FakeEngine(weight=6.0)
    state, trained = validation.final_model(engine, 6)
    assert state == {"weight": torch.tensor(4.0), "frozen": torch.tensor(7.0)}
    assert trained.logits.unique().tolist() == [4.0]
    assert trained.batch["input_ids"].shape == trained.logits.shape


def test_the_last_weights_are_left_where_they_are_the_best_or_a_number_of_checkpoints_is_kept(tmp_path: Path) -> None:
    for keep, losses in (("best", (3.0, 2.0)), (2, (2.0, 3.0))):
        validation = validation_of(pretrain(tmp_path, **EVERY, checkpoint__keep=keep))
        for step, loss in zip((2, 4), losses, strict=True):
            evaluate(validation, step, loss=loss)
        assert validation.best_before(4) is None
        state, trained = validation.final_model(FakeEngine(weight=4.0), 4)
        assert (state["weight"], trained.logits.unique().tolist()) == (4.0, [4.0])


def test_the_best_weights_that_the_newest_checkpoint_names_stay_beside_better_ones(tmp_path: Path) -> None:
    recovery = FakeRecovery()
    validation = validation_of(pretrain(tmp_path, **EVERY), recovery)
    evaluate(validation, 2, loss=4.0)
    validation.saved()
    evaluate(validation, 4, loss=3.0)
    assert recovery.hidden == []
    evaluate(validation, 6, loss=2.0)
    assert recovery.hidden == ["best/step-00000004.pt"]
    validation.saved()
    evaluate(validation, 8, loss=1.0)
    assert sorted(recovery.hidden[1:]) == ["best/step-00000002.pt", "best/step-00000004.pt"]
