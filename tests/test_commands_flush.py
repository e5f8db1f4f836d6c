from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.tracking import run_record
from orchestrator.tracking.run_record import DesiredRun
from orchestrator.tracking.tracker import MetricLog
from tests.mlflow_runs import closed, curve, free_port, get_run, log, new_store, opened

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def orchestrator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `orchestrator ...` in this process with a state folder of its own; gives code, output and error."""
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return done.exit_code, done.stdout, done.stderr

    return run


def leave(folder: Path, uri: str) -> None:
    """A run whose driver and server are gone."""
    handle = run_record.new_handle(uri=uri, experiment="exp", name=folder.name, parent=None)
    run_record.put(folder, DesiredRun(handle=handle))


def test_a_folder_without_runs_is_a_mistake(orchestrator: Command, tmp_path: Path) -> None:
    for arguments in ((tmp_path,), (tmp_path / "missing", "--json")):
        code, out, err = orchestrator("flush", *arguments)
        assert code == 2
        assert "there is no tracked run in this folder" in err
        assert out == "" or json.loads(out)["status"] == "failed"


def test_a_folder_and_all_is_a_mistake(orchestrator: Command, tmp_path: Path) -> None:
    code, _, err = orchestrator("flush", tmp_path, "--all")
    assert code == 2
    assert "not both" in err


@pytest.mark.parametrize("arguments", [(), ("--all",)])
def test_with_no_runs_at_all_there_is_nothing_to_do(orchestrator: Command, arguments: tuple[str, ...]) -> None:
    code, out, _ = orchestrator("flush", "--json", *arguments)
    assert code == 0
    assert json.loads(out) == {"status": "shipped", "sent": 0, "waiting": 0, "runs": []}


def test_what_waits_and_why_is_said_of_each_run_while_the_server_is_away(orchestrator: Command, tmp_path: Path) -> None:
    uri, folder = f"http://127.0.0.1:{free_port()}", tmp_path / "home" / "runs" / "tiny-1"
    leave(folder, uri)
    run = run_record.read(folder)
    assert run is not None
    points = MetricLog(folder)
    points.log(1, {"train/loss": 2.0, "train/tokens": 8.0})
    points.close()
    code, out, _ = orchestrator("flush", "--json")
    answer = json.loads(out)
    assert code == 1
    assert (answer["status"], answer["sent"], answer["waiting"]) == ("waiting", 0, 2)
    (one,) = answer["runs"]
    assert one["run_folder"] == str(folder)
    assert (one["status"], one["mlflow_run_id"], one["is_final"]) == ("killed", None, False)
    assert "does not answer" in one["why"]
    code, out, err = orchestrator("flush", folder)
    assert code == 1
    assert "0 points sent, 2 wait" in out
    assert "does not answer" in err


@pytest.mark.slow
def test_what_a_killed_driver_left_is_sent_and_the_run_is_killed(orchestrator: Command, tmp_path: Path) -> None:
    uri, folder = new_store(tmp_path), tmp_path / "runs" / "tiny-1"
    tracker = opened(uri, folder)
    log(tracker, folder, {"train/loss": 2.0})
    tracker.ship()  # and its driver is killed without a word
    leave(tmp_path / "runs" / "tiny-2", uri)
    closed(opened(uri, tmp_path / "runs" / "tiny-3"))
    code, out, _ = orchestrator("flush", tmp_path / "runs", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["status"] == "shipped"
    assert [(one["name"], one["status"]) for one in answer["runs"]] == [
        ("tiny", "killed"),
        ("tiny-2", "killed"),
        ("tiny", "finished"),
    ]
    assert get_run(uri, tracker.run_id).info.status == "KILLED"
    assert curve(uri, tracker.run_id, "train/loss") == [(1, 2.0)]
    code, out, err = orchestrator("flush", tmp_path / "runs")
    assert (code, err) == (0, "")
    assert out.strip() == f"3 runs below {tmp_path / 'runs'}: 3 in MLflow, 0 waiting"


@pytest.mark.slow
def test_a_run_that_goes_on_is_running_after_a_flush(orchestrator: Command, tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    with run_record.driving(tmp_path / "run"):
        tracker = opened(uri, tmp_path / "run")
        code, out, _ = orchestrator("flush", tmp_path / "run", "--json")
        assert (code, json.loads(out)["runs"][0]["status"]) == (0, "running")
        assert get_run(uri, tracker.run_id).info.status == "RUNNING"
        tracker.ship()


@pytest.mark.slow
def test_what_a_run_has_not_sent_reaches_its_store_after_the_home_of_both_was_moved(
    orchestrator: Command, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "home"
    folder = before / "runs" / "tiny-0123abcd"
    folder.mkdir(parents=True)
    tracker = opened(new_store(before), folder)
    run_id = closed(tracker)
    log(tracker, folder, {"train/loss": 2.0}, step=7)
    before.rename(after)
    code, out, err = orchestrator("flush", after / "runs" / "tiny-0123abcd", "--json")
    assert code == 0, err
    assert json.loads(out)["sent"] == 1
    (store,) = after.glob("*.db")
    assert curve(f"sqlite:///{store}", run_id, "train/loss") == [(7, 2.0)]
    assert not before.exists(), "nothing is written to where the home was"
