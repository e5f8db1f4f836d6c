"""What one rank tells of its training: a heartbeat on every rank; progress, metrics and reports from rank 0.

Comes in: phases, figures and notes, as the loop has them. Goes out: the marks of `heartbeat`, and on rank 0 `Progress`
for the driver, points for the run's outbox, and reports to a search. Keeps the last value of every metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orchestrator.quantities import Budget
from orchestrator.runs.heartbeat import Phase
from orchestrator.runs.job import LoopState, Progress, TrainingJob, WorkerContext
from orchestrator.tracking.tracker import MetricLog
from orchestrator.worker.budget import Account


class Reporter:
    """One rank's side of what is told, always of the step that its account stands at."""

    def __init__(self, job: TrainingJob, context: WorkerContext, account: Account) -> None:
        assert job.plan.steps is not None, "the plan has met its dataset"
        self._job, self._context, self._account, self._steps = job, context, account, job.plan.steps
        self._leads = context.rank == 0
        priced = Budget(amount=1.0, unit="usd" if job.plan.usd_per_device_hour else "gpu-hours")
        self._budget = job.spec.parsed_budget
        self._counted = self._budget or priced
        self._log: MetricLog | None = None
        self.metrics: dict[str, float] = {}
        """The last value of every metric."""
        self.notes: tuple[str, ...] = ()
        """What a user should know."""

    def open_log(self, *, resumed_from: int, holds: Callable[[], bool]) -> None:
        """From now on rank 0 logs metrics, as long as this attempt `holds` the right to write."""
        if self._leads:
            attempt = max(1, self._job.attempt)
            self._log = MetricLog(self._job.run_folder, attempt=attempt, resumed_from=resumed_from, holds=holds)

    def close(self) -> None:
        """Lets go of the log."""
        if self._log is not None:
            self._log.close()

    def take_up(self, state: LoopState) -> None:
        """Goes on from a checkpoint: what was logged beyond it does not count."""
        self.metrics = dict(state.metrics)
        if self._log is not None:
            self._log.rewind(state.step)

    def enter(self, phase: Phase) -> None:
        """Marks a phase in the heartbeat, or a new part of it."""
        self._context.heartbeat.enter(phase, self._account.step)

    def begin(self, phase: Phase) -> None:
        """Marks a phase, and tells the driver of it."""
        self.enter(phase)
        self.tell(phase)

    def tell(self, phase: str) -> None:
        """Progress to the driver, with the newest metrics."""
        if not self._leads:
            return
        step, cost = self._account.step, self._account.cost()
        self._context.progress(
            Progress(
                step=step,
                steps=self._steps,
                phase=phase,
                eta_s=self._account.pace_s * (self._steps - step),
                tokens_per_second=self.metrics.get("train/tokens_per_second", 0.0),
                metrics=dict(self.metrics),
                spent=cost.of(self._counted),
                unit=self._counted.unit,
                budget=None if self._budget is None else str(self._budget),
            )
        )

    def note(self, note: str) -> None:
        """Keeps what a user should know, once however often it is said."""
        self.notes = (*self.notes, *({note} - {*self.notes}))

    def emit(self, values: Mapping[str, float]) -> None:
        """Metrics of this step, for the log and the outcome."""
        self.metrics.update(values)
        self.log(values)

    def log(self, values: Mapping[str, float]) -> None:
        """Figures for the log alone: of how the run was done, not of what came out."""
        if self._log is not None:
            self._log.log(self._account.step, values)

    def report(self) -> None:
        """The newest metrics to a search, after an evaluation; does not return where it stops the trial."""
        if self._leads:
            self._context.report(self._account.step, dict(self.metrics))
