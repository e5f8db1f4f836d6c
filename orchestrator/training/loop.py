"""Inside a worker: steps, evaluation, checkpoints, and a clean end, for one rank of one training.

Everything that must agree between ranks goes through one small all-reduce a step: the mean loss and rank 0's wish to
stop. Dropout is reseeded from (seed, step, rank) at every step, so that no random state has to be saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.errors import StorageError
from orchestrator.tracking.tracker import MetricLog
from orchestrator.training import checkpoints, models
from orchestrator.training.batches import SampleOrder, global_batch, open_split, rank_slice
from orchestrator.training.budget import Account
from orchestrator.training.engine import Engine, join_process_group
from orchestrator.training.job import Outcome, Progress, Status, TrainingJob, WorkerContext
from orchestrator.training.measurement import Pace, figures
from orchestrator.training.objectives import Batch, objective_for
from orchestrator.training.schedule import learning_rate

_GO_ON, _INTERRUPTED, _OVER_BUDGET = 0, 1, 2


def train(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank of a training to its end, its budget's end, or a requested stop; rank 0's outcome is the run's.

    Resumes by itself from the newest good checkpoint in `job.checkpoints`. A run that its budget has stopped gives the
    same outcome again, without another step, until the budget is raised.
    Raises StorageError when a checkpoint cannot be written or read, ModelError when the base model cannot be used.
    """
    loop = _Loop(job, context)
    try:
        loop.restore()
        return loop.finish(loop.run())
    finally:
        loop.close()


