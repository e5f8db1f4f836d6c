"""A Ray head with a job server, as tests and benchmarks reach it from outside and from within."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.end_to_end import runs
from tests.mlflow_runs import free_port

ROOT = Path(__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RUNTIME_ENV = "jobs/runtime-env.yaml"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head and where its jobs keep their state."""

    dashboard: str
    gcs: str
    home: Path
    laptop: Path
    """State of the commands that reach it from outside."""
    temp: Path
    process: psutil.Process

    def submit(self, module: str, spec: Path, *arguments: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit` as the README has it."""
        return self.ray(
            "job",
            "submit",
            "--working-dir",
            ".",
            "--runtime-env",
            RUNTIME_ENV,
            *([] if wait else ["--no-wait", "--submission-id", spec.stem]),
            "--",
            "python",
            "-m",
            module,
            "--config",
            str(spec),
            *arguments,
        )

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RAY_ADDRESS": self.dashboard}
        return subprocess.run(
            [*RAY, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def typed(self, line: str) -> subprocess.CompletedProcess[str]:
        """A command line in the project's folder, as on a laptop that knows the dashboard alone."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", line],
            cwd=ROOT,
            env={**self.outside(), "RAY_ADDRESS": self.dashboard, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def orchestrator(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command as on a laptop that knows the dashboard alone, without a terminal."""
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            cwd=cwd,
            env=self.outside(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def outside(self) -> dict[str, str]:
        """The environment of such a command."""
        return {**os.environ, "RAY_API_SERVER_ADDRESS": self.dashboard, "ORCHESTRATOR_HOME": str(self.laptop)}

    def row(self, name: str) -> dict[str, Any]:
        """What `orchestrator jobs` says of the newest job of a name."""
        listed = self.orchestrator("jobs", "--json")
        assert listed.returncode == 0, listed.stderr
        return next(row for row in json.loads(listed.stdout)["jobs"] if row["name"] == name)

    def workers(self) -> list[str]:
        """Titles of the processes of jobs that still run."""
        return [
            title
            for process in self.process.children(recursive=True)
            if "RayTrain" in (title := " ".join(process.cmdline()[:3])) or "jobs." in title
        ]

    def result(self, name: str) -> tuple[Path, Any]:
        """(run folder, MLflow run) of a run by name."""
        (folder,) = (self.home / "runs").glob(f"{name}-{'?' * 8}")  # and not that of a longer name
        run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
        return folder, runs.mlflow_run(run_id, uri=f"sqlite:///{self.home / 'mlflow.db'}")


def end_head(process: subprocess.Popen[bytes]) -> None:
    """Ends `ray start --block` and all that it has started."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    psutil.wait_procs(family, timeout=3)  # most end with it, and some never
    for left in family:
        if left.is_running():
            left.kill()
    process.kill()
    process.wait()


@contextmanager
def ray_head(home: Path, laptop: Path) -> Iterator[Head]:
    """Ray of two CPUs with a dashboard, below a process that is ours to end.

    `home` keeps the jobs' state, `laptop` that of commands that reach the head from outside.
    """
    gcs_port, dashboard_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as temp:
        options = {
            "--port": gcs_port,
            "--dashboard-port": dashboard_port,
            "--node-ip-address": "127.0.0.1",
            "--dashboard-host": "127.0.0.1",
            "--temp-dir": temp,
            "--num-cpus": 2,
            "--dashboard-agent-listen-port": free_port(),
            "--dashboard-agent-grpc-port": free_port(),
            "--ray-client-server-port": free_port(),
            "--metrics-export-port": free_port(),
        }
        with (home / "head.log").open("w") as log:
            process = subprocess.Popen(
                [*RAY, "start", "--head", "--block", *(f"{key}={value}" for key, value in options.items())],
                stdout=log,
                stderr=log,
                # The entrypoint's `python` is the one of the head's PATH, and jobs inherit what else the nodes say.
                env={
                    **os.environ,
                    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                    "ORCHESTRATOR_HOME": str(home),
                },
            )
        started = Head(
            dashboard=f"http://127.0.0.1:{dashboard_port}",
            gcs=f"127.0.0.1:{gcs_port}",
            home=home,
            laptop=laptop,
            temp=Path(temp),
            process=psutil.Process(process.pid),
        )
        try:
            runs.wait_until(lambda: started.ray("job", "list").returncode == 0, within_s=90)
            yield started
        finally:
            end_head(process)
