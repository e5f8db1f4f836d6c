"""Inside a worker: steps, evaluation, checkpoints, and a clean end, for one rank of one training.

Everything that must agree between ranks goes through one small all-reduce a step: the mean loss and rank 0's wish to
stop. Dropout is reseeded from (seed, step, rank) at every step, so that no random state has to be saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.errors import StorageError
from orchestrator.tracking.tracker import MetricLog
from orchestrator.training import checkpoints, models
from orchestrator.training.batches import SampleOrder, global_batch, open_split, rank_slice
from orchestrator.training.budget import Cost, decide
from orchestrator.training.engine import Engine, join_process_group
from orchestrator.training.job import LoopState, Outcome, Progress, Status, TrainingJob, WorkerContext
from orchestrator.training.objectives import Batch, objective_for
from orchestrator.training.schedule import learning_rate

_GO_ON, _INTERRUPTED, _OVER_BUDGET = 0, 1, 2
_PACE_STEPS = 20
"""The pace shown to a user is the mean of so many recent steps."""


def train(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank of a training to its end, its budget's end, or a requested stop.

    Resumes by itself from the newest good checkpoint in `job.checkpoints`. Every rank returns the same outcome.
    Raises StorageError when a checkpoint cannot be written or read, ModelError when the base model cannot be used.
    """
    loop = _Loop(job, context)
    try:
        loop.restore()
        status = loop.run()
        return loop.finish(status)
    finally:
        loop.close()


