"""Inside one trial of a search: replay what an earlier attempt reported, train, keep in its folder how it ended.

Tune runs `trial_main` and takes a trial away by raising SystemExit out of a report. MLflow runs are not opened here:
the driver does that (`run_search`), and finds in the folder how a trial ended.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray import tune

from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.planning.run_plan import RunPlan
from orchestrator.quantities import Budget
from orchestrator.runs.attempts import Attempts, Held, unseen
from orchestrator.runs.budget_ledger import BudgetDecision, Cost, Ledger, with_ledger
from orchestrator.runs.file_exchange import exchange_at
from orchestrator.runs.job import BEST, Outcome, TrainingJob, WorkerContext, bucket_of
from orchestrator.runs.out_of_memory import is_out_of_memory, smaller_micro_batch
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.data_shipping import Parcel, unpack
from orchestrator.scheduling.failures import WorkerError
from orchestrator.scheduling.run_folder import ledger_folder
from orchestrator.scheduling.run_lifecycle import Prepared
from orchestrator.scheduling.run_training import attempt_in_words, run_training
from orchestrator.search_space import Trial
from orchestrator.tracking.tracker import note_attempt

STEP = "training_step"
"""Name of the optimizer step in what Tune is told."""

_NAMED = 8
"""So many trials are named in a note; their number is said."""

_UNWIND_S = "60"
"""How long a training that was taken away may take to end. Tune's own limit before it reuses a process, 2 s, is not
enough to ship the last metrics, and Tune fails the next trial when it is over."""


_taken_away = threading.Event()
"""Set in a trial's process when Tune ends it: training stops at its next step."""
_at_rest = threading.Event()
"""Set while no training is under way in this process."""
_at_rest.set()


class EndsWithItsWorkers:
    """Mixed into Tune's trainable: a trial's process does not go before its training has let go of its resources.

    Where Ray runs without its dashboard, nobody else gives back what the workers of a killed trial held.
    """

    def cleanup(self) -> None:
        """Called by Tune when it ends the process."""
        _taken_away.set()
        super().cleanup()  # type: ignore[misc]  # wakes the training where it waits in a report
        _at_rest.wait(float(_UNWIND_S))


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What one trial needs, wherever Tune places it."""

    trial: Trial
    prepared: Prepared
    parcels: tuple[Parcel, ...]
    rungs: tuple[int, ...] = ()
    """Steps at which it is evaluated and compared with others, and may be stopped."""

    @property
    def folder(self) -> Path:
        """The trial's run folder."""
        return self.prepared.run_folder

    @property
    def ledger(self) -> Path:
        """The ledger of the search, on whose budget the trial runs."""
        return ledger_folder(self.folder.parent.parent)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ended; kept in its folder."""

    status: Literal["finished", "stopped_by_budget", "pruned", "failed"]
    step: int
    outcome: Outcome | None = None
    """Of a trial that came to its end or its budget's."""
    error: str | None = None
    """Of a failed one."""

    def write(self, folder: Path) -> None:
        """Keeps it."""
        write_json(_ending_file(folder), asdict(self))


def _ending_file(folder: Path) -> Path:
    return folder / "ending.json"


def ending_of(folder: Path) -> Ending | None:
    """How the trial of a folder ended, None while it has not."""
    value = read_json(_ending_file(folder))
    if value is None:
        return None
    if value["outcome"] is not None:
        value["outcome"] = Outcome.from_dict(value["outcome"])
    return Ending(**value)


def forget_failure(folder: Path) -> None:
    """A failed trial is tried again by the next command."""
    ending = ending_of(folder)
    if ending is not None and ending.status == "failed":
        _ending_file(folder).unlink()


class SharedBudget:
    """The budget of a search on its driver's side: lets trials begin, or go on, while there is enough for them."""

    def __init__(self, budget: Budget | None, ledger: Path) -> None:
        self._budget, self._ledger = budget, Ledger(ledger)

    def open(self) -> None:
        """The search begins or goes on, and none of its trials runs."""
        if self._budget is not None:
            self._ledger.settle_dead()
            self._ledger.start_clock()

    def tick(self) -> None:
        """The search still runs."""
        if self._budget is not None:
            self._ledger.tick()

    def admit(self, task: TrialTask) -> BudgetDecision:
        """Lets a trial begin, or go on where a smaller budget had stopped it, if it can come to something."""
        decision = BudgetDecision(go_on=True, reason="")
        if self._budget is not None:
            first_step = Cost(flops=task.prepared.plan.flops_per_step)
            decision = self._ledger.admit(self._budget, task.trial.name, first_step=first_step)
        if decision.go_on:
            _ending_file(task.folder).unlink(missing_ok=True)
        return decision


