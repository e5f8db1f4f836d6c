"""Inside one trial of a search: replay what an earlier attempt reported, train, keep in its folder how it ended.

Tune runs `trial_main` and takes a trial away by raising SystemExit out of a report. MLflow runs are not opened here:
the driver does that (`run_search`), and finds in the folder how a trial ended. Where machines see no common folder,
that is the driver's copy of it: what is written here is sent before Tune hears of it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ray import tune

from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.run_plan import RunPlan
from orchestrator.quantities import Budget
from orchestrator.runs.attempts import ATTEMPTS, Attempts, Held, unseen
from orchestrator.runs.budget_ledger import BudgetDecision, Cost, Ledger, open_ledger, with_ledger
from orchestrator.runs.file_exchange import Exchange, exchange_at, following, renew
from orchestrator.runs.job import (
    BEST,
    CHECKPOINTS,
    ENDING,
    REPORTS,
    TRIALS,
    Outcome,
    TrainingJob,
    WorkerContext,
    bucket_of,
)
from orchestrator.runs.out_of_memory import is_out_of_memory, smaller_micro_batch
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.data_shipping import Parcel, unpack
from orchestrator.scheduling.failures import WorkerError
from orchestrator.scheduling.run_folder import ledger_folder
from orchestrator.scheduling.run_lifecycle import Prepared
from orchestrator.scheduling.run_training import attempt_in_words, run_training
from orchestrator.search_space import Trial
from orchestrator.tracking.run_record import now_ms
from orchestrator.tracking.tracker import POINTS

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
    life: str = ""
    """Which life of the search it belongs to (`TrainingJob.life`)."""

    @property
    def folder(self) -> Path:
        """The trial's run folder."""
        return self.prepared.run_folder

    def part(self, name: str) -> str:
        """What the search's folder calls a file or folder of the trial's."""
        return f"{TRIALS}/{self.trial.name}/{name}"

    @property
    def exchanged_at(self) -> str | None:
        """Where in a bucket the trial's folder is exchanged; None where every node sees it."""
        return bucket_of(self.prepared.spec, self.folder)

    @property
    def ledger(self) -> Path:
        """The ledger of the search, on whose budget the trial runs."""
        return ledger_folder(self.folder.parent.parent)

    @property
    def ledger_at(self) -> str | None:
        """Where in a bucket that is kept; None where every node sees it."""
        return bucket_of(self.prepared.spec, self.folder.parent.parent)

    def open_ledger(self) -> Ledger:
        """The ledger. Raises StorageError when its bucket cannot be opened."""
        return open_ledger(self.ledger, self.ledger_at)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial ended; kept in its folder."""

    status: Literal["finished", "stopped_by_budget", "pruned", "failed"]
    step: int
    outcome: Outcome | None = None
    """Of a trial that came to its end or its budget's."""
    error: str | None = None
    """Of a failed one."""
    at_ms: int | None = field(default=None, compare=False)
    """When it was kept, in milliseconds since 1970: whichever drivers tell MLflow of it, say the same."""

    def write(self, folder: Path) -> None:
        """Keeps it."""
        write_json(_ending_file(folder), asdict(replace(self, at_ms=now_ms())))


def _ending_file(folder: Path) -> Path:
    return folder / ENDING


def ending_of(folder: Path) -> Ending | None:
    """How the trial of a folder ended; None while it has not, also where an ending was taken back (`reopen`)."""
    value = read_json(_ending_file(folder))
    if value is None:
        return None
    if value["outcome"] is not None:
        value["outcome"] = Outcome.from_dict(value["outcome"])
    return Ending(**value)


def reopen(task: TrialTask, exchange: Exchange) -> None:
    """The driver lets a trial go on that had ended. Its ending is replaced, not removed: machines with a copy of it
    look for newer ones."""
    if ending_of(task.folder) is not None:
        write_json(_ending_file(task.folder), None)
        exchange.send(task.part(ENDING), patience_s=PATIENCE_S)


def forget_failure(task: TrialTask, exchange: Exchange) -> None:
    """A failed trial is tried again by the next command. `exchange` is the search's."""
    ending = ending_of(task.folder)
    if ending is not None and ending.status == "failed":
        reopen(task, exchange)


class SharedBudget:
    """The budget of a search on its driver's side: lets trials begin, or go on, while there is enough for them."""

    def __init__(self, budget: Budget | None, ledger: Ledger) -> None:
        self._budget, self._ledger = budget, ledger

    def open(self) -> None:
        """The search begins or goes on, and none of its trials runs."""
        if self._budget is not None:
            self._ledger.settle_dead()
            self._ledger.start_clock()

    def tick(self) -> None:
        """The search still runs."""
        if self._budget is not None:
            self._ledger.tick()

    def spent(self) -> float | None:
        """What all trials have spent, in the budget's unit; None without a budget."""
        return None if self._budget is None else self._ledger.spent(self._budget)

    def admit(self, task: TrialTask) -> BudgetDecision:
        """Lets a trial begin, or go on where a smaller budget had stopped it, if it can come to something."""
        if self._budget is None:
            return BudgetDecision(go_on=True, reason="")
        first_step = Cost(flops=task.prepared.plan.flops_per_step)
        return self._ledger.admit(self._budget, task.trial.name, first_step=first_step)


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
    _arrive(task)
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


