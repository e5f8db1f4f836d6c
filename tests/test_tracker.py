from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.tracking import run_record, store
from orchestrator.tracking.outbox import count_waiting
from orchestrator.tracking.run_record import Description
from orchestrator.tracking.tracker import MetricLog, NoTracker, note_attempt, note_recovery
from tests.mlflow_runs import closed, curve, free_port, get_run, log, new_store, opened

LOAD_NOTHING_HEAVY = """
import sys
import orchestrator.tracking.tracker, orchestrator.tracking.store, orchestrator.tracking.reconcile
import orchestrator.tracking.compare, orchestrator.tracking.plots, orchestrator.tracking.comparison_page
print([name for name in ("mlflow", "torch", "ray", "matplotlib", "numpy", "rich") if name in sys.modules])
"""


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return new_store(tmp_path)


# -- without a store -------------------------------------------------------------------------------------------------


def test_importing_tracking_loads_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD_NOTHING_HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_tracking_metrics_stay_in_the_runs_folder(tmp_path: Path) -> None:
    tracker = NoTracker()
    points = MetricLog(tmp_path)
    points.log(1, {"train/loss": 2.0})
    points.close()
    assert count_waiting(tmp_path / "outbox") == 1
    tracker.end_run("finished")
    tracker.ship()
    note_attempt(tmp_path, 1, "2 workers")
    note_recovery(tmp_path, {"restarts": 1}, step=1)
    (file,) = tmp_path.rglob("*.jsonl")
    assert '"train/loss"' in file.read_text()
    assert run_record.find_runs(tmp_path) == []


def test_a_worker_whose_attempt_is_over_writes_nothing_more(tmp_path: Path) -> None:
    holds = [True]
    points = MetricLog(tmp_path, attempt=1, holds=lambda: holds[0])
    points.log(1, {"train/loss": 2.0})
    holds[0] = False
    points.log(2, {"train/loss": 1.0})
    points.close()
    assert count_waiting(tmp_path / "outbox") == 1


