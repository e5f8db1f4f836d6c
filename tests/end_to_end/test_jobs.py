"""The jobs as a user submits them: `ray job submit --working-dir .` against a head of our own."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.spec import RunSpec
from tests import specs
from tests.end_to_end import runs
from tests.ray_head import ROOT, Head, ray_head

pytestmark = pytest.mark.slow

UPLOAD_LIMIT_BYTES = 4_000_000
"""What travels is source, configs and the sample data: 3.3 MB."""


SLOW: dict[str, Any] = {
    "training__steps": 2000,
    "training__global_batch": 128,
    "training__micro_batch": 1,
    "checkpoint__every_steps": None,
}
"""A training that is there to be stopped: 64 passes a step, so that on fast machines it is not over before, and has not
logged more by then than a stop's last seconds can tell MLflow."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("job-home"), tmp_path_factory.mktemp("laptop")) as head:
        yield head


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


def printed(begins: str) -> list[str]:
    """Commands of the README's chapter about jobs, as they stand there."""
    chapter = (ROOT / "README.md").read_text(encoding="utf-8").partition("### From a laptop to a cluster\n")[2]
    lines = chapter.partition("\n###")[0].splitlines()
    found = [line.strip().removeprefix("$ ") for line in lines if line.startswith("    ")]
    return [line for line in found if line.startswith(begins)]


SHORTER = {
    "jobs.pretrain": "training.tokens=null training.steps=4",
    "jobs.finetune": "training.epochs=null training.steps=4 data.max_train_examples=64 data.max_validation_examples=32",
    "jobs.tune": "data.max_train_examples=64 data.max_validation_examples=32",
    "jobs.evaluate": "data.max_validation_examples=64",
}
"""Put behind a printed command, so that it does the same on less data."""


def typed(head: Head, module: str) -> str:
    """What the printed job of a module says, which succeeds."""
    (line,) = (line for line in printed("ray job submit") if f" {module} " in line)
    done = head.typed(f"{line} {SHORTER[module]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    return done.stdout


def test_no_printed_job_is_left_out() -> None:
    assert [line.partition(" -m ")[2].split()[0] for line in printed("ray job submit")] == list(SHORTER)


def test_the_printed_pretraining_leaves_its_results_outside_the_jobs_working_dir(head: Head) -> None:
    typed(head, "jobs.pretrain")
    run_folder, run = head.result("gpt-stdlib")
    assert run.info.status == "FINISHED"
    assert (run_folder / "model" / "model.safetensors").is_file()
    session = (head.temp / "session_latest").resolve()  # a link beside the session itself: neither is counted twice
    uploads = list(session.glob("runtime_resources/working_dir_files/*"))
    files = [file for upload in uploads for file in upload.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files if "__pycache__" not in file.parts)  # the job has run here
    assert 0 < size < UPLOAD_LIMIT_BYTES


def test_the_printed_finetuning_finds_base_and_data_on_the_node(head: Head) -> None:
    typed(head, "jobs.finetune")
    assert head.result("reviews")[1].data.params["training.steps"] == "4"


def test_the_printed_search_leaves_the_model_that_the_printed_evaluation_measures(head: Head) -> None:
    said = typed(head, "jobs.tune")
    assert head.result("reviews-search")[1].info.status == "FINISHED"
    assert re.search(r"^trials 5/5  spent [0-9.e-]+usd$", said, re.MULTILINE), "what `jobs` reads"
    assert "measured on 64 rows" in typed(head, "jobs.evaluate")


def test_the_printed_submission_is_followed_listed_and_its_log_read_again(head: Head) -> None:
    submit, jobs, _ = printed("orchestrator ")[-3:]
    done = head.typed(submit)
    assert done.returncode == 0, done.stderr
    (resume,) = re.findall(r"resume:\s+(.*)", done.stdout + done.stderr)
    assert submit == f"{resume} --yes"
    listed = head.typed(jobs).stdout
    assert re.search(r"^demo-b +demo-b-1 +\S+ +succeeded +60/60 ", listed, re.MULTILINE)
    (logs,) = (line.partition("   ")[0] for line in printed("orchestrator logs"))
    again = head.typed(logs.replace("NAME", "demo-b"))
    assert again.returncode == 0
    assert "step 60/60" in again.stdout


def test_a_mistake_ends_the_job_with_our_message_and_no_traceback(head: Head, folder: Path) -> None:
    spec = write(runs.pretraining(folder / "corpus", "job-mistake"), folder)
    done = head.submit("jobs.pretrain", spec, "training.lr=1")
    shown = done.stdout + done.stderr
    assert done.returncode == 1
    assert "unknown key training.lr" in shown
    assert "exit code 2" in shown
    assert "Traceback" not in shown


def test_a_stopped_job_ends_in_a_checkpoint_and_goes_on_when_submitted_again(head: Head, folder: Path) -> None:
    spec = runs.pretraining(folder / "corpus", "job-stop", **SLOW)
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
    assert 20 <= int(checkpoint.name.removeprefix("step-")) < SLOW["training__steps"]
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
    head: Head,
) -> None:
    """The printed commands, but for the length of the training and an option."""
    printed_submit, _, stop = printed("orchestrator ")[-3:]
    submit = printed_submit.replace("steps=60", "steps=4000").replace("demo-b", "demo-c")
    said = follow_until(head, tuple(shlex.split(submit)[1:]), "starting workers\n")
    assert "demo-c-1 goes on; only its log is not followed any more" in said
    refused = head.typed(submit)
    assert refused.returncode == 2
    assert "a job named demo-c is running" in refused.stderr
    assert stop in refused.stderr
    runs.wait_until(lambda: (head.row("demo-c")["step"] or 0) > 0, within_s=120)
    stopped = head.typed(f"{stop} --json")
    assert stopped.returncode == 0, stopped.stderr
    answer = json.loads(stopped.stdout)
    assert (answer["status"], answer["submission_id"]) == ("stopped", "demo-c-1")
    newest = max(head.home.glob("runs/demo-c-*/checkpoints/*"))
    assert answer["checkpoint"] == str(newest)
    assert head.result("demo-c")[1].info.status == "KILLED"
    reached = int(newest.name.removeprefix("step-"))
    again = head.typed(f"{submit} --no-follow")
    assert again.returncode == 0, again.stderr
    runs.wait_until(lambda: (head.row("demo-c")["step"] or 0) > reached, within_s=120)
    assert len(list(head.home.glob("runs/demo-c-*"))) == 1
    told = head.typed(stop)
    assert told.returncode == 0
    assert re.search(r"^demo-c-2 stopped at step \d+ of 4000, with a checkpoint$", told.stdout, re.MULTILINE)
    followed = head.typed("orchestrator logs demo-c --follow")
    assert followed.returncode == 1
    assert "demo-c-2 stopped at step " in followed.stderr
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
    _, said = process.communicate(timeout=180)
    assert process.returncode == 1
    return said


def test_a_mistake_that_only_the_cluster_knows_fails_the_command_with_the_jobs_own_words(
    head: Head, folder: Path
) -> None:
    file = write(runs.pretraining(folder / "nowhere", "absent"), folder)
    done = head.orchestrator("submit", str(file), "--yes")
    assert done.returncode == 1
    assert "not looked at" in done.stdout
    assert f"note: {folder / 'nowhere'} does not travel" in done.stderr
    assert "absent-1 failed: " in done.stderr
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    unknown = head.orchestrator("logs", "nobody")
    assert unknown.returncode == 2
    assert "there is no such job" in unknown.stderr