class _Loop:
    """The state of one rank's training between its first and last step."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        self._started = time.monotonic()
        self._job, self._context = job, context
        self._spec, self._plan = job.spec, job.plan
        assert job.plan.steps is not None, "the plan has met its dataset"
        assert job.plan.warmup_steps is not None
        self._steps = job.plan.steps
        self._warmup_steps = job.plan.warmup_steps
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
        self._state = LoopState()
        self._metrics: dict[str, float] = {}
        self._notes: tuple[str, ...] = ()
        self._checkpoint: Path | None = None
        self._evaluated_step = -1
        self._closing_seconds = 0.0
        self._recent_seconds: list[float] = []
        self._log = MetricLog(job.handle, job.run_folder / "outbox") if self._leads else None

    @property
    def _leads(self) -> bool:
        return self._context.rank == 0

    def restore(self) -> None:
        """Loads the newest good checkpoint; rank 0 looks for it, so that all ranks load the same."""
        found: list[Any] = [checkpoints.newest_good(self._job.checkpoints) if self._leads else None]
        dist.broadcast_object_list(found, src=0)
        self._notes = found[0].rejected
        checkpoint = found[0].checkpoint
        if checkpoint is None:
            if self._notes:
                raise StorageError(
                    "no checkpoint of this run can be read", got="; ".join(self._notes), do="start over with --fresh"
                )
            return
        checkpoints.check_compatible(checkpoint, world_size=self._plan.workers, zero_stage=self._plan.zero_stage)
        self._engine.load(checkpoint.path)
        self._state, self._checkpoint = checkpoint.state, checkpoint.path

    def run(self) -> Status:
        """Steps until the end or a reason to stop."""
        self._base = self._state
        training, checkpoint = self._spec.training, self._spec.checkpoint
        self._tell("training")
        while self._state.step < self._steps:
            flag = self._take_step()
            step = self._state.step
            if _due(step, training.eval_every_steps) or step == self._steps:
                self._evaluate()
            if flag != _GO_ON:
                return "interrupted" if flag == _INTERRUPTED else "stopped_by_budget"
            if _due(step, checkpoint.every_steps) and step < self._steps:
                self._save()
        return "finished"

    def finish(self, status: Status) -> Outcome:
        """Evaluation, checkpoint, model folder and, when the run is over, the outcome file."""
        if self._evaluated_step != self._state.step and status != "interrupted":
            self._evaluate()
        if self._job.final_checkpoint or status == "interrupted":
            self._save()
        model_path = None
        if status != "interrupted":
            self._tell("exporting")
            state = self._engine.full_state()
            if self._leads:
                with checkpoints.storage_errors(self._job.run_folder):
                    models.export(state, self._spec, self._plan, self._job.data, self._job.model_folder)
            model_path = str(self._job.model_folder)
        outcome = Outcome(
            status=status,
            step=self._state.step,
            steps=self._steps,
            metrics=dict(self._metrics),
            checkpoint=None if self._checkpoint is None else str(self._checkpoint),
            model_path=model_path,
            notes=self._notes,
        )
        dist.barrier()
        if self._leads and status == "finished":
            self._job.outcome_file.write_text(json.dumps(outcome.to_dict(), indent=1))
        return outcome

    def close(self) -> None:
        """Ships what metrics it can and lets go of the engine."""
        if self._log is not None:
            self._log.close()
        self._engine.close()

    # -- one step ----------------------------------------------------------------------------------------------

    def _take_step(self) -> int:
        started = time.monotonic()
        step, plan, training = self._state.step, self._plan, self._spec.training
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
        wish = torch.tensor(float(self._wish()) if self._leads else 0.0)
        agreed = self._engine.sum_over_ranks(torch.stack([loss.float().cpu() / plan.workers, wish]))
        tokens = int(self._train.lengths(indices).sum())
        self._account(time.monotonic() - started, tokens)
        self._record(float(agreed[0]), rate, norm, time.monotonic() - started, tokens)
        return int(agreed[1])

    def _wish(self) -> int:
        """Rank 0's wish after this step: someone asked to stop, or the budget would be overrun by one more."""
        if self._context.stop_requested():
            return _INTERRUPTED
        budget = self._spec.parsed_budget
        if budget is None or not self._recent_seconds:
            return _GO_ON
        pace = sum(self._recent_seconds) / len(self._recent_seconds)
        # This step is not on the account yet, so two steps are ahead of what is.
        decision = decide(
            budget,
            spent=self._cost(self._state),
            next_step=self._cost_of(2 * pace, 2 * self._plan.flops_per_step),
            closing=self._cost_of(self._closing_seconds, 0.0),
        )
        if not decision.go_on:
            self._notes = (*self._notes, decision.reason)
        return _GO_ON if decision.go_on else _OVER_BUDGET

    def _account(self, seconds: float, tokens: int) -> None:
        """Moves the state on by one step; time outside steps counts as well, from the start of this attempt."""
        wall = self._base.wall_seconds + time.monotonic() - self._started
        devices = self._base.device_seconds + (time.monotonic() - self._started) * self._plan.workers
        self._state = LoopState(
            step=self._state.step + 1, tokens=self._state.tokens + tokens, wall_seconds=wall, device_seconds=devices
        )
        self._recent_seconds = [*self._recent_seconds[-(_PACE_STEPS - 1) :], seconds]

    def _cost(self, state: LoopState) -> Cost:
        flops = state.tokens * self._plan.flops_per_step / self._plan.tokens_per_step
        gpu_hours = state.device_seconds / 3600
        return Cost(
            hours=state.wall_seconds / 3600,
            gpu_hours=gpu_hours,
            usd=gpu_hours * self._plan.usd_per_device_hour,
            flops=flops,
        )

    def _cost_of(self, seconds: float, flops: float) -> Cost:
        devices = seconds * self._plan.workers / 3600
        return Cost(hours=seconds / 3600, gpu_hours=devices, usd=devices * self._plan.usd_per_device_hour, flops=flops)

    def _record(self, loss: float, rate: float, norm: float | None, seconds: float, tokens: int) -> None:
        cost = self._cost(self._state)
        values = {
            "train/loss": loss,
            "train/learning_rate": rate,
            "train/tokens_per_second": tokens / seconds,
            "train/tokens": float(self._state.tokens),
            "cost/gpu_hours": cost.gpu_hours,
            "cost/flops": cost.flops,
            "cost/usd": cost.usd,
        }
        if norm is not None:
            values["train/grad_norm"] = norm
        self._emit(values)
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
        self._evaluated_step = self._state.step
        self._emit(summary)
        self._closing_seconds = max(self._closing_seconds, time.monotonic() - started)
        if self._leads:
            self._context.report(self._state.step, dict(self._metrics))

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
        if self._checkpoint is not None and self._checkpoint.name == f"step-{self._state.step:08d}":
            return
        started = time.monotonic()
        self._tell("saving")
        folder: list[Any] = [checkpoints.begin(self._job.checkpoints, self._state.step) if self._leads else None]
        dist.broadcast_object_list(folder, src=0)
        self._engine.save(folder[0])
        dist.barrier()
        if self._leads:
            folder[0] = checkpoints.commit(
                folder[0], state=self._state, world_size=self._plan.workers, zero_stage=self._plan.zero_stage
            )
            checkpoints.prune(self._job.checkpoints, self._spec.checkpoint.keep)
        dist.broadcast_object_list(folder, src=0)
        self._checkpoint = folder[0]
        self._closing_seconds = max(self._closing_seconds, 2 * (time.monotonic() - started))

    # -- telling -----------------------------------------------------------------------------------------------

    def _emit(self, values: dict[str, float]) -> None:
        self._metrics.update(values)
        if self._log is not None:
            self._log.log(self._state.step, values)

    def _tell(self, phase: str) -> None:
        if not self._leads:
            return
        pace = sum(self._recent_seconds) / len(self._recent_seconds) if self._recent_seconds else 0.0
        self._context.progress(
            Progress(
                step=self._state.step,
                steps=self._steps,
                phase=phase,
                eta_s=pace * (self._steps - self._state.step),
                tokens_per_second=self._metrics.get("train/tokens_per_second", 0.0),
                metrics=dict(self._metrics),
            )
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _tensors(batch: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (seed, step, rank): numpy's SeedSequence mixes them."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
