"""What a model gives for the held-out samples, and beside them for some that it has learnt from; all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from orchestrator.runs.job import TrainingJob
from orchestrator.samples.batches import Samples
from orchestrator.samples.metric_names import GAP
from orchestrator.tasks.base import BITS_PER_BYTE, Objective
from orchestrator.worker.objectives import Batch
from orchestrator.worker.step_data import tensors

_GAP_SAMPLES = 256
"""Training samples evaluated for the gap, at most: the standard error of their mean loss is a sixteenth of its spread
over samples."""


Seen = Callable[[np.ndarray, torch.Tensor], None]
"""Told of each batch the numbers of its samples, and what the objective gives for each."""


class Evaluated(Protocol):
    """A model on all ranks: a training's engine, or one as it is."""

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """What the objective gives per sample; no gradients, no dropout."""

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum of a small tensor over all ranks."""


class Evaluator:
    """Evaluates a model, the same at any number of workers."""

    def __init__(
        self,
        job: TrainingJob,
        objective: Objective,
        *,
        validation: Samples,
        rank: int,
        before_batch: Callable[[], None],
        train: Samples | None = None,
    ) -> None:
        """`before_batch` is called before each forward pass; `train` is what a training's model has learnt from."""
        self._plan, self._objective, self._rank, self._before_batch = job.plan, objective, rank, before_batch
        self._covered_bytes = job.data.covered_bytes
        self._train, self._validation = train, validation

    def figures(self, engine: Evaluated) -> dict[str, float]:
        """Those of `held_out`, and the generalization gap; every rank calls it."""
        assert self._train is not None, "a gap is to what was learnt from"
        figures, learnt_from = self.held_out(engine), gap_samples(len(self._train), len(self._validation))
        return figures | {GAP: figures["eval/loss"] - self.loss(engine, self._train, learnt_from)}

    def held_out(self, engine: Evaluated, *, seen: Seen | None = None) -> dict[str, float]:
        """The task's over every held-out sample once; every rank calls it, and its `seen` is told of its own samples.

        Where the UTF-8 bytes of the text that the predicted tokens stand for are known, bits per byte are among them.
        """
        totals = self._sums(engine, self._validation, np.arange(len(self._validation)), seen=seen)
        figures = self._objective.summarize(*totals)
        if self._covered_bytes is not None:
            figures[BITS_PER_BYTE] = totals[0] / math.log(2) / self._covered_bytes
        return figures

    def loss(self, engine: Evaluated, samples: Samples, chosen: np.ndarray) -> float:
        """The mean loss over samples chosen by their numbers; every rank calls it."""
        return self._objective.summarize(*self._sums(engine, samples, chosen))["eval/loss"]

    def _sums(
        self, engine: Evaluated, samples: Samples, chosen: np.ndarray, *, seen: Seen | None = None
    ) -> list[float]:
        """The objective's sums over chosen samples."""
        plan, sums = self._plan, torch.zeros(1, dtype=torch.float64)
        for indices, real in _slices(
            samples, chosen, rank=self._rank, world_size=plan.workers, micro_batch=plan.micro_batch
        ):
            self._before_batch()
            batch = samples.batch(indices, pad_to=samples.padded_length(indices))
            each = engine.evaluate(tensors(batch)).cpu()[:real]
            if seen is not None:
                seen(indices[:real], each)
            sums = sums + each.sum(0)
        totals: list[float] = engine.sum_over_ranks(sums).tolist()
        return totals


def gap_samples(train: int, validation: int) -> np.ndarray:
    """Numbers of the training samples that the gap is measured on: spread evenly, no more than are held out."""
    return np.linspace(0, train - 1, min(train, validation, _GAP_SAMPLES)).astype(int)


def _slices(
    samples: Samples, chosen: np.ndarray, *, rank: int, world_size: int, micro_batch: int
) -> Iterator[tuple[np.ndarray, int]]:
    """One rank's batches of the chosen sample numbers, and how many of each are real.

    The last ones repeat a sample, so that every rank does the same number of forward passes, which ZeRO-3 needs.
    """
    order = chosen[np.argsort(samples.lengths(chosen), kind="stable")]  # alike in length: little padding
    for start in range(0, len(order), micro_batch * world_size):
        mine = order[start + rank * micro_batch : start + (rank + 1) * micro_batch]
        real = len(mine)
        filler = np.full(micro_batch - real, order[-1]) if real < micro_batch else mine[:0]
        yield np.concatenate([mine, filler]), real
