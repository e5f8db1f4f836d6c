"""The held-out data, evaluated by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from orchestrator.planning.run_plan import RunPlan
from orchestrator.samples.batches import Samples
from orchestrator.tasks.base import BITS_PER_BYTE, Objective
from orchestrator.worker.engine import Engine
from orchestrator.worker.step_data import tensors


def evaluate(
    engine: Engine,
    samples: Samples,
    objective: Objective,
    *,
    plan: RunPlan,
    rank: int,
    covered_bytes: int | None,
    before_batch: Callable[[], None],
) -> dict[str, float]:
    """The task's figures over every sample once, the same at any number of workers; all ranks call it.

    With `covered_bytes`, the UTF-8 bytes of the text that the predicted tokens stand for, bits per byte are one.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for indices, real in _slices(samples, rank=rank, world_size=plan.workers, micro_batch=plan.micro_batch):
        before_batch()
        batch = samples.batch(indices, pad_to=samples.padded_length(indices))
        sums = sums + engine.evaluate(tensors(batch)).cpu()[:real].sum(0)
    totals = engine.sum_over_ranks(sums).tolist()
    figures = objective.summarize(*totals)
    return figures if covered_bytes is None else {**figures, BITS_PER_BYTE: totals[0] / math.log(2) / covered_bytes}


def _slices(samples: Samples, *, rank: int, world_size: int, micro_batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """One rank's batches of sample numbers, and how many of each are real.

    The last ones repeat a sample, so that every rank does the same number of forward passes, which ZeRO-3 needs.
    """
    everything = np.arange(len(samples))
    order = np.argsort(samples.lengths(everything), kind="stable")  # alike in length: little padding
    for start in range(0, len(order), micro_batch * world_size):
        mine = order[start + rank * micro_batch : start + (rank + 1) * micro_batch]
        real = len(mine)
        filler = np.full(micro_batch - real, order[-1]) if real < micro_batch else mine[:0]
        yield np.concatenate([mine, filler]), real
