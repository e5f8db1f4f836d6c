"""`make tracking-server`: a real MLflow server with PostgreSQL behind it, and a name and a password before it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from orchestrator.doctor.report import check_mlflow
from orchestrator.errors import StorageError
from orchestrator.tracking import store
from tests.mlflow_runs import free_port
from tests.postgres import postgres, programs

SCRIPT = Path(__file__).parents[1] / "cluster" / "tracking-server.sh"
NAME, PASSWORD, DATABASE_PASSWORD = "ana", "the password of ana", "the-password-of-the-store"


@pytest.mark.parametrize(
    ("environment", "what", "do"),
    [
        ({}, "no administrator", "export MLFLOW_TRACKING_USERNAME"),
        ({"MLFLOW_TRACKING_USERNAME": NAME}, "no administrator", "MLFLOW_TRACKING_PASSWORD"),
        ({"MLFLOW_TRACKING_USERNAME": NAME, "MLFLOW_TRACKING_PASSWORD": "short"}, "12 characters", "a longer one"),
    ],
)
def test_a_server_that_nobody_could_log_in_to_is_not_started(
    environment: dict[str, str], what: str, do: str, tmp_path: Path
) -> None:
    plain = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = ["bash", str(SCRIPT), str(tmp_path / "kept")]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert what in done.stderr
    assert do in done.stderr
    assert not (tmp_path / "kept").exists()


@dataclass(frozen=True, kw_only=True)
class Started:
    """A running server."""

    uri: str
    folder: Path
    process: psutil.Process
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    if programs() is None or find_spec("flask_wtf") is None:
        pytest.skip("apt-get install postgresql, pip install 'mlflow[auth]'")
    folder, port = tmp_path_factory.mktemp("tracking"), free_port()
    with postgres(DATABASE_PASSWORD) as database, (folder / "log").open("w") as log:
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "PORT": str(port),
            "MLFLOW_TRACKING_USERNAME": NAME,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "MLFLOW_BACKEND_STORE_URI": database.uri,
        }
        process = psutil.Popen(["bash", str(SCRIPT), str(folder / "kept")], env=environment, stdout=log, stderr=log)
        started = Started(uri=f"http://127.0.0.1:{port}", folder=folder / "kept", process=process, log=folder / "log")
        try:
            _wait_until_it_answers(started)
            yield started
        finally:
            family = process.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            _, left = psutil.wait_procs([process, *family], timeout=30)
            for each in left:
                each.kill()
            assert not left, "all of it ends with its script"


def _wait_until_it_answers(started: Started) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        with suppress(OSError), urllib.request.urlopen(f"{started.uri}/health", timeout=1):
            return
        assert started.process.is_running(), started.log.read_text()
        time.sleep(0.2)
    raise TimeoutError(started.log.read_text())


def log_in(patch: pytest.MonkeyPatch, name: str | None, password: str | None) -> None:
    for variable, value in (("MLFLOW_TRACKING_USERNAME", name), ("MLFLOW_TRACKING_PASSWORD", password)):
        if value is None:
            patch.delenv(variable, raising=False)
        else:
            patch.setenv(variable, value)


@pytest.mark.slow
def test_who_may_log_in_logs_runs_and_artifacts_through_the_server(
    server: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log_in(monkeypatch, NAME, PASSWORD)
    store.check_store(server.uri)
    client = store.client(server.uri)
    run = client.create_run(store.experiment_id(client, server.uri, "shared"))
    client.log_metric(run.info.run_id, "eval/loss", 0.5)
    (tmp_path / "plan.json").write_text("{}")
    client.log_artifact(run.info.run_id, str(tmp_path / "plan.json"))
    assert client.get_run(run.info.run_id).data.metrics == {"eval/loss": 0.5}
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["plan.json"]
    assert run.info.artifact_uri.startswith("mlflow-artifacts:"), "no client needs rights on where they lie"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "password", "what"),
    [
        (None, None, "wants a user and a password"),
        (NAME, "not the password of ana", "does not take the login of MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_who_may_not_is_told_so_with_the_remedy_by_doctor_too(
    server: Started, monkeypatch: pytest.MonkeyPatch, name: str | None, password: str | None, what: str
) -> None:
    log_in(monkeypatch, name, password)
    with pytest.raises(StorageError, match=what) as refused:
        store.check_store(server.uri)
    assert "401" in str(refused.value.got)
    finding = check_mlflow(server.uri, store.check_store)
    assert (finding.status, what in finding.detail) == ("fail", True)
    assert "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in str(finding.remedy)


@pytest.mark.slow
def test_passwords_are_in_no_command_line_and_no_log_and_in_files_of_their_owner_alone(server: Started) -> None:
    for process in [server.process, *server.process.children(recursive=True)]:
        assert not any(secret in " ".join(process.cmdline()) for secret in (PASSWORD, DATABASE_PASSWORD))
    assert not any(secret in server.log.read_text() for secret in (PASSWORD, DATABASE_PASSWORD))
    for file in server.folder.rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