def test_a_worker_never_imports_mlflow(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from orchestrator.tracking import run_record
from orchestrator.tracking.tracker import MetricLog
folder = Path({str(tmp_path)!r})
handle = run_record.new_handle(uri="sqlite:////nowhere/mlflow.db", experiment="exp", name="tiny", parent=None)
run_record.put(folder, run_record.DesiredRun(handle=handle))
points = MetricLog(folder)
points.log(1, {{"train/loss": 2.0}})
points.close()
print("mlflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert count_waiting(tmp_path / "outbox") == 1


@pytest.mark.parametrize("uri", ["redis://host/0", "./mlruns", "http://"])
def test_an_unusable_store_is_refused_and_leaves_nothing(tmp_path: Path, uri: str) -> None:
    with pytest.raises(SpecError):
        opened(uri, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_a_warning_and_costs_no_time(tmp_path: Path) -> None:
    said: list[str] = []
    started = time.monotonic()
    tracker = opened(f"http://127.0.0.1:{free_port()}", tmp_path, say=said.append)
    assert time.monotonic() - started < 3
    assert tracker.run_id is None
    assert len(said) == 1
    assert "the MLflow server does not answer" in said[0]
    assert str(tmp_path) in said[0]
    log(tracker, tmp_path, {"train/loss": 2.0})
    started = time.monotonic()
    tracker.end_run("finished")
    shipment = tracker.ship()
    assert time.monotonic() - started < 6
    assert (shipment.status, shipment.waiting, shipment.run_id) == ("finished", 1, None)
    assert f"`orchestrator flush {tmp_path}`" in str(shipment.note())


# -- with a SQLite store ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_opened_described_and_ended(uri: str, tmp_path: Path) -> None:
    tracker = opened(
        uri,
        tmp_path / "run",
        tags={"orchestrator.kind": "pretrain"},
        params={"training": {"seed": 0}},
        artifacts={"spec.yaml": "name: tiny\n"},
    )
    run = get_run(uri, tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "tiny")
    tracker.tag({"orchestrator.restarts": "0"})
    assert closed(tracker, status="failed", error="out of memory") == run.info.run_id
    run = get_run(uri, tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.params == {"training.seed": "0"}
    assert run.data.tags["orchestrator.error"] == "out of memory"
    assert run.data.tags["orchestrator.kind"] == "pretrain"
    assert run.data.tags["orchestrator.restarts"] == "0"
    assert [item.path for item in store.client(uri).list_artifacts(run.info.run_id)] == ["spec.yaml"]
    assert list((tmp_path / "home" / "artifacts").rglob("spec.yaml"))
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
def test_a_run_opened_again_is_the_same_run_and_running(uri: str, tmp_path: Path) -> None:
    first = opened(uri, tmp_path, params={"workers": 4, "seed": 0})
    run_id = closed(first, status="failed", error="node died", tags={"orchestrator.stop_reason": "budget"})
    again = opened(uri, tmp_path, params={"workers": 2, "precision": "bf16"})
    assert again.handle == first.handle
    assert again.run_id == run_id
    run = get_run(uri, run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"workers": "4", "seed": "0", "precision": "bf16"}
    wanted = run_record.read(tmp_path)
    assert wanted is not None
    assert wanted.params == run.data.params, "what a store would get that has seen neither"
    assert not {"orchestrator.error", "orchestrator.stop_reason"} & run.data.tags.keys()
    assert closed(again) == run_id
    assert get_run(uri, run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_run_that_was_deleted_in_the_store_is_refused_and_its_folder_left_as_it_was(uri: str, tmp_path: Path) -> None:
    run_id = closed(opened(uri, tmp_path))
    before = run_record.read(tmp_path)
    store.client(uri).delete_run(run_id)
    said: list[str] = []
    with pytest.raises(SpecError, match="was deleted there"):
        opened(uri, tmp_path, say=said.append)
    assert run_record.read(tmp_path) == before
    assert said == []


@pytest.mark.slow
def test_long_values_and_many_parameters_and_tags_fit_mlflows_limits(uri: str, tmp_path: Path) -> None:
    params = {f"p{number}": number for number in range(250)} | {"long": "x" * 9000}
    tracker = opened(uri, tmp_path, params=params, tags={f"t{number}": "x" for number in range(150)})
    run = get_run(uri, closed(tracker, status="failed", error="e" * 20_000))
    assert len(run.data.params) == 251
    assert len(run.data.params["long"]) == 6000
    assert len(run.data.tags["orchestrator.error"]) == 8000
    assert sum(key.startswith("t") for key in run.data.tags) == 150


@pytest.mark.slow
def test_attempts_are_tags_and_recoveries_are_metrics(uri: str, tmp_path: Path) -> None:
    tracker = opened(uri, tmp_path)
    assert pickle.loads(pickle.dumps(tracker.handle)) == tracker.handle
    note_attempt(tmp_path, 1, "2 workers, from step 0")
    note_attempt(tmp_path, 1, "2 workers, from step 0; worker of rank 1 died (SIGKILL) at step 37")
    note_attempt(tmp_path, 2, "1 worker, from step 30")
    note_recovery(tmp_path, {"restarts": 1, "lost_steps": 7}, step=30)
    note_recovery(tmp_path, {"restarts": 2, "lost_steps": 12}, step=30)
    run = get_run(uri, closed(tracker))
    assert run.data.tags["orchestrator.attempt.1"].endswith("died (SIGKILL) at step 37")
    assert run.data.tags["orchestrator.attempt.2"] == "1 worker, from step 30"
    assert run.data.metrics["recovery/restarts"] == 2
    assert run.data.metrics["recovery/lost_steps"] == 12
    assert curve(uri, run.info.run_id, "recovery/lost_steps") == [(30, 7.0), (30, 12.0)]


@pytest.mark.slow
def test_a_resumed_run_has_each_step_once(uri: str, tmp_path: Path) -> None:
    for attempt, steps in ((1, range(1, 38)), (2, range(31, 61))):
        tracker = opened(uri, tmp_path)
        points = MetricLog(tmp_path, attempt=attempt, resumed_from=steps[0] - 1)
        for step in steps:
            points.log(step, {"train/loss": 1 / step})
        points.close()
        run_id = closed(tracker)
    assert curve(uri, run_id, "train/loss") == [(step, 1 / step) for step in range(1, 61)]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_tagged_and_not_drawn(uri: str, tmp_path: Path) -> None:
    tracker = opened(uri, tmp_path)
    points = MetricLog(tmp_path)
    for step, loss in enumerate((2.0, float("inf"), float("nan")), start=1):
        points.log(step, {"train/loss": loss})
    points.close()
    run_id = closed(tracker)
    assert curve(uri, run_id, "train/loss") == [(1, 2.0)]
    assert get_run(uri, run_id).data.tags["orchestrator.non_finite"] == "train/loss is inf at step 2"


@pytest.mark.slow
def test_a_search_shows_its_best_trial_and_the_cost_of_all(uri: str, tmp_path: Path) -> None:
    search = opened(uri, tmp_path, name="search", params={"seed": 0, "learning_rate": "searched"})
    folders = [tmp_path / "trials" / f"{number:02d}" for number in range(2)]
    for number, folder in enumerate(folders):
        trial = search.open_trial(
            folder, name=folder.name, what=Description(params={"seed": 0, "learning_rate": 10.0**-number})
        )
        log(trial, folder, {"eval/accuracy": (0.7, 0.9)[number], "cost/usd": 1.5}, step=40)
        trial.end_run("finished")
        assert search.left_open(folder) is None
    search.show_best(folders[1], [*folders, tmp_path / "trials" / "never-began"])
    run = get_run(uri, closed(search))
    best = run_record.stored_run(folders[1])
    assert best is not None
    assert run.data.metrics == {"eval/accuracy": 0.9, "cost/usd": 3.0}
    assert run.data.params["learning_rate"] == "searched"
    assert run.data.params["best.learning_rate"] == "0.1"
    assert "best.seed" not in run.data.params
    assert run.data.tags["orchestrator.best_run_id"] == best.run_id
    trial_run = get_run(uri, best.run_id)
    assert trial_run.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert trial_run.info.status == "FINISHED"


@pytest.mark.slow
def test_a_trial_that_an_earlier_driver_left_open_is_given_to_the_next(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "00"
    opened(uri, tmp_path).open_trial(folder, name="00")
    search = opened(uri, tmp_path)
    left = search.left_open(folder)
    assert left is not None
    left.end_run("finished")
    closed(search, status="killed")
    run = run_record.stored_run(folder)
    assert run is not None
    assert get_run(uri, run.run_id).info.status == "FINISHED"
