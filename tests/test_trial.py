from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.quantities import Budget
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.file_exchange import CommonFolder
from orchestrator.runs.job import Outcome, TrainingJob
from orchestrator.scheduling.run_lifecycle import Prepared
from orchestrator.scheduling.search.trial import (
    Ending,
    Reports,
    TrialTask,
    ending_of,
    forget_failure,
    left_undone,
    run_to_its_end,
)
from orchestrator.search_space import Trial
from tests.end_to_end.runs import wait_until
from tests.specs import write_corpus
from tests.training_runs import NO_DROPOUT, pretrain

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
        forget_failure(trial_of(pretrain(tmp_path)), CommonFolder(tmp_path))
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


# -- attempts -------------------------------------------------------------------------------------------------------


def trial_of(job: TrainingJob) -> TrialTask:
    """A training as a trial of a search."""
    prepared = Prepared(spec=job.spec, plan=job.plan, data=job.data, run_folder=job.run_folder)
    return TrialTask(trial=Trial(index=0, overrides={}, spec=job.spec), prepared=prepared, parcels=())


def run_trial(task: TrialTask, most_bytes: int | None = None) -> None:
    """What a trial's process does, without Tune to hear its reports."""
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    warnings.filterwarnings("ignore", message="`report` is meant to only be called", category=UserWarning)
    run_to_its_end(task, Reports(task))


def started(task: TrialTask, most_bytes: int | None = None) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=run_trial, args=(task, most_bytes))
    process.start()
    return process


def written(folder: Path) -> dict[str, bytes]:
    """All files of a trial, without what nobody looks at: a checkpoint that is not complete."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): file.read_bytes() for file in files if ".writing" not in str(file)}


def test_a_trials_process_that_wakes_up_when_another_has_begun_the_trial_anew_writes_nothing(tmp_path: Path) -> None:
    changes = {"training__steps": 60, "training__eval_every_steps": 2, "checkpoint__every_steps": 3}
    task = trial_of(pretrain(tmp_path / "trial", **changes))
    old = started(task)
    try:
        wait_until(lambda: (task.folder / "reports.jsonl").exists(), within_s=200)
        os.kill(old.pid or 0, signal.SIGSTOP)
        new = started(task)
        new.join(200)
        assert new.exitcode == 0
        ending, before = ending_of(task.folder), written(task.folder)
        os.kill(old.pid or 0, signal.SIGCONT)
        old.join(60)
        assert old.exitcode == 0
    finally:
        old.kill()
    assert ending is not None
    assert (ending.status, ending.step) == ("finished", 60)
    assert Attempts(task.folder).newest() == 2
    assert written(task.folder) == before


def test_a_trial_whose_step_does_not_fit_halves_its_micro_batch_until_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)  # a Ray that an earlier test has started leaves them: they keep freed memory
    corpus = write_corpus(tmp_path / "corpus", documents=300)
    changes: dict[str, Any] = {"data__train": str(corpus), "data__sequence_length": 512, "training__steps": 2}
    changes |= {"training__global_batch": 64, "training__micro_batch": 64, "model__overrides": NO_DROPOUT}
    unlimited = pretrain(tmp_path / "unlimited", **changes)
    ending, most_bytes = ended_within(trial_of(unlimited))
    assert ending.outcome is not None, ending
    whole, attempts = ending.outcome, ["first start"]
    # How much a process can do without depends on its allocator and kernels: the first limit that is too little. Half a
    # micro-batch needs 300 MiB less.
    for less_mib in range(50, 550, 50):
        starved = pretrain(tmp_path / f"less-{less_mib}", **changes)
        ending, _ = ended_within(trial_of(starved), most_bytes - (less_mib << 20))
        records = sorted(Path(starved.run_folder).glob("attempts/000?.json"))
        attempts = [json.loads(record.read_text())["cause"] for record in records]
        if attempts != ["first start"]:
            break
    # One process keeps some of what a failed step has taken, so the first half may not fit either.
    assert attempts[:2] == ["first start", "memory ran out: micro_batch 32 instead of 64"], ending
    assert len(attempts) <= 3
    halves = ending.outcome
    assert halves is not None, ending
    assert halves.status == "finished"
    assert halves.metrics["eval/loss"] == pytest.approx(whole.metrics["eval/loss"], abs=1e-5)
    assert "micro_batch: 32 instead of 64, since memory ran out" in halves.notes[0]


def ended_within(task: TrialTask, most_bytes: int | None = None) -> tuple[Ending, int]:
    """How a trial ended whose process may map this much, and the most that it had mapped."""
    process, most = started(task, most_bytes), 0
    while process.is_alive():
        most = max(most, mapped_bytes(process))
        time.sleep(0.1)
    assert process.exitcode == 0
    ending = ending_of(task.folder)
    assert ending is not None
    return ending, most


def mapped_bytes(process: BaseProcess) -> int:
    """The most that a process has ever had mapped."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmPeak")), default=0)