def left_undone(budget: Budget | None, endings: Mapping[str, Ending | None]) -> str | None:
    """What the budget kept the trials of a search from, in one sentence; None when that is nothing. Pure."""
    waiting = [name for name, ending in endings.items() if ending is None]
    stopped = [
        f"{name} at step {ending.step} of {ending.outcome.steps}"
        for name, ending in endings.items()
        if ending is not None and ending.status == "stopped_by_budget" and ending.outcome is not None
    ]
    if budget is None or not waiting + stopped:
        return None
    parts = []
    if stopped:
        parts.append(f"{len(stopped)} of {len(endings)} trials stopped before their end ({_some(stopped)})")
    if waiting:
        parts.append(f"{len(waiting)} of {len(endings)} trials not started ({_some(waiting)})")
    return f"budget {budget} is spent: {', '.join(parts)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def trial_main(config: dict[str, Any], *, tasks: list[TrialTask]) -> None:
    """What Tune runs for one point. Failures are kept, not raised: Tune tries again whatever a trial raises, and only
    the death of its process is worth that. Raises StorageError where they could not be kept."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = _UNWIND_S
    _taken_away.clear()
    task = tasks[config["trial"]]
    if not task.folder.is_dir():  # the driver has made it
        raise unseen(task.folder)
    reports = Reports(task)
    reports.replay()
    if ending_of(task.folder) is None and _may_begin(task):
        _at_rest.clear()
        try:
            run_to_its_end(task, reports)
        finally:
            _at_rest.set()
    reports.release()


trial_main.__mixins__ = (EndsWithItsWorkers,)  # type: ignore[attr-defined]  # read by Tune


def _may_begin(task: TrialTask) -> bool:
    return task.prepared.spec.budget is None or Ledger(task.ledger).is_running(task.trial.name)


class _Claim:
    """This process's right to say what becomes of a trial, which it has until another process begins the trial anew."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._attempts = folder, Attempts(folder)
        self._number, self._is_ours = self._attempts.newest(), False
        self._fence = self._attempts.fence(self._number)

    def open(self, plan: RunPlan, *, cause: str | None = None) -> int:
        """A new attempt's number; `cause` is what ended the one before. Raises FencedError when another process was
        faster."""
        cause = cause or self._attempts.cause_of_start()
        self.close()
        number = self._attempts.open(workers=plan.workers, cause=cause, after=self._number)
        self.begun(number, attempt_in_words(plan, cause))
        return number

    def begun(self, number: int, text: str) -> None:
        """An attempt of this process has begun, or ended, which `text` tells."""
        self._number, self._fence, self._is_ours = number, self._attempts.fence(number), True
        note_attempt(self._folder, number, text)

    def close(self) -> None:
        """The attempt of this process is over, if it has begun one."""
        if self._number and self._is_ours:
            self._attempts.close(self._number)

    def held(self) -> Held:
        """How long the trial's attempts before had their devices."""
        return self._attempts.held()

    def holds(self) -> bool:
        """Whether no other process has begun the trial anew."""
        return self._fence.holds(now=True)

    def check(self) -> None:
        """Raises FencedError when one has."""
        self._fence.check()


def run_to_its_end(task: TrialTask, reports: Reports) -> None:
    """Trains in a new attempt and keeps how it ended.

    Raises SystemExit when the trial was taken away, and when another process has begun it anew: then nothing that this
    one could still tell is true of it.
    """
    claim = _Claim(task.folder)
    try:
        ending = _trained(task, reports, claim)
    finally:
        if claim.holds():
            claim.close()
            Ledger(task.ledger).settle(task.trial.name, task.prepared.plan, flops=reports.flops)
    if not claim.holds():
        sys.exit()
    ending.write(task.folder)
    if ending.status == "finished":
        forget_best(task)


def forget_best(task: TrialTask) -> None:
    """The weights of a trial's best evaluation are not needed any more; they lie in its folder alone."""
    shutil.rmtree(task.folder / BEST, ignore_errors=True)


def _trained(task: TrialTask, reports: Reports, claim: _Claim) -> Ending:
    try:
        outcome = _train(task, reports, claim)
        claim.check()
        outcome = _without_checkpoint(task, outcome)
    except OrchestratorError as error:
        return Ending(status="failed", step=reports.last_step, error=str(error))
    except Exception as error:
        found = WorkerError.of(error)
        text = f"{found.kind}: {found.text}\n  raised at {found.last_lines}"
        return Ending(status="failed", step=reports.last_step, error=text)
    if outcome.status == "interrupted":
        sys.exit()
    return Ending(
        status="finished" if outcome.status == "finished" else "stopped_by_budget", step=outcome.step, outcome=outcome
    )


