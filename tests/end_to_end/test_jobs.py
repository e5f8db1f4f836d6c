"""The jobs as a user submits them: `ray job submit --working-dir .` against a head of our own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator.spec import RunSpec
from tests import specs
from tests.end_to_end import runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RUNTIME_ENV = "jobs/runtime-env.yaml"
UPLOAD_LIMIT_BYTES = 4_000_000
"""What travels is source, configs and the sample data: 3.3 MB."""


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
        (folder,) = (self.home / "runs").glob(f"{name}-*")
        run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
        return folder, runs.mlflow_run(run_id, uri=f"sqlite:///{self.home / 'mlflow.db'}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Ray of two CPUs with a dashboard, below a process that is ours to end."""
    home = tmp_path_factory.mktemp("job-home")
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
            laptop=tmp_path_factory.mktemp("laptop"),
            temp=Path(temp),
            process=psutil.Process(process.pid),
        )
        try:
            runs.wait_until(lambda: started.ray("job", "list").returncode == 0, within_s=90)
            yield started
        finally:
            family = started.process.children(recursive=True)
            process.terminate()
            psutil.wait_procs(family, timeout=3)  # most end with it, and some never
            for left in family:
                if left.is_running():
                    left.kill()
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_classification(tmp_path_factory.mktemp("data"))
    specs.write_corpus(folder / "corpus")
    return folder


