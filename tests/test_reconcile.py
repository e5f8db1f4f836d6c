from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.tracking import mlflow_backend, outbox, run_record, store
from orchestrator.tracking.reconcile import flush, flush_left_behind, is_settled, shipment, sync
from orchestrator.tracking.run_record import DesiredRun
from orchestrator.tracking.tracker import MetricLog, MlflowTracker, note_attempt
from tests.mlflow_runs import Server, all_runs, closed, curve, free_port, get_run, log, new_store, opened

pytestmark = pytest.mark.slow


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return new_store(tmp_path / "store")


def wanted(uri: str, **changes: Any) -> DesiredRun:
    handle = run_record.new_handle(uri=uri, experiment="exp", name="tiny", parent=None)
    return replace(DesiredRun(handle=handle), **changes)


def run_id_of(folder: Path) -> str:
    run = run_record.stored_run(folder)
    assert run is not None
    return run.run_id


# -- one run, once ---------------------------------------------------------------------------------------------------


SYNC = """
import sys, time
from pathlib import Path
from orchestrator.tracking.reconcile import sync
import mlflow
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
sync(Path(sys.argv[1]))
"""


def test_processes_that_sync_at_once_make_one_run_with_each_point_once(uri: str, tmp_path: Path) -> None:
    run_record.put(tmp_path, wanted(uri))
    points = MetricLog(tmp_path)
    for step in range(1, 1201):
        points.log(step, {"train/loss": 1 / step})
    points.close()
    command = [sys.executable, "-c", SYNC, str(tmp_path), str(time.time() + 8)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[1] for process in processes] == ["", "", ""]
    (run,) = all_runs(uri)
    assert curve(uri, run.info.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 1201)]


def test_a_run_whose_creator_died_before_it_could_note_the_id_is_found_again(uri: str, tmp_path: Path) -> None:
    run_record.put(tmp_path, wanted(uri))
    sync(tmp_path)
    first = run_id_of(tmp_path)
    (tmp_path / "mlflow.json").unlink()
    (tmp_path / "outbox" / "confirmed.json").unlink()
    sync(tmp_path)
    assert run_id_of(tmp_path) == first
    assert len(all_runs(uri)) == 1


