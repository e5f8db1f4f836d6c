"""The samples of a split, and which of them a step trains on.

Which samples a step sees is a pure function of the seed: `SampleOrder` computes the shuffle, `rank_slice` cuts a global
batch so that any number of workers trains on the same ones; nothing keeps a position, and resuming needs the step
number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orchestrator.samples.counter_rng import GOLDEN, mix
from orchestrator.samples.masking import Batch

_FEISTEL_ROUNDS = 8
"""Four make a strong permutation of large domains (Luby and Rackoff 1988); small domains want more."""


class Samples(Protocol):
    """One split of a prepared dataset; each form of samples has its own."""

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, without padding."""
        ...

    def __len__(self) -> int: ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each of these samples, without padding."""
        ...

    def padded_length(self, indices: np.ndarray) -> int:
        """Columns of the batch of these samples."""
        ...

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """Arrays of int64 for a model's forward pass; `pad_to` sets the columns where samples differ in length.

        `epochs` says of each sample how often it was seen before, for what is drawn anew each time; None draws as for
        an evaluation: the same every time, in every run.
        """
        ...


class Order(Protocol):
    """Which sample stands at each place of the endless stream."""

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers (int64) at these places."""
        ...

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """How often the sample at each place was seen before."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """A shuffle of `size` samples for every epoch, computed and not stored: O(1) memory at any size.

    A generalised Feistel network over a x b >= size (Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"), keyed by (seed, epoch, round) through splitmix64 (Steele, Lea and Flood 2014); values beyond `size`
    are sent through it again until they fall inside ("cycle walking").
    """

    seed: int
    size: int

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """How often the sample at each position of the endless stream was seen before it."""
        return np.asarray(positions) // self.size

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers (int64) at positions of the endless stream of epochs; position i is in epoch i // size."""
        wanted = np.asarray(positions, dtype=np.uint64)
        size = np.uint64(self.size)
        keys = mix(mix(np.full(1, self.seed, dtype=np.uint64)) ^ (wanted // size))
        values = self._permuted(wanted % size, keys)
        while (outside := values >= size).any():
            values[outside] = self._permuted(values[outside], keys[outside])
        return values.astype(np.int64)

    def _permuted(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        width = np.uint64(int(np.ceil(np.sqrt(self.size))))
        height = np.uint64(-(-self.size // int(width)))
        left: np.ndarray = values // height
        right: np.ndarray = values % height
        for step in range(_FEISTEL_ROUNDS):
            if step % 2:
                right = (right + mix(keys ^ left) % height) % height
            else:
                left = (left + mix(keys ^ right) % width) % width
            keys = keys + GOLDEN
        result: np.ndarray = left * height + right
        return result


def batch_number(step: int, skipped: Sequence[int] = ()) -> int:
    """Which global batch of the endless stream optimizer step `step` (from 0) trains on, when some are left out.

    A batch that is skipped moves every later step on by one and no earlier step at all, so a run that goes back to a
    checkpoint from before it has trained on what it would have.
    """
    number = step
    for left_out in sorted(set(skipped)):
        if left_out > number:
            break
        number += 1
    return number


def positions(number: int, size: int) -> np.ndarray:
    """Places of the global batch `number` (from 0) in the endless stream of epochs."""
    return np.arange(number * size, (number + 1) * size)


def global_batch(order: Order, number: int, size: int) -> np.ndarray:
    """Samples of the global batch `number` (from 0) over all workers; the same for any number of them."""
    return order.samples(positions(number, size))


def rank_slice(
    batch_indices: np.ndarray, *, rank: int, world_size: int, micro_batch: int, accumulation: int
) -> list[np.ndarray]:
    """One rank's share of a global batch: one array of `micro_batch` samples for each of `accumulation` passes."""
    assert len(batch_indices) == world_size * micro_batch * accumulation, "the plan's batch does not split evenly"
    return list(batch_indices.reshape(accumulation, world_size, micro_batch)[:, rank])