class _Loop:
    """The state of one rank's training between its first and last step."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        self._job, self._context = job, context
        self._spec, self._plan = job.spec, job.plan
        assert job.plan.steps is not None, "the plan has met its dataset"
        assert job.plan.warmup_steps is not None
        self._steps = job.plan.steps
        self._warmup_steps = job.plan.warmup_steps
        self._account = Account(job.plan, validation_samples=job.data.counts.validation_samples)
        join_process_group(job.plan, context)
        self._train = open_split(job.data.path, "train")
        self._validation = open_split(job.data.path, "validation")
        self._order = SampleOrder(seed=job.spec.training.seed, size=len(self._train))
        self._engine = Engine(
            models.build_model(job.spec, job.plan, job.data),
            plan=job.plan,
            weight_decay=job.spec.training.weight_decay,
            objective=objective_for(job.spec.task),
            context=context,
        )
        self._pace = Pace()
        self._metrics: dict[str, float] = {}
        self._notes: tuple[str, ...] = ()
        self._checkpoint: Path | None = None
        self._evaluated_step = 0
        self._log = MetricLog(job.handle, job.run_folder / "outbox") if self._leads else None

    @property
    def _leads(self) -> bool:
        return self._context.rank == 0

    @property
    def _step(self) -> int:
        return self._account.step

    def restore(self) -> None:
        """Loads the newest good checkpoint; rank 0 looks for it, so that all ranks load the same."""
        found = self._from_leader(checkpoints.newest_good(self._job.checkpoints) if self._leads else None)
        self._notes = found.rejected
        checkpoint = found.checkpoint
        if checkpoint is None:
            if self._notes:
                raise StorageError(
                    "no checkpoint of this run can be read", got="; ".join(self._notes), do="start over with --fresh"
                )
            return
        checkpoints.check_compatible(checkpoint, world_size=self._plan.workers, zero_stage=self._plan.zero_stage)
        self._engine.load(checkpoint.path)
        if self._leads:
            checkpoints.discard_newer(checkpoint)
        self._account.resume(checkpoint.state)
        self._evaluated_step, self._metrics = checkpoint.state.evaluated_step, dict(checkpoint.state.metrics)
        self._checkpoint = checkpoint.path

    def run(self) -> Status:
        """Steps until the end or a reason to stop."""
        self._tell("training")
        wish = self._from_leader(self._wish() if self._leads else _GO_ON)
        while wish != _INTERRUPTED:
            if self._step == self._steps:
                return "finished"
            # Before the step and not after the last one: a run that was stopped in between makes up for it.
            if _due(self._step, self._spec.training.eval_every_steps) and self._evaluated_step != self._step:
                self._evaluate()
            if _due(self._step, self._spec.checkpoint.every_steps):
                self._save()
            if wish == _OVER_BUDGET:
                return "stopped_by_budget"
            wish = self._take_step()
        return "interrupted"

    def finish(self, status: Status) -> Outcome:
        """Evaluation, measurements, checkpoint, model folder and, when the run is over, the outcome file."""
        if status == "interrupted":
            self._save()
            return self._outcome(status)
        if status == "stopped_by_budget":
            earlier = self._from_leader(self._earlier_stop() if self._leads else None)
            if earlier is not None:
                return Outcome.from_dict(earlier)
        if self._evaluated_step != self._step or self._step == 0:
            self._evaluate()
        self._measure()  # before the checkpoint, which keeps all metrics
        if self._job.final_checkpoint:
            self._save()
        self._export()
        outcome = self._outcome(status)
        dist.barrier()
        if self._leads:
            file = self._job.outcome_file if status == "finished" else self._job.budget_stop_file
            file.write_text(json.dumps(outcome.to_dict(), indent=1))
        return outcome

    def close(self) -> None:
        """Ships what metrics it can and lets go of the engine."""
        try:
            if self._log is not None:
                self._log.close()
        finally:
            self._engine.close()

    # -- one step ----------------------------------------------------------------------------------------------

    def _take_step(self) -> int:
        """One optimizer step on all ranks; returns rank 0's wish after it."""
        started = time.monotonic()
        step, plan, training = self._step, self._plan, self._spec.training
        indices = global_batch(self._order, step, plan.global_batch)
        mine = rank_slice(
            indices,
            rank=self._context.rank,
            world_size=plan.workers,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
        )
        length = self._train.padded_length(indices)
        batches = [_tensors(self._train.batch(part, pad_to=length)) for part in mine]
        torch.manual_seed(_step_seed(training.seed, step, self._context.rank))
        rate = learning_rate(training, step=step, steps=self._steps, warmup_steps=self._warmup_steps)
        loss, norm = self._engine.step(batches, rate)
        tokens = int(self._train.lengths(indices).sum())
        self._account.add_step(seconds=time.monotonic() - started, tokens=tokens)
        wish = torch.tensor(float(self._wish()) if self._leads else 0.0)
        agreed = self._engine.sum_over_ranks(torch.stack([loss.float().cpu() / plan.workers, wish]))
        seconds = time.monotonic() - started
        self._pace.add_step(seconds=seconds, tokens=tokens)
        news = {
            "train/loss": float(agreed[0]),
            "train/learning_rate": rate,
            "train/tokens_per_second": tokens / seconds,
        }
        self._record(news if norm is None else {**news, "train/grad_norm": norm})
        return int(agreed[1])

    def _wish(self) -> int:
        """Rank 0's wish: someone asked to stop, or one more step would overrun the budget."""
        if self._context.stop_requested():
            return _INTERRUPTED
        budget = self._spec.parsed_budget
        if budget is None or self._step == self._steps:
            return _GO_ON
        decision = self._account.decide(budget)
        if not decision.go_on:
            self._notes = (*self._notes, decision.reason)
        return _GO_ON if decision.go_on else _OVER_BUDGET

    def _record(self, news: dict[str, float]) -> None:
        """A step's figures, with what the run has cost up to it."""
        cost = self._account.cost()
        self._emit(
            news
            | {
                "train/tokens": float(self._account.state().tokens),
                "cost/gpu_hours": cost.gpu_hours,
                "cost/flops": cost.flops,
                "cost/usd": cost.usd,
            }
        )
        self._tell("training")

    # -- evaluation and saving ---------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        started = time.monotonic()
        self._tell("evaluating")
        sums = torch.zeros(3, dtype=torch.float64)
        for indices, real in self._validation_slices():
            batch = self._validation.batch(indices, pad_to=self._validation.padded_length(indices))
            sums += self._engine.evaluate(_tensors(batch)).cpu()[:real].sum(0)
        loss, correct, count = self._engine.sum_over_ranks(sums).tolist()
        summary = objective_for(self._spec.task).summarize(loss, correct, count)
        self._evaluated_step = self._step
        self._emit(summary)
        seconds = time.monotonic() - started
        self._account.add_evaluation(seconds)
        self._pace.add_pause(seconds)
        if self._leads:
            self._context.report(self._step, dict(self._metrics))

    def _measure(self) -> None:
        """What the run took, beside what was planned; nothing new where this attempt only ended an earlier one."""
        if not self._pace.steps:
            return
        peak_gib = self._engine.peak_gib()
        self._emit(
            figures(
                self._plan,
                self._pace,
                counts=self._job.data.counts,
                step=self._step,
                gpu_hours=self._account.cost().gpu_hours,
                peak_gib=peak_gib,
            )
        )

    def _validation_slices(self) -> Iterator[tuple[np.ndarray, int]]:
        """This rank's held-out batches and how many of each are real; the last ones repeat a sample so that every
        rank does the same number of forward passes, which ZeRO-3 needs. Short samples first: little padding."""
        everything = np.arange(len(self._validation))
        order = np.argsort(self._validation.lengths(everything), kind="stable")
        size, rank = self._plan.micro_batch, self._context.rank
        for start in range(0, len(order), size * self._plan.workers):
            mine = order[start + rank * size : start + (rank + 1) * size]
            real = len(mine)
            filler = np.full(size - real, order[-1]) if real < size else mine[:0]
            yield np.concatenate([mine, filler]), real

    def _save(self) -> None:
        """All ranks write, then rank 0 makes it a checkpoint and prunes old ones."""
        if self._checkpoint is not None and self._checkpoint.name == f"step-{self._step:08d}":
            return
        started = time.monotonic()
        self._tell("saving")
        folder = self._job.checkpoints
        writing = self._from_leader(checkpoints.begin(folder, self._step) if self._leads else None)
        self._engine.save(writing)
        dist.barrier()
        final = None
        if self._leads:
            final = checkpoints.commit(
                writing,
                state=replace(self._account.state(), evaluated_step=self._evaluated_step, metrics=dict(self._metrics)),
                world_size=self._plan.workers,
                zero_stage=self._plan.zero_stage,
            )
            checkpoints.prune(folder, self._spec.checkpoint.keep)
        self._checkpoint = self._from_leader(final)
        seconds = time.monotonic() - started
        self._account.add_saving(seconds)
        self._pace.add_pause(seconds)

    def _export(self) -> None:
        """Rank 0 writes the model as a Hugging Face folder, from the weights of all."""
        self._tell("exporting")
        state = self._engine.full_state()
        if self._leads:
            with checkpoints.storage_errors(self._job.run_folder):
                models.export(state, self._spec, self._plan, self._job.data, self._job.model_folder)

    def _outcome(self, status: Status) -> Outcome:
        return Outcome(
            status=status,
            step=self._step,
            steps=self._steps,
            metrics=dict(self._metrics),
            checkpoint=None if self._checkpoint is None else str(self._checkpoint),
            model_path=None if status == "interrupted" else str(self._job.model_folder),
            notes=self._notes,
        )

    def _earlier_stop(self) -> dict[str, Any] | None:
        """What was said when the budget stopped this run at this very step."""
        file = self._job.budget_stop_file
        earlier: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return earlier if earlier.get("step") == self._step else None

    # -- telling -----------------------------------------------------------------------------------------------

    def _from_leader(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _emit(self, values: dict[str, float]) -> None:
        self._metrics.update(values)
        if self._log is not None:
            self._log.log(self._step, values)

    def _tell(self, phase: str) -> None:
        if not self._leads:
            return
        self._context.progress(
            Progress(
                step=self._step,
                steps=self._steps,
                phase=phase,
                eta_s=self._account.pace_s * (self._steps - self._step),
                tokens_per_second=self._metrics.get("train/tokens_per_second", 0.0),
                metrics=dict(self._metrics),
            )
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def _tensors(batch: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (seed, step, rank): numpy's SeedSequence mixes them."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
