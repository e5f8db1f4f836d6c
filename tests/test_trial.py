from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from orchestrator.quantities import Budget
from orchestrator.scheduling.trial import Ending, ending_of, forget_failure, left_undone
from orchestrator.training.job import Outcome

pytestmark = pytest.mark.slow  # the module imports Ray

BUDGET = Budget(amount=5, unit="usd")


def finished(steps: int = 8) -> Ending:
    outcome = Outcome(
        status="finished",
        step=steps,
        steps=8,
        metrics={"eval/loss": 1.0},
        checkpoint=None,
        model_path="m",
        notes=("n",),
    )
    return Ending(status="finished", step=steps, outcome=outcome)


def stopped(step: int) -> Ending:
    outcome = dataclasses.replace(finished(step).outcome, status="stopped_by_budget")  # type: ignore[type-var]
    return Ending(status="stopped_by_budget", step=step, outcome=outcome)


def test_an_ending_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert ending_of(tmp_path) is None
    for ending in (stopped(3), Ending(status="pruned", step=2), Ending(status="failed", step=0, error="why")):
        ending.write(tmp_path)
        assert ending_of(tmp_path) == ending


def test_only_a_failed_trial_is_tried_again_in_any_case(tmp_path: Path) -> None:
    for ending, kept in ((stopped(3), True), (finished(), True), (Ending(status="failed", step=1, error="x"), False)):
        ending.write(tmp_path)
        forget_failure(tmp_path)
        assert (ending_of(tmp_path) is not None) == kept


def test_a_search_whose_trials_all_ended_leaves_nothing_undone() -> None:
    endings = {
        "00": finished(),
        "01": Ending(status="pruned", step=2),
        "02": Ending(status="failed", step=0, error="x"),
    }
    assert left_undone(BUDGET, endings) is None


def test_what_a_budget_stopped_and_what_it_did_not_let_begin_is_named() -> None:
    assert left_undone(BUDGET, {"00": finished(), "01-lora": stopped(3), "02": None}) == (
        "budget 5usd is spent: 1 of 3 trials stopped before their end (01-lora at step 3 of 8), "
        "1 of 3 trials not started (02)"
    )


def test_of_many_trials_the_first_are_named() -> None:
    note = left_undone(BUDGET, {f"{number:02d}": None for number in range(20)})
    assert note is not None
    assert "20 of 20 trials not started (00, 01, 02, 03, 04, 05, 06, 07, ...)" in note


def test_without_a_budget_nothing_is_undone_for_its_sake() -> None:
    assert left_undone(None, {"00": finished(), "01": None}) is None
