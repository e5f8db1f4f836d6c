from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.quantities import Budget, BudgetUnit
from orchestrator.scheduling.launch import RunResult, finished_earlier, is_spent, keep_result
from orchestrator.tracking import store
from orchestrator.tracking.tracker import open_run
from tests.end_to_end.runs import listener
from tests.specs import PRETRAIN, spec

pytestmark = pytest.mark.slow  # the module imports Ray


def budget(amount: float, unit: BudgetUnit = "usd") -> Budget:
    return Budget(amount=amount, unit=unit)


@pytest.mark.parametrize(("now", "spent"), [(budget(5), True), (budget(4), True), (budget(5.1), False), (None, False)])
def test_a_budget_is_spent_until_it_grows_or_is_lifted(now: Budget | None, spent: bool) -> None:
    assert is_spent(now, budget(5)) == spent


def test_a_budget_of_another_unit_is_looked_at_anew() -> None:
    assert not is_spent(budget(1, "hours"), budget(5, "usd"))


def result(folder: Path, status: str) -> RunResult:
    return RunResult(
        status=status,
        mlflow_run_id=None,
        checkpoint="a",
        model_path="b",
        metrics={"eval/loss": 1.0},
        restarts=2,
        run_folder=str(folder),
        notes=("one", "two"),
        best={"trial": "00"},
    )


@pytest.mark.parametrize("status", ["finished", "stopped_by_budget"])
def test_what_was_kept_is_answered_again(tmp_path: Path, status: str) -> None:
    limited, said = spec(PRETRAIN, budget="5usd"), []
    assert finished_earlier(tmp_path, limited, listener(said=said)) is None
    kept = result(tmp_path, status)
    keep_result(kept, limited)
    assert finished_earlier(tmp_path, limited, listener(said=said)) == kept
    assert len(said) == 1


def test_an_mlflow_run_that_a_killed_driver_left_open_is_closed_once_by_the_next_command(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = open_run(uri, "runs", "half-closed")
    run_id, client = tracker.handle.run_id, store.client(uri, create=False)
    (tmp_path / "mlflow.json").write_text(json.dumps(asdict(tracker.handle)))
    limited = spec(PRETRAIN, budget="5usd")
    keep_result(replace(result(tmp_path, "stopped_by_budget"), best=None), limited)

    finished_earlier(tmp_path, limited, listener())
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["orchestrator.stop_reason"] == "budget"
    assert run.data.tags["orchestrator.restarts"] == "2"
    assert run.data.tags["orchestrator.model_path"] == "b"
    finished_earlier(tmp_path, limited, listener())
    assert client.get_run(run_id).info.end_time == run.info.end_time


def test_only_a_run_that_its_budget_stopped_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    for status, goes_on in (("finished", False), ("stopped_by_budget", True)):
        keep_result(result(tmp_path, status), spec(PRETRAIN, budget="5usd"))
        for larger in (spec(PRETRAIN, budget="6usd"), spec(PRETRAIN)):
            assert (finished_earlier(tmp_path, larger, listener()) is None) == goes_on
