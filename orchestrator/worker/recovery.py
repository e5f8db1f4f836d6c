"""Per-rank checkpoint manager: restore, rollback, checkpoint schedule, and the fence that grants the right to write.

The loop says when; this decides what to load, when the next checkpoint is due, and what is recorded on disk. All ranks
call each method at the same step unless it says otherwise.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.atomic_file import damaged, write_json
from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.async_writer import Saver, Writer
from orchestrator.checkpoints.catalog import Checkpoint
from orchestrator.checkpoints.reshard import has_shape
from orchestrator.checkpoints.save_cost import SaveCost
from orchestrator.checkpoints.storage import open_storage
from orchestrator.errors import StorageError, TransientError
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.checkpoint_interval import FIRST_INTERVAL_STEPS, interval_steps
from orchestrator.runs.attempts import ATTEMPTS, Attempts
from orchestrator.runs.budget_ledger import LEDGER
from orchestrator.runs.file_exchange import following
from orchestrator.runs.job import BEST, REPORTS, LoopState, TrainingJob, WorkerContext, best_file
from orchestrator.samples.batches import batch_number
from orchestrator.tracking.tracker import POINTS
from orchestrator.worker.divergence_guard import Rewind, Verdict, decide_rewind, diverged, skipped_batches
from orchestrator.worker.engine import Engine, needed_by

INTERVAL_METRIC, COST_METRIC = "checkpoint/interval_steps", "checkpoint/lost_s"
"""Under `every_steps: auto`: steps to the next checkpoint, and seconds of training that one costs."""
_REWINDS = "rewinds.json"
_BY_LEADER = (POINTS, LEDGER)
"""What rank 0 writes in a run's folder all the time."""
_RESTART_S = 20.0
"""From a death to the first new step: 18 to 19 s on two cores (measured); it only enters the stated overhead."""

Agree = Callable[[Any], Any]
"""Gives rank 0's value to every rank."""


