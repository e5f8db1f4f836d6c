"""Inside a worker: what one rank of a run without steps does beside its work: costs, stops, the outcome.

`few_shot` asks so, and `as_is` measures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from functools import partial

import torch.distributed as dist

from orchestrator.atomic_file import write_json
from orchestrator.checkpoints.catalog import storage_errors
from orchestrator.errors import StorageError
from orchestrator.object_store import PATIENCE_S
from orchestrator.runs.attempts import ATTEMPTS, Attempts
from orchestrator.runs.file_exchange import following
from orchestrator.runs.job import LoopState, Outcome, Progress, Status, TrainingJob, WorkerContext
from orchestrator.tracking.tracker import POINTS, MetricLog
from orchestrator.worker.budget import Account
from orchestrator.worker.consensus import ControlSignal
from orchestrator.worker.engine import device_of, forget_peak, join_process_group, peak_gib


def carried_out(kind: type[UntrainedRank], job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank to the end, its budget's end or a requested stop; rank 0's outcome is the run's."""
    context.heartbeat.enter("loading", 0)
    join_process_group(job.plan, context)
    rank = kind(job, context)
    try:
        return rank.finish(rank.run())
    finally:
        rank.close()


class UntrainedRank(ABC):
    """One rank of a run without steps."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        self._job, self._context = job, context
        self._leads = context.rank == 0
        self._account = Account(job.plan, evaluated_samples=0, started_s_ago=job.started_s_ago)
        self._account.resume(LoopState(), job.held_before)
        self._account.add_saving(0.0)  # no checkpoint is written
        self._exchange = job.exchange()
        attempts = Attempts(job.run_folder, self._exchange)
        attempts.refresh()
        self._fence = attempts.fence(job.attempt)
        self._following = ExitStack()
        sent = (POINTS,) if self._leads else ()
        self._following.enter_context(
            following(self._exchange, fetch=(ATTEMPTS,), send=sent, may_send=self._fence.holds_here)
        )
        self._notes: tuple[str, ...] = ()
        self._device = device_of(job.plan, context)
        forget_peak(self._device)
        self._log: MetricLog | None = None
        if self._leads:
            self._fence.check()
            if job.attempt:
                attempts.note_resumed(job.attempt, 0)
            self._log = MetricLog(job.run_folder, attempt=max(1, job.attempt), holds=self._fence.holds)

    @abstractmethod
    def run(self) -> Status:
        """The work, to its end, its budget's end or a requested stop."""

    @property
    @abstractmethod
    def _share(self) -> float:
        """How much of the work is done."""

    @abstractmethod
    def _figures(self) -> dict[str, float]:
        """The task's metrics, once all is done; every rank calls it."""

    @abstractmethod
    def _keep(self) -> None:
        """Keeps what was found so far, if anything, for whoever goes on."""

    def _note(self, note: str) -> None:
        """What a user should know."""
        self._notes = (*self._notes, note)

    def _wish(self) -> ControlSignal:
        """Rank 0's."""
        if self._context.stop_requested():
            return ControlSignal.STOP
        budget = self._job.spec.parsed_budget
        if budget is None or (decision := self._account.decide(budget)).go_on:
            return ControlSignal.GO_ON
        self._note(decision.reason)
        return ControlSignal.OVER_BUDGET

    def finish(self, status: Status) -> Outcome:
        """The metrics over all rows, once every one was read."""
        self._context.heartbeat.enter("saving", 0)
        peak = peak_gib(self._device)
        self._keep()
        cost, plan = self._account.cost(), self._job.plan
        metrics = {"cost/gpu_hours": cost.gpu_hours, "cost/flops": self._share * cost.flops, "cost/usd": cost.usd}
        if status == "finished":
            assert plan.gpu_hours is not None
            metrics |= self._figures()
            metrics |= {"predicted/gpu_hours": plan.gpu_hours.mid, "measured/gpu_hours": cost.gpu_hours}
            metrics |= {"predicted/peak_gib": plan.peak_gib.mid, "measured/peak_gib": peak}
        outcome = Outcome(
            status=status,
            step=0,
            steps=0,
            metrics=metrics,
            checkpoint=None,
            model_path=None,
            notes=self._notes,
        )
        if self._log is not None and status != "interrupted":
            self._log.log(0, metrics)
            self._context.report(0, metrics)
            file = self._job.outcome_file if status == "finished" else self._job.budget_stop_file
            with storage_errors(self._job.run_folder):
                write_json(file, outcome.to_dict())
            self._show(file.name)
        dist.barrier()
        return outcome

    def _tell(self, done: int, of: int) -> None:
        """Rows stand for steps: so many of them have been read."""
        if self._leads:
            self._context.progress(Progress(step=done, steps=of, phase="evaluating"))

    def _show(self, name: str) -> None:
        """What rank 0 has written into the run's folder becomes visible to other machines."""
        self._exchange.send(name, patience_s=PATIENCE_S, may_send=partial(self._fence.holds, now=True))

    def close(self) -> None:
        """Lets go of the metrics' file."""
        if self._log is not None:
            self._log.close()
        self._following.close()
        if self._leads and self._fence.holds():
            with suppress(StorageError):  # what ended the work is told, not this
                self._exchange.send(POINTS)
