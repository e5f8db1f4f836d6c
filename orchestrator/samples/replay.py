"""Global batches that hold samples of general data among those of the training data (`retain.replay`).

Both are one stream of samples, general ones numbered after the others, in an order that needs no state: which sample
stands at a place of the stream depends on the seed alone, so batches are the same at any number of workers, after any
resume, and whichever of them are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.samples.batches import SampleOrder, Samples
from orchestrator.samples.masking import Batch

_OTHER_ORDER = 2**32
"""Added to the seed for the order of the general data: seeds of specs are below (`spec_numbers.MOST_SEED`)."""


@dataclass(frozen=True, kw_only=True)
class ReplayOrder:
    """Of every `batch` places, `replayed` are general samples, spread evenly; each kind goes through passes of its
    own."""

    train: SampleOrder
    general: SampleOrder
    batch: int
    replayed: int

    @classmethod
    def of(cls, *, seed: int, train: int, general: int, batch: int, replayed: int) -> ReplayOrder:
        """`train` and `general` are the sizes of the two sets of samples."""
        return cls(
            train=SampleOrder(seed=seed, size=train),
            general=SampleOrder(seed=seed + _OTHER_ORDER, size=general),
            batch=batch,
            replayed=replayed,
        )

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """See `Order`; general sample n has the number of training samples + n."""
        is_general, places = self._places(positions)
        return np.where(is_general, self.train.size + self.general.samples(places), self.train.samples(places))

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """See `Order`."""
        is_general, places = self._places(positions)
        return np.where(is_general, self.general.epochs(places), self.train.epochs(places))

    def _places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each place holds a general sample, and its place in the stream of its own kind."""
        number, offset = np.divmod(np.asarray(positions), self.batch)
        before = offset * self.replayed // self.batch  # general samples of the batch that stand before it
        is_general = (offset + 1) * self.replayed // self.batch > before
        general = number * self.replayed + before
        train = number * (self.batch - self.replayed) + offset - before
        return is_general, np.where(is_general, general, train)


class JoinedSamples:
    """Two sets of samples of one task as one; those of the second are numbered after the first."""

    def __init__(self, first: Samples, second: Samples) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @property
    def token_count(self) -> int:
        """Tokens of both, without padding."""
        return self._first.token_count + self._second.token_count

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each of these samples, without padding."""
        found = np.empty(len(indices), dtype=np.int64)
        for samples, chosen, own in self._parts(indices):
            found[chosen] = samples.lengths(own)
        return found

    def padded_length(self, indices: np.ndarray) -> int:
        """Columns of the batch of these samples."""
        return max(samples.padded_length(own) for samples, _, own in self._parts(indices))

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """See `Samples`."""
        columns = self.padded_length(indices) if pad_to is None else pad_to
        whole: Batch = {}
        for samples, chosen, own in self._parts(indices):
            part = samples.batch(own, pad_to=columns, epochs=None if epochs is None else epochs[chosen])
            for name, rows in part.items():
                whole.setdefault(name, np.empty((len(indices), *rows.shape[1:]), dtype=rows.dtype))[chosen] = rows
        return whole

    def _parts(self, indices: np.ndarray) -> list[tuple[Samples, np.ndarray, np.ndarray]]:
        """(set, which of the indices are its, their numbers in it), without empty ones."""
        in_second = np.asarray(indices) >= len(self._first)
        parts = [(self._first, ~in_second, 0), (self._second, in_second, len(self._first))]
        return [(samples, chosen, indices[chosen] - start) for samples, chosen, start in parts if chosen.any()]
