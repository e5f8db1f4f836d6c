"""Inside a worker, where nothing is trained: a model is measured on the held-out samples, by the trainings' own code.

All ranks agree before every batch whether they go on. Nothing is kept on the way: whoever is stopped begins anew.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.atomic_file import write_json
from orchestrator.checkpoints.catalog import storage_errors
from orchestrator.methods.as_is import EVALUATION
from orchestrator.runs.job import Outcome, Status, TrainingJob, WorkerContext
from orchestrator.samples.masking import Masking
from orchestrator.samples.open_split import open_split
from orchestrator.tasks.base import Objective
from orchestrator.tasks.names import CUT_OFF
from orchestrator.tasks.registry import task_of
from orchestrator.worker.consensus import Consensus, ControlSignal
from orchestrator.worker.evaluation import Evaluator
from orchestrator.worker.models import load_as_is
from orchestrator.worker.objectives import Batch
from orchestrator.worker.untrained import UntrainedRank, carried_out

_STATUS: dict[ControlSignal, Status] = {
    ControlSignal.STOP: "interrupted",
    ControlSignal.OVER_BUDGET: "stopped_by_budget",
}


def measure(job: TrainingJob, context: WorkerContext) -> Outcome:
    """Runs one rank to the end, its budget's end or a requested stop; rank 0's outcome is the run's.

    Raises ModelError where the model cannot be loaded with its own head of the task, StorageError when what was found
    cannot be kept, FencedError when a newer attempt has begun.
    """
    return carried_out(_Measuring, job, context)


class _AsItIs:
    """A whole model on each rank, as `Evaluator` takes it."""

    def __init__(self, model: torch.nn.Module, objective: Objective, device: torch.device) -> None:
        self._model, self._objective, self._device = model.eval().to(device), objective, device

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """What the objective gives per sample; no gradients, no dropout."""
        with torch.inference_mode():
            return self._objective.evaluate(
                self._model, {name: tensor.to(self._device) for name, tensor in batch.items()}
            )

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a tensor over all ranks."""
        values = values.to(self._device)
        dist.all_reduce(values)
        return values


class _Ended(Exception):
    def __init__(self, wish: ControlSignal) -> None:
        super().__init__(wish.name)
        self.wish = wish


class _Measuring(UntrainedRank):
    """One rank's share of measuring."""

    def __init__(self, job: TrainingJob, context: WorkerContext) -> None:
        super().__init__(job, context)
        self._task = task_of(job.spec.task)
        self._objective = self._task.objective
        training = job.spec.training
        masking = Masking(rate=training.masking_rate, seed=training.seed)
        self._samples = open_split(job.data.path, "validation", masking=masking)
        self._model = _AsItIs(load_as_is(job.spec, job.plan, job.data), self._objective, self._device)
        self._consensus = Consensus(self._model.sum_over_ranks, rank=context.rank, world_size=job.plan.workers)
        self._found: dict[str, float] = {}
        self._classes = np.zeros((len(self._samples), 2), dtype=np.int64)
        """Of each sample the true class and the one that was predicted; only those that this rank has read."""
        self._rounds, self._since_s = 0, time.monotonic()
        if (cut := self._cut()) > 0:
            length = job.spec.data.sequence_length
            self._note(
                f"{cut:,} of {len(self._samples):,} rows fill the {length} tokens of data.sequence_length; what lies "
                "beyond was not read"
            )

    def _cut(self) -> int:
        """How many rows may go on beyond the cut-off."""
        if self._task.form not in CUT_OFF:
            return 0
        lengths = self._samples.lengths(np.arange(len(self._samples)))
        return int(np.count_nonzero(lengths >= self._job.spec.data.sequence_length))

    def run(self) -> Status:
        """Reads all samples once."""
        evaluator = Evaluator(
            self._job,
            self._objective,
            validation=self._samples,
            rank=self._context.rank,
            before_batch=self._go_on,
        )
        try:
            self._found = evaluator.held_out(self._model, seen=self._see)
        except _Ended as end:
            return _STATUS[end.wish]
        self._tell(len(self._samples), len(self._samples))
        return "finished"

    def _go_on(self) -> None:
        """Before each batch: tells how far it is, and ends all ranks together where rank 0 wants that."""
        now_s, done = time.monotonic(), self._done
        if self._rounds:
            self._account.add_evaluation(now_s - self._since_s)
        self._since_s = now_s
        self._tell(done, len(self._samples))
        self._context.heartbeat.enter("waiting", 0)
        wish = self._consensus.wish(self._wish() if self._leads else ControlSignal.GO_ON)
        if wish != ControlSignal.GO_ON:
            raise _Ended(wish)
        self._context.heartbeat.enter("evaluating", 0)
        self._rounds += 1

    @property
    def _done(self) -> int:
        """Samples that all ranks have read."""
        plan = self._job.plan
        return min(len(self._samples), self._rounds * plan.workers * plan.micro_batch)

    @property
    def _share(self) -> float:
        """See `UntrainedRank`."""
        return self._done / len(self._samples)

    def _see(self, numbers: np.ndarray, sums: torch.Tensor) -> None:
        if self._objective.answers is not None:
            self._classes[numbers] = self._objective.answers(sums).numpy()

    def _keep(self) -> None:
        """See `UntrainedRank`: nothing; all is read again in less than what trainings take."""

    def _figures(self) -> dict[str, float]:
        """See `UntrainedRank`; rank 0 keeps what is found beyond the metrics."""
        classes = self._model.sum_over_ranks(torch.from_numpy(self._classes)).cpu().numpy()
        if not self._leads:
            return self._found
        found = self._task.breakdown(classes[:, 0], classes[:, 1], self._job.data.label_names or ())
        data = self._job.data
        unit = data.held_out.unit
        answer = {
            unit: data.held_out.examples,
            "samples": len(self._samples),
            "cut": self._cut(),
            "notes": [*data.notes, *data.held_out.notes],
            "classes": None if found is None else [asdict(each) for each in found.classes],
            "confusion": None if found is None else [list(row) for row in found.confusion],
        }
        with storage_errors(self._job.run_folder):
            write_json(self._job.run_folder / EVALUATION, answer)
        self._show(EVALUATION)
        return self._found if found is None else self._found | found.metrics