def _train(task: TrialTask, reports: Reports, claim: _Claim) -> Outcome:
    plan, spec = task.prepared.plan, task.prepared.spec
    for parcel in task.parcels:
        unpack(parcel)
    job = TrainingJob(
        spec=with_ledger(spec, task.ledger, member=task.trial.name, rungs=task.rungs),
        plan=plan,
        data=task.prepared.data,
        run_folder=task.folder,
        rungs=task.rungs,
        final_checkpoint=spec.checkpoint.every_steps is not None or spec.budget is not None,
    )

    def report(step: int, metrics: Mapping[str, float]) -> None:
        claim.check()
        reports.add(step, metrics)

    if plan.workers > 1:
        return _train_on_workers(job, report, claim)
    return _train_here(job, WorkerContext(report=report, stop_requested=_taken_away.is_set), claim)


def _train_here(job: TrainingJob, context: WorkerContext, claim: _Claim) -> Outcome:
    """In this process, with half the micro-batch when memory runs out. What it takes to load counts as its start."""
    job = replace(job, started_s=time.time(), held_before=claim.held())
    from orchestrator.worker.loop import train

    cause: str | None = None
    notes: tuple[str, ...] = ()
    while True:
        attempt = claim.open(job.plan, cause=cause)
        try:
            outcome = train(replace(job, attempt=attempt), context)
            return replace(outcome, notes=(*notes, *outcome.notes))
        except Exception as error:
            smaller = smaller_micro_batch(job.plan) if is_out_of_memory(error) else None
            if smaller is None:
                raise
        cause = f"memory ran out: micro_batch {smaller.micro_batch} instead of {job.plan.micro_batch}"
        job = replace(job, plan=smaller, started_s=time.time(), held_before=claim.held())
        notes = (*notes, smaller.reasons[-1])
        gc.collect()  # DeepSpeed's engine holds on to itself, and its states would be in the way


def _without_checkpoint(task: TrialTask, outcome: Outcome) -> Outcome:
    """A trial that the budget stops leaves a checkpoint to go on from; one that is over needs only its model."""
    if outcome.status != "finished" or task.prepared.spec.checkpoint.every_steps is not None:
        return outcome
    shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
    with suppress(StorageError):  # it stays there, and the trial has come to its end all the same
        exchange_at(task.folder, bucket_of(task.prepared.spec, task.folder)).forget()
    return replace(outcome, checkpoint=None)


def _train_on_workers(job: TrainingJob, report: Callable[[int, Mapping[str, float]], None], claim: _Claim) -> Outcome:
    """Ray Train inside the trial; when Tune takes the trial away, its workers end first."""

    def report_until_taken_away(step: int, metrics: Mapping[str, float]) -> None:
        if not _taken_away.is_set():
            try:
                report(step, metrics)
            except SystemExit:
                _taken_away.set()

    watcher = Watcher(on_report=report_until_taken_away, on_attempt=claim.begun, stop=_taken_away)
    try:
        return run_training(job, watcher).outcome
    finally:
        if _taken_away.is_set():
            sys.exit()


class Reports:
    """A trial's evaluations: in its folder, and to Tune."""

    def __init__(self, task: TrialTask) -> None:
        self._file = task.folder / "reports.jsonl"
        self._final_step = task.prepared.plan.steps
        self._held: dict[str, Any] | None = None
        whole, _, torn = self._file.read_text().rpartition("\n") if self._file.is_file() else ("", "", "")
        if torn:  # a process died while it wrote this line
            self._file.write_text(f"{whole}\n" if whole else "")
        self._earlier = [json.loads(line) for line in whole.splitlines()]
        self.last_step = max((item["step"] for item in self._earlier), default=0)
        self.flops = 0.0
        """What the trial had computed in all at the newest evaluation of this attempt."""

    def replay(self) -> None:
        """Tells Tune what an earlier attempt reported."""
        for item in self._earlier:
            self._tell(item["step"], item["metrics"])

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps and reports an evaluation."""
        self.flops = metrics.get("cost/flops", 0.0)
        if step <= self.last_step:
            return
        self.last_step = step
        with self._file.open("a") as stream:
            stream.write(json.dumps({"step": step, "metrics": dict(metrics)}) + "\n")
        self._tell(step, metrics)

    def release(self) -> None:
        """Reports the last evaluation; Tune may stop the trial on it, which has nothing left to lose."""
        if self._held is not None:
            tune.report(self._held)

    def _tell(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tune may take the trial away on any report, so the last one waits until the model is written."""
        report = {**metrics, STEP: step}
        if step == self._final_step:
            self._held = report
        else:
            tune.report(report)