def test_of_a_creation_that_mlflows_client_has_repeated_one_run_is_left(uri: str) -> None:
    client = store.client(uri)

    class ImpatientClient:
        """Its first request is answered too late, so it asks again."""

        def create_run(self, *args: Any, **options: Any) -> Any:
            client.create_run(*args, **options)
            return client.create_run(*args, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

    experiment_id = store.experiment_id(client, uri, "exp")
    made = mlflow_backend.create(ImpatientClient(), wanted(uri), experiment_id, parent_run_id=None)
    assert [run.info.run_id for run in all_runs(uri)] == [made.run_id]


def test_a_store_that_has_everything_is_not_asked_again(uri: str, tmp_path: Path) -> None:
    closed(opened(uri, tmp_path))
    Path(uri.removeprefix("sqlite:///")).rename(tmp_path / "gone.db")
    assert sync(tmp_path) == 0
    assert is_settled(tmp_path)
    assert flush([tmp_path])[0].why is None


def test_the_run_began_and_ended_when_it_did_and_not_when_the_store_heard_of_it(uri: str, tmp_path: Path) -> None:
    run = wanted(uri, status="failed", ended_ms=1_700_000_060_000, tags={"orchestrator.error": "x", "stale": None})
    run_record.put(tmp_path, replace(run, handle=replace(run.handle, created_ms=1_700_000_000_000)))
    sync(tmp_path)
    (found,) = all_runs(uri)
    assert (found.info.start_time, found.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    assert found.info.status == "FAILED"


# -- a server that comes and goes ------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    yield server
    server.kill()


def wait_until(condition: Callable[[], bool], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.1)


class Training:
    """Logs a step at a time, and knows how long the longest took."""

    def __init__(self, tracker: MlflowTracker, folder: Path, **how: Any) -> None:
        self._points = MetricLog(folder, **how)
        self.slowest_s = 0.0

    def steps(self, steps: range) -> None:
        for step in steps:
            began = time.monotonic()
            self._points.log(step, {"train/loss": 1 / step, "train/tokens": 8.0 * step})
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def close(self) -> None:
        self._points.close()


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in steps]


def test_a_server_absent_at_the_start_and_dead_at_the_end_misses_nothing(server: Server, tmp_path: Path) -> None:
    folder, said = tmp_path / "run", []
    tracker = opened(server.uri, folder, say=said.append, params={"seed": 0}, artifacts={"spec.yaml": "name: tiny\n"})
    training = Training(tracker, folder)
    training.steps(range(1, 101))
    assert tracker.run_id is None
    server.start()
    wait_until(lambda: outbox.is_empty(folder / "outbox"), within_s=60)
    run = get_run(server.uri, tracker.run_id)
    assert (run.info.status, run.data.params) == ("RUNNING", {"seed": "0"})
    assert curve(server.uri, tracker.run_id, "train/loss") == expected(range(1, 101))

    server.kill()
    training.steps(range(101, 201))
    note_attempt(folder, 2, "1 worker, from step 100")
    training.close()
    ended_ms = time.time() * 1000
    tracker.end_run("finished", tags={"orchestrator.model_path": "m"})
    began = time.monotonic()
    left = tracker.ship()
    assert time.monotonic() - began < 30
    assert (left.waiting, left.run_id) == (200, tracker.run_id)
    assert left.why is not None
    assert training.slowest_s < 1, "training never waits"
    assert len([line for line in said if "does not take results" in line]) == 2
    assert len([line for line in said if "takes results again" in line]) == 1

    server.start()
    (done,) = flush(run_record.find_runs(tmp_path))
    assert (done.sent, done.waiting, done.why, done.run_id) == (200, 0, None, tracker.run_id)
    run = get_run(server.uri, tracker.run_id)
    assert run.info.status == "FINISHED"
    assert abs(run.info.end_time - ended_ms) < 1000
    assert run.data.tags["orchestrator.attempt.2"] == "1 worker, from step 100"
    assert curve(server.uri, tracker.run_id, "train/loss") == expected(range(1, 201))
    assert len(all_runs(server.uri)) == 1


def test_a_server_that_hangs_holds_up_neither_a_step_nor_for_long_the_end(server: Server, tmp_path: Path) -> None:
    server.start()
    tracker = opened(server.uri, tmp_path / "run")
    training = Training(tracker, tmp_path / "run")
    with server.frozen():
        training.steps(range(1, 1001))
        training.close()
        tracker.end_run("killed")
        began = time.monotonic()
        assert tracker.ship(patience_s=5).waiting == 2000
        assert time.monotonic() - began < 7
    assert training.slowest_s < 1
    assert flush([tmp_path / "run"])[0].why is None
    assert curve(server.uri, tracker.run_id, "train/loss") == expected(range(1, 1001))


DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.tracking.run_record import driving
from orchestrator.tracking.tracker import MetricLog, open_run
folder, uri, attempt, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with driving(folder):
    tracker = open_run(folder, uri=uri, experiment="exp", name="tiny", say=lambda line: None)
    points = MetricLog(folder, attempt=attempt, resumed_from=first - 1)
    for step in range(first, 100_000):
        points.log(step, {"train/loss": 1 / step, "train/tokens": 8.0 * step})
        print(step, flush=True)
        time.sleep(0.02)
"""


def test_server_and_driver_killed_in_mid_run_every_point_is_there_once_and_the_status_true(
    server: Server, tmp_path: Path
) -> None:
    server.start()
    folder, last_step = tmp_path / "run", 0
    for attempt, server_dies_at, driver_dies_at, resume_at in ((1, 300, 400, 1), (2, 10_000, 550, 350)):
        command = [sys.executable, "-c", DRIVER, str(folder), server.uri, str(attempt), str(resume_at)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            for line in driver.stdout:
                last_step = int(line)
                if last_step == server_dies_at:
                    server.kill()
                if last_step == driver_dies_at:
                    assert shipment(folder).status == "running"
                    driver.send_signal(signal.SIGKILL)
                    break
        if attempt == 1:
            assert flush([folder])[0].why is not None, "the server is dead too"
            assert shipment(folder).status == "killed"
            server.start()
    assert get_run(server.uri, run_id_of(folder)).info.status == "RUNNING", "which is not true"
    died_ms = time.time() * 1000
    (done,) = flush([folder])
    assert done.why is None
    run = get_run(server.uri, run_id_of(folder))
    assert run.info.status == "KILLED"
    assert "without saying how" in run.data.tags["orchestrator.error"]
    assert abs(run.info.end_time - died_ms) < 60_000
    points = curve(server.uri, run_id_of(folder), "train/loss")
    assert len(points) >= last_step
    assert points == expected(range(1, len(points) + 1))
    assert len(all_runs(server.uri)) == 1


def test_trials_are_nested_below_a_search_that_the_server_did_not_know_when_they_began(
    server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "search"
    search = opened(server.uri, folder, name="search")
    trials = [folder / "trials" / name for name in ("00", "01")]
    for number, trial_folder in enumerate(trials):
        trial = search.open_trial(trial_folder, name=trial_folder.name)
        log(trial, trial_folder, {"eval/accuracy": 0.5 + number / 10, "cost/usd": 1.0})
        trial.end_run("finished")
    search.show_best(trials[1], trials)
    search.end_run("finished")
    assert search.ship().why is not None
    server.start()
    done = flush(run_record.find_runs(tmp_path))
    assert [(one.name, one.sent, one.why) for one in done] == [("00", 2, None), ("01", 2, None), ("search", 0, None)]
    runs = {run.info.run_name: run for run in all_runs(server.uri)}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs.pop("search")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert parent.data.metrics == {"eval/accuracy": 0.6, "cost/usd": 2.0}
    assert parent.data.tags["orchestrator.best_run_id"] == runs["01"].info.run_id


# -- who ships what --------------------------------------------------------------------------------------------------


def test_the_next_command_ships_what_killed_drivers_left_and_no_living_ones(uri: str, tmp_path: Path) -> None:
    for name in ("dead", "alive", "own"):
        run_record.put(tmp_path / name, wanted(uri))
    closed(opened(uri, tmp_path / "settled"))
    with run_record.driving(tmp_path / "alive"):
        done = flush_left_behind(tmp_path, but=tmp_path / "own")
    assert [(one.folder.name, one.status, one.why) for one in done] == [("dead", "killed", None)]
    assert shipment(tmp_path / "alive").status == "running"


def test_a_store_that_is_away_is_asked_once_for_all_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(uri: str) -> None:
        asked.append(uri)
        raise StorageError("the MLflow server does not answer")

    monkeypatch.setattr(store, "check_store", refuse)
    uri = f"http://127.0.0.1:{free_port()}"
    for name in ("a", "b"):
        run_record.put(tmp_path / name, wanted(uri))
    done = flush(run_record.find_runs(tmp_path))
    assert [one.why for one in done] == ["the MLflow server does not answer"] * 2
    assert asked == [uri]


def test_a_damaged_folder_does_not_keep_the_others_from_being_flushed(uri: str, tmp_path: Path) -> None:
    for name in ("damaged", "whole"):
        run_record.put(tmp_path / name, wanted(uri))
    (tmp_path / "damaged" / "outbox" / "desired.json").write_text("{")
    damaged, whole = flush(run_record.find_runs(tmp_path))
    assert "is damaged" in str(damaged.why)
    assert whole.why is None


def test_a_run_deleted_in_the_store_will_not_be_taken_later_either(uri: str, tmp_path: Path) -> None:
    tracker = opened(uri, tmp_path)
    run_id = closed(tracker)
    store.client(uri).delete_run(run_id)
    log(tracker, tmp_path, {"train/loss": 2.0})  # a point that comes late
    (done,) = flush([tmp_path])
    assert (done.is_final, done.waiting) == (True, 1)
    note_attempt(tmp_path, 1, "more to say")
    (done,) = flush([tmp_path])
    assert done.is_final
    assert "deleted" in str(done.why)


def test_a_trial_deleted_in_the_store_holds_up_neither_the_others_nor_their_search(uri: str, tmp_path: Path) -> None:
    search, folders = opened(uri, tmp_path, name="search"), [tmp_path / "trials" / name for name in ("00", "01", "02")]
    trials = [search.open_trial(folder, name=folder.name) for folder in folders]
    wait_until(lambda: len(all_runs(uri)) == 4, within_s=30)
    store.client(uri).delete_run(run_id_of(folders[1]))
    for trial, folder in zip(trials, folders, strict=True):
        log(trial, folder, {"eval/accuracy": 0.5})
        trial.end_run("finished")
    search.show_best(folders[2], folders)
    search.end_run("finished")
    search.ship()
    assert {run.info.run_name: run.info.status for run in all_runs(uri)} == dict.fromkeys(
        ("search", "00", "02"), "FINISHED"
    )


def test_a_run_that_goes_on_has_nothing_to_explain(uri: str, tmp_path: Path) -> None:
    with run_record.driving(tmp_path):
        run_record.put(tmp_path, wanted(uri))
        sync(tmp_path)
        points = MetricLog(tmp_path)
        points.log(1, {"train/loss": 2.0})
        points.close()
        assert (shipment(tmp_path).waiting, shipment(tmp_path).why) == (1, None)