def _arrive(task: TrialTask) -> None:
    """The trial's folder as it is by now, on whatever machine this is. Raises StorageError where it cannot be seen."""
    if task.exchanged_at is not None:
        renew(task.folder, task.life)
        exchange_at(task.folder, task.exchanged_at).fetch(ENDING, REPORTS, patience_s=PATIENCE_S)
    elif not task.folder.is_dir():  # the driver has made it
        raise unseen(task.folder)


def _may_begin(task: TrialTask) -> bool:
    return task.prepared.spec.budget is None or task.open_ledger().is_running(task.trial.name)


class _Claim:
    """This process's right to say what becomes of a trial, which it has until another process begins the trial anew."""

    def __init__(self, folder: Path, exchange: Exchange) -> None:
        self._attempts = Attempts(folder, exchange)
        self._attempts.refresh()
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
        self._attempts.tell(number, text)

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

    def held_lately(self) -> bool:
        """The same as far as this machine knows by itself."""
        return self._fence.holds_here()

    def check(self) -> None:
        """Raises FencedError when one has."""
        self._fence.check()


def run_to_its_end(task: TrialTask, reports: Reports) -> None:
    """Trains in a new attempt and keeps how it ended.

    Raises SystemExit when the trial was taken away, and when another process has begun it anew: then nothing that this
    one could still tell is true of it.
    """
    exchange = reports.exchange
    claim = _Claim(task.folder, exchange)
    try:
        with following(exchange, fetch=(ATTEMPTS,), send=(REPORTS,), may_send=claim.held_lately):
            ending = _trained(task, reports, claim)
    finally:
        if claim.holds():
            claim.close()
            task.open_ledger().settle(task.trial.name, task.prepared.plan, flops=reports.flops)
    if not claim.holds():
        sys.exit()
    ending.write(task.folder)
    # A new exchange sends the reports in any case: with those of a checkpoint an older copy may have come last.
    exchange_at(task.folder, task.exchanged_at).send(REPORTS, ENDING, patience_s=PATIENCE_S, may_send=claim.holds)
    if ending.status == "finished":
        with suppress(StorageError):  # the trial has ended all the same
            exchange.remove(BEST)  # not needed any more


def _trained(task: TrialTask, reports: Reports, claim: _Claim) -> Ending:
    try:
        outcome = _train(task, reports, claim)
        claim.check()
        outcome = _without_checkpoint(task, outcome, reports.exchange)
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
        spec=with_ledger(spec, task.ledger, member=task.trial.name, rungs=task.rungs, ledger_at=task.ledger_at),
        plan=plan,
        data=task.prepared.data,
        run_folder=task.folder,
        rungs=task.rungs,
        final_checkpoint=spec.checkpoint.every_steps is not None or spec.budget is not None,
        exchanged_at=task.exchanged_at,
        life=task.life,
    )

    def report(step: int, metrics: Mapping[str, float]) -> None:
        claim.check()
        reports.add(step, metrics, may_send=claim.holds)

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


def _without_checkpoint(task: TrialTask, outcome: Outcome, exchange: Exchange) -> Outcome:
    """A trial that the budget stops leaves a checkpoint to go on from; one that is over needs only its model."""
    if outcome.status != "finished" or task.prepared.spec.checkpoint.every_steps is not None:
        return outcome
    with suppress(StorageError):  # it stays there, and the trial has come to its end all the same
        exchange.remove(CHECKPOINTS)
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
        """Raises StorageError when the trial's bucket cannot be opened."""
        self.exchange = exchange_at(task.folder, task.exchanged_at)
        """How others see what is written here."""
        self._file = task.folder / REPORTS
        self._final_step = task.prepared.plan.steps
        self._held: dict[str, Any] | None = None
        whole, torn = _whole_lines(self._file)
        if torn:  # a process died while it wrote this line
            self._file.write_text(f"{whole}\n" if whole else "")
        self._earlier = [json.loads(line) for line in whole.splitlines()]
        self.last_step = _last_step(self._earlier)
        self.flops = 0.0
        """What the trial had computed in all at the newest evaluation of this attempt."""

    def replay(self) -> None:
        """Tells Tune what an earlier attempt reported."""
        for item in self._earlier:
            self._tell(item["step"], item["metrics"])

    def add(self, step: int, metrics: Mapping[str, float], *, may_send: Callable[[], bool] = lambda: True) -> None:
        """Keeps and reports an evaluation; with it the points up to here, since Tune may take the trial away on it.
        `may_send` as of `Exchange.send`: the process may have been stopped since it was asked last."""
        self.flops = metrics.get("cost/flops", 0.0)
        if step <= self.last_step:
            return
        self.last_step = step
        with self._file.open("a") as stream:
            stream.write(json.dumps({"step": step, "metrics": dict(metrics)}) + "\n")
        with suppress(StorageError):  # else later: before a checkpoint behind it, and before the ending
            self.exchange.send(REPORTS, POINTS, may_send=may_send)
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


def last_reported_step(folder: Path) -> int:
    """Step of the newest evaluation of the trial of a folder; 0 before the first."""
    return _last_step([json.loads(line) for line in _whole_lines(folder / REPORTS)[0].splitlines()])


def _whole_lines(file: Path) -> tuple[str, str]:
    """The lines of a file, and what is left of one that was not written to its end."""
    whole, _, torn = file.read_text().rpartition("\n") if file.is_file() else ("", "", "")
    return whole, torn


def _last_step(reports: Sequence[Mapping[str, Any]]) -> int:
    return max((item["step"] for item in reports), default=0)