def write(spec: RunSpec, folder: Path) -> Path:
    raw = spec.model_dump(mode="json", exclude={"deepspeed"}) | {"deepspeed": {"zero_stage": 2}}
    file = folder / f"{spec.name}.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_a_submitted_pretraining_leaves_its_results_outside_the_jobs_working_dir(head: Head, folder: Path) -> None:
    spec = runs.pretraining(folder / "corpus", "job-pretrain", training__steps=4)
    done = head.submit("jobs.pretrain", write(spec, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    run_folder, run = head.result("job-pretrain")
    assert run.info.status == "FINISHED"
    assert (run_folder / "model" / "model.safetensors").is_file()
    session = (head.temp / "session_latest").resolve()  # a link beside the session itself: neither is counted twice
    uploads = list(session.glob("runtime_resources/working_dir_files/*"))
    size = sum(f.stat().st_size for upload in uploads for f in upload.rglob("*") if f.is_file())
    assert 0 < size < UPLOAD_LIMIT_BYTES


def test_a_submitted_search_succeeds(head: Head, folder: Path) -> None:
    search = {"space": {"training.seed": {"grid": [0, 1]}}, "scheduler": "none"}
    searched = runs.classification(folder, "job-tune", training__steps=2, search=search)
    done = head.submit("jobs.tune", write(searched, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.result("job-tune")[1].info.status == "FINISHED"


def test_a_mistake_ends_the_job_with_our_message_and_no_traceback(head: Head, folder: Path) -> None:
    spec = write(runs.pretraining(folder / "corpus", "job-mistake"), folder)
    done = head.submit("jobs.pretrain", spec, "training.lr=1")
    shown = done.stdout + done.stderr
    assert done.returncode == 1
    assert "unknown key training.lr" in shown
    assert "exit code 2" in shown
    assert "Traceback" not in shown


def test_a_stopped_job_ends_in_a_checkpoint_and_goes_on_when_submitted_again(head: Head, folder: Path) -> None:
    spec = runs.pretraining(folder / "corpus", "job-stop", training__steps=2000, checkpoint__every_steps=None)
    file = write(spec, folder)
    assert head.submit("jobs.pretrain", file, wait=False).returncode == 0
    runs_folder = head.home / "runs"
    runs.wait_until(
        lambda: any('"step": 20,' in f.read_text() for f in runs_folder.glob("job-stop-*/outbox/*.jsonl")),
        within_s=120,
    )
    stopped = head.ray("job", "stop", "job-stop")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    run_folder, run = head.result("job-stop")
    assert run.info.status == "KILLED"
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    assert 20 <= int(checkpoint.name.removeprefix("step-")) < 2000
    runs.wait_until(lambda: head.workers() == [], within_s=30)


def test_a_spec_is_submitted_with_its_files_followed_and_told_of_and_mlflow_knows_the_revision(
    head: Head, folder: Path
) -> None:
    tuned = runs.classification(Path(), "sent", training__steps=2, budget="1hours")
    file = write(tuned, folder)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    done = head.orchestrator("submit", file.name, "--yes", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["submission_id"], answer["kind"]) == ("succeeded", "sent-1", "finetune")
    assert answer["plan"]["workers"] == 1
    assert answer["commands"]["stop"] == "orchestrator stop sent"
    assert "starting workers\n" in done.stderr
    assert "\r" not in done.stderr
    row = head.row("sent")
    assert (row["state"], row["step"], row["steps"], row["unit"], row["budget"]) == ("succeeded", 2, 2, "hours", 1.0)
    assert 0 < row["spent"] < 1
    assert row["remaining"] == pytest.approx(1 - row["spent"])
    _, run = head.result("sent")
    assert run.info.status == "FINISHED"
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    assert run.data.tags["mlflow.source.git.commit"] == revision.stdout.strip()
    assert run.data.tags["orchestrator.git_dirty"] == "true"
    assert run.data.tags["mlflow.user"] == row["owner"]


def test_a_name_in_use_is_refused_its_job_is_stopped_with_a_checkpoint_and_the_same_command_goes_on(
    head: Head, folder: Path
) -> None:
    spec = runs.pretraining(folder / "corpus", "long", training__steps=2000, checkpoint__every_steps=None)
    submit = ("submit", str(write(spec, folder)), "--yes")
    said = follow_until(head, submit, "starting workers\n")
    assert f"note: {folder / 'corpus'} does not travel" in said
    assert "long-1 goes on; only its log is not followed any more" in said
    refused = head.orchestrator(*submit)
    assert refused.returncode == 2
    assert "a job named long is running" in refused.stderr
    assert "orchestrator stop long" in refused.stderr
    runs.wait_until(lambda: (head.row("long")["step"] or 0) > 0, within_s=120)
    stopped = head.orchestrator("stop", "long", "--json")
    assert stopped.returncode == 0, stopped.stderr
    answer = json.loads(stopped.stdout)
    assert (answer["status"], answer["submission_id"]) == ("stopped", "long-1")
    (checkpoint,) = head.home.glob("runs/long-*/checkpoints/*")
    assert answer["checkpoint"] == str(checkpoint)
    assert head.result("long")[1].info.status == "KILLED"
    reached = int(checkpoint.name.removeprefix("step-"))
    again = head.orchestrator(*submit, "--no-follow")
    assert again.returncode == 0, again.stderr
    runs.wait_until(lambda: (head.row("long")["step"] or 0) > reached, within_s=120)
    assert len(list(head.home.glob("runs/long-*"))) == 1
    assert head.orchestrator("stop", "long").returncode == 0
    followed = head.orchestrator("logs", "long", "--follow")
    assert followed.returncode == 1
    assert "long-2 stopped at step " in followed.stderr
    assert "error: stopped at step " in followed.stdout
    runs.wait_until(lambda: head.workers() == [], within_s=30)


def follow_until(head: Head, arguments: tuple[str, ...], line: str) -> str:
    """Ctrl-C once a command has shown a line; what it says beside the log. It ends with 1, since nothing succeeded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        cwd=ROOT,
        env=head.outside(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() not in (line, ""):
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    return said


def test_a_mistake_that_only_the_cluster_knows_fails_the_command_with_the_jobs_own_words(
    head: Head, folder: Path
) -> None:
    file = write(runs.pretraining(folder / "nowhere", "absent"), folder)
    done = head.orchestrator("submit", str(file), "--yes")
    assert done.returncode == 1
    assert "not looked at" in done.stdout
    assert "absent-1 failed: " in done.stderr
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    unknown = head.orchestrator("logs", "nobody")
    assert unknown.returncode == 2
    assert "there is no such job" in unknown.stderr