class RecoveryManager:
    """One rank's share of keeping a run, within one attempt."""

    def __init__(
        self,
        engine: Engine,
        job: TrainingJob,
        context: WorkerContext,
        *,
        agree: Agree,
        any_rank: Callable[[bool], bool],
    ) -> None:
        """`any_rank` says whether something holds on at least one rank."""
        self._engine, self._job, self._rank, self._nodes, self._agree = engine, job, context.rank, context.nodes, agree
        self._any_rank = any_rank
        self._exchange = job.exchange()
        self._attempts = Attempts(job.run_folder, self._exchange)
        self._fence = self._attempts.fence(job.attempt)
        self._scratch = tempfile.TemporaryDirectory(prefix="checkpoints-")
        self._storage = open_storage(job.checkpoints, scratch=Path(self._scratch.name))
        self._saver = self._new_saver()
        self._loaded: str | None = None
        self._saved_step = 0
        self._interval: int | None = None
        self._cost = SaveCost()
        self._rewinds_file = job.run_folder / _REWINDS
        self._rewinds: tuple[Rewind, ...] = ()
        self._attempts.refresh()
        self._following = ExitStack()
        sent = _BY_LEADER if self._leads else ()
        self._following.enter_context(
            following(self._exchange, fetch=(ATTEMPTS,), send=sent, may_send=self._fence.holds_here)
        )
        if self._leads:
            self._exchange.fetch(_REWINDS, LEDGER, BEST, job.budget_stop_file.name, patience_s=PATIENCE_S)
        self.notes: tuple[str, ...] = ()
        """What a user should know."""

    @property
    def skipped(self) -> tuple[int, ...]:
        """Numbers of the global batches that are left out."""
        return skipped_batches(self._rewinds)

    def attach(self, engine: Engine) -> None:
        """From now on this engine's state is kept, not that of the one before."""
        self._saver.close()
        self._engine = engine
        self._saver = self._new_saver()

    def _new_saver(self) -> Saver:
        plan = self._job.plan
        return Saver(
            self._engine,
            self._storage,
            writer=Writer(
                rank=self._rank, world_size=plan.workers, zero_stage=plan.zero_stage, attempt=self._job.attempt
            ),
            keep=self._job.spec.checkpoint.newest_kept,
            holds=self.still_holds,
            before_publishing=self._show_what_it_needs,
        )

    def _show_what_it_needs(self, state: LoopState) -> None:
        """A run that goes on from a checkpoint looks for its curves, for the weights of its best evaluation and, as a
        trial, for what its search was told."""
        best = [] if state.best_step is None else [best_file(state.best_step)]
        self._exchange.send(POINTS, REPORTS, *best, patience_s=PATIENCE_S, may_send=self.still_holds)

    # -- going on and going back -------------------------------------------------------------------------------

    def restore(self) -> LoopState:
        """Loads the newest good checkpoint; the state of a run that begins where there is none.

        Raises StorageError when there are checkpoints and none can be read.
        """
        self._rewinds = self._agree(self._read_rewinds() if self._leads else None)
        state = self._load_newest()
        if state is None and self.notes:
            raise StorageError(
                "no checkpoint of this run can be read",
                got="; ".join(self.notes),
                do="make one readable again, or start over with --fresh",
            )
        state = state or LoopState()
        if self._leads and self._job.attempt:  # only now: it makes later checkpoints of earlier attempts void
            self._attempts.note_resumed(self._job.attempt, state.step)
        return state

    def rewind(self, verdict: Verdict, step: int, samples_of: Callable[[int], list[int]]) -> LoopState | None:
        """Undoes everything since the checkpoint before a bad step and leaves out the batches that may be to blame.

        `samples_of` gives the samples of a batch. None means back to the start: the engine must be built anew.
        Raises DivergedError when going back has not helped.
        """
        self._saver.wait()
        good = self._agree(self._good_steps() if self._leads else None)
        most = self._job.spec.training.bad_steps.max_rewinds
        decision = decide_rewind(verdict, step, earlier=self._rewinds, checkpoints=good, max_rewinds=most)
        if not decision.rewind:
            raise diverged(verdict, step, decision=decision, earlier=self._rewinds, precision=self._job.plan.precision)
        batches = tuple(batch_number(each, self.skipped) for each in range(verdict.first_step, step + 1))
        rewind = Rewind(
            step=step,
            first_step=verdict.first_step,
            to_step=decision.to_step,
            skipped=batches,
            samples=tuple(number for batch in batches for number in samples_of(batch)),
            reason=verdict.reason,
        )
        self._rewinds = (*self._rewinds, rewind)
        self.notes = (*self.notes, f"step {step + 1}: {verdict.reason}; {decision.reason}")
        if self._leads:
            catalog.discard_newer(self._storage, decision.to_step)
            self._write_rewinds()
        return self._load_newest()

    # -- saving ------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after `step` steps."""
        every = self._job.spec.checkpoint.every_steps
        if every is None or step == 0:
            return False
        if every != "auto":
            return step % every == 0
        return step >= self._saved_step + (self._interval or FIRST_INTERVAL_STEPS)

    def add_step(self, seconds: float) -> None:
        """A step was taken; what it took beside a write is what the write cost."""
        self._cost.add_step(seconds, is_writing=self._saver.is_writing())

    def save(self, state: LoopState, *, step_s: float) -> Mapping[str, float]:
        """Copies the state of a step that is not kept yet; it becomes a checkpoint while training goes on.

        `step_s` is the time of a recent step, by which `every_steps: auto` sets the next one. Gives the figures of that
        decision, the same on every rank.
        """
        if state.step == self._saved_step:
            return {}
        self._saver.save(state)
        self._saved_step = state.step
        self._cost.save_begins(self._saver.finished())
        if self._job.spec.checkpoint.every_steps != "auto":
            return {}
        figures: dict[str, float] = self._agree(self._best_interval(state, step_s) if self._leads else None)
        self._interval = int(figures[INTERVAL_METRIC])
        return figures

    def newest(self) -> str | None:
        """Where the newest checkpoint is, once everything that was handed over is written; every rank's own view."""
        return self._saver.wait() or self._loaded

    # -- going on or not ---------------------------------------------------------------------------------------

    def has_failed(self) -> bool:
        """Whether this rank has met something that ends the attempt; cheap, asked at every step."""
        return not self._fence.holds() or self._saver.failure() is not None

    def raise_failure(self) -> None:
        """Raises what any rank has met, on every rank."""
        self.check_fence()
        failure = self._saver.failure()
        if failure is not None:
            raise failure
        raise TransientError("another rank of this attempt could not go on", do="its own error says why")

    def check_fence(self) -> None:
        """Raises FencedError when a newer attempt has begun."""
        self._fence.check()

    def holds(self) -> bool:
        """Whether this attempt may still write."""
        return self._fence.holds()

    def still_holds(self) -> bool:
        """The same, as others see it at this moment."""
        return self._fence.holds(now=True)

    def show(self, file: Path) -> None:
        """What rank 0 has written into the run's folder, a file or a folder, becomes visible to the run's driver."""
        self._exchange.send(file.name, patience_s=PATIENCE_S, may_send=self.still_holds)

    def hide(self, part: str) -> None:
        """Removes what rank 0 has written there, a file or a folder, also for the run's driver."""
        self._exchange.remove(part)

    def close(self) -> None:
        """Gives up what is not complete yet."""
        self._saver.close()
        self._scratch.cleanup()
        self._following.close()
        if self._leads and self._fence.holds():
            with suppress(StorageError):  # what ended the training is told, and checkpoints have theirs
                self._exchange.send(*_BY_LEADER)

    # -- inside ------------------------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return self._rank == 0

    def _load_newest(self) -> LoopState | None:
        """Puts the newest checkpoint that counts, and that arrives whole on every rank, into the engine."""
        damaged: set[Path] = set()
        while True:
            checkpoint: Checkpoint | None = self._agree(self._find(damaged) if self._leads else None)
            self.notes = self._agree(self.notes)
            if checkpoint is None:
                self._saved_step, self._loaded = 0, None
                return None
            path = self._fetched(checkpoint)
            if not self._any_rank(path is None):
                break
            damaged.add(checkpoint.path)
        assert path is not None, "no rank failed to fetch it"
        if self._leads:  # what lies behind it would be in the way of what is written again
            catalog.discard_newer(self._storage, checkpoint.state.step)
        self._engine.load(replace(checkpoint, path=path))
        self._saved_step, self._loaded = checkpoint.state.step, str(checkpoint.path)
        return checkpoint.state

    def _find(self, damaged: set[Path]) -> Checkpoint | None:
        found = catalog.newest_good(self._storage, void=self._attempts.is_void, without=damaged)
        self.notes = (*self.notes, *(note for note in found.rejected if note not in self.notes))
        return found.checkpoint

    def _fetched(self, checkpoint: Checkpoint) -> Path | None:
        """A folder here with what this rank needs of it; None where that is damaged."""
        plan = self._job.plan
        same_shape = has_shape(checkpoint, world_size=plan.workers, zero_stage=plan.zero_stage)
        try:
            return catalog.fetch(
                self._storage, checkpoint, needed=lambda name: not same_shape or needed_by(self._rank, name)
            )
        except StorageError:
            return None

    def _good_steps(self) -> list[int]:
        return catalog.steps(self._storage, void=self._attempts.is_void)

    def _best_interval(self, state: LoopState, step_s: float) -> dict[str, float]:
        cost = self._cost.mean()
        decision = interval_steps(
            step_s=step_s or None,
            cost=cost,
            restart_s=_RESTART_S,
            nodes=self._nodes,
            failures=max(0, self._job.attempt - 1),
            node_hours=state.wall_seconds / 3600 * self._nodes,
        )
        figures = {INTERVAL_METRIC: float(decision.steps)}
        return figures if cost is None else {**figures, COST_METRIC: cost.lost_s}

    def _read_rewinds(self) -> tuple[Rewind, ...]:
        try:
            return tuple(Rewind.from_dict(value) for value in json.loads(self._rewinds_file.read_bytes()))
        except FileNotFoundError:
            return ()
        except (ValueError, TypeError, KeyError) as error:  # which samples were left out cannot be made anew
            raise damaged(
                "the file that says which samples this run has left out", self._rewinds_file, error
            ) from error

    def _write_rewinds(self) -> None:
        with catalog.storage_errors(self._job.run_folder):
            write_json(self._rewinds_file, [rewind.to_dict() for rewind in self._rewinds])
        self.show(self._rewinds_file)
