"""What one rank computes in a step: its share of the global batch, and the seeds of its dropout.

Both are pure functions of the step: nothing has to be saved, and any number of workers with the same micro-batch trains
on the same samples with the same activations dropped. Tokens that a masked language model predicts are chosen for each
sample alone, so they are the same at any micro-batch too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.planning.run_plan import RunPlan
from orchestrator.samples.batches import Order, SampleOrder, Samples, batch_number, global_batch, positions, rank_slice
from orchestrator.worker.objectives import Batch


@dataclass(frozen=True, kw_only=True)
class Share:
    """One rank's part of a step."""

    batch_number: int
    """Place of the global batch in the endless stream of them."""
    samples: np.ndarray
    """Sample numbers of the whole global batch."""
    tokens: int
    """Of the whole global batch, without padding."""
    padded_tokens: int
    """Of the whole global batch, as it is computed."""
    micro_batches: list[Batch]
    """This rank's, one for each forward pass."""
    seeds: list[int]
    """One for each micro-batch."""


class StepData:
    """The training split as one rank sees it."""

    def __init__(self, samples: Samples, *, plan: RunPlan, seed: int, rank: int, order: Order | None = None) -> None:
        """`order` is that of the samples; None shuffles them in every pass."""
        self._samples, self._plan, self._seed, self._rank = samples, plan, seed, rank
        self._order: Order = order or SampleOrder(seed=seed, size=len(samples))

    def samples(self, number: int) -> list[int]:
        """Sample numbers of a global batch."""
        return [int(sample) for sample in global_batch(self._order, number, self._plan.global_batch)]

    def share(self, step: int, *, skipped: Sequence[int]) -> Share:
        """This rank's part of optimizer step `step` (from 0), the batches of these numbers left out."""
        plan = self._plan
        number = batch_number(step, skipped)
        places = positions(number, plan.global_batch)
        samples = self._order.samples(places)
        mine = rank_slice(
            places,
            rank=self._rank,
            world_size=plan.workers,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
        )
        length = self._samples.padded_length(samples)
        return Share(
            batch_number=number,
            samples=samples,
            tokens=int(self._samples.lengths(samples).sum()),
            padded_tokens=len(samples) * length,
            micro_batches=[self._micro_batch(part, pad_to=length) for part in mine],
            seeds=[self._dropout_seed(number, place) for place in self._places()],
        )

    def _micro_batch(self, places: np.ndarray, *, pad_to: int) -> Batch:
        """The samples at places of the endless stream, each masked anew every time that it comes."""
        order = self._order
        return tensors(self._samples.batch(order.samples(places), pad_to=pad_to, epochs=order.epochs(places)))

    def _places(self) -> range:
        """Where this rank's micro-batches stand in the global batch (`rank_slice`)."""
        return range(self._rank, self._plan.workers * self._plan.accumulation, self._plan.workers)

    def _dropout_seed(self, number: int, place: int) -> int:
        """Distinct for every (seed, global batch, micro-batch): numpy's SeedSequence mixes them."""
        return int(np.random.SeedSequence([self._seed, number, place]).generate_state(1, np.uint64)[0])


def tensors(batch: dict[str, np.ndarray]) -> Batch:
    """The arrays of a batch as tensors over the same memory."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}
