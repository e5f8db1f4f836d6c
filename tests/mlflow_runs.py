"""MLflow for tests: stores that cost a copy, a real server that can be killed, runs without a training."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.tracking import store
from orchestrator.tracking.run_record import Description
from orchestrator.tracking.tracker import MetricLog, MlflowTracker, open_run


def new_store(folder: Path) -> str:
    """An empty SQLite store in a folder; its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


@functools.cache
def _template() -> Path:
    """Making the tables takes seconds, so every store is a copy of one."""
    path = Path(tempfile.mkdtemp(prefix="mlflow-template-")) / "mlflow.db"
    store.client(f"sqlite:///{path}")
    return path


def opened(uri: str, folder: Path, *, experiment: str = "exp", name: str = "tiny", **how: Any) -> MlflowTracker:
    """The tracked run of a folder; `how` are fields of `Description`, or as for `open_run`, which says nothing."""
    what = Description(**{key: how.pop(key) for key in ("tags", "params", "artifacts") if key in how})
    quiet: dict[str, Any] = {"say": lambda line: None}
    return open_run(folder, uri=uri, experiment=experiment, name=name, what=what, **{**quiet, **how})


def log(tracker: MlflowTracker, folder: Path, metrics: dict[str, float], *, step: int = 1, **how: Any) -> None:
    """Logs one step as rank 0 does; `how` as for `MetricLog`."""
    points = MetricLog(folder, **how)
    points.log(step, metrics)
    points.close()


def closed(tracker: MlflowTracker, **how: Any) -> str:
    """Ends a run, `finished` unless `how` says otherwise, and ships it; its id in MLflow."""
    tracker.end_run(**{"status": "finished", **how})
    shipment = tracker.ship()
    assert shipment.why is None, shipment
    assert shipment.run_id is not None
    return shipment.run_id


def get_run(uri: str, run_id: str | None) -> Any:
    """The run as MLflow has it."""
    return store.client(uri, create=False).get_run(run_id)


def all_runs(uri: str, experiment: str = "exp") -> list[Any]:
    """Every run of an experiment."""
    client = store.client(uri, create=False)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def curve(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """(step, value) of all points, in the order in which MLflow has them."""
    points = store.client(uri, create=False).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real MLflow server on a store in a folder, absent until it is started."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.database = new_store(folder)
        """The store behind it, for a test to look into when the server is away."""
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        options = ["--workers", "1", "--host", "127.0.0.1", "--port", str(self._port)]
        places = ["--backend-store-uri", self.database, "--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, *places],
                cwd=self._folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # the server and its worker are killed together
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < deadline, (self._folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes requests and answers none (SIGSTOP) until the block ends."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        yield
        os.killpg(self._process.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False
