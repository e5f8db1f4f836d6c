"""Encoded splits on disk -> batches. `prepare` writes them, the training loop asks for the samples of a step.

Which samples a step sees is a pure function of the seed: `SampleOrder` computes the shuffle, `rank_slice` cuts a global
batch so that any number of workers trains on the same ones; nothing keeps a position, and resuming needs the step
number alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orchestrator.data.splits import SPLITS, Split
from orchestrator.errors import StorageError
from orchestrator.planning.length import PAD_MULTIPLE
from orchestrator.samples.counter_rng import GOLDEN, mix
from orchestrator.samples.masking import Batch, Masking, Vocabulary, mask
from orchestrator.tasks.registry import LEARNT

_FEISTEL_ROUNDS = 8
"""Four make a strong permutation of large domains (Luby and Rackoff 1988); small domains want more."""


class Samples(Protocol):
    """One split of a prepared dataset, memory-mapped."""

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


class _Blocks:
    """Samples of one length, cut from a token stream: no padding."""

    def __init__(self, tokens: np.ndarray, *, length: int, samples: int) -> None:
        self._tokens, self._length, self._samples = tokens, length, samples

    def __len__(self) -> int:
        return self._samples

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, the special ones that a block adds included."""
        return len(self) * self._length

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The block length, for each sample."""
        return np.full(len(indices), self._length)

    def padded_length(self, indices: np.ndarray) -> int:
        """The block length, for any samples."""
        return self._length


class PackedSamples(_Blocks):
    """Blocks for causal language modelling: every token is predicted once."""

    def __init__(self, tokens: np.ndarray, *, length: int) -> None:
        super().__init__(tokens, length=length, samples=packed_samples(len(tokens), length))
        self._offsets = np.arange(length + 1)

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`input_ids` and `labels`, the next token of each; both (samples, block length)."""
        blocks = self._tokens[np.asarray(indices)[:, None] * self._length + self._offsets].astype(np.int64)
        return {"input_ids": blocks[:, :-1], "labels": blocks[:, 1:]}


class MaskedSamples(_Blocks):
    """Blocks for masked language modelling, each between two special tokens.

    That is RoBERTa's FULL-SENTENCES format (Liu et al. 2019): a block goes on over the end of a document, and the
    stream holds a separator there.
    """

    def __init__(self, tokens: np.ndarray, *, length: int, vocabulary: Vocabulary, masking: Masking) -> None:
        super().__init__(tokens, length=length, samples=masked_samples(len(tokens), length))
        self._offsets = np.arange(length - 2)
        self._vocabulary = vocabulary
        self._masking = masking

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`input_ids` (samples, block length), some hidden; `positions` and `labels` of what `mask` chose."""
        indices = np.asarray(indices)
        text = self._tokens[indices[:, None] * (self._length - 2) + self._offsets].astype(np.int64)
        edge = np.ones((len(indices), 1), dtype=np.int64)
        blocks = np.concatenate([edge * self._vocabulary.cls_id, text, edge * self._vocabulary.sep_id], axis=1)
        return mask(blocks, self._masking.keys(indices, epochs), rate=self._masking.rate, vocabulary=self._vocabulary)


class LabelledSamples:
    """Rows of token ids with a class each."""

    def __init__(
        self, tokens: np.ndarray, *, lengths: np.ndarray, labels: np.ndarray, pad_id: int, longest: int
    ) -> None:
        self._tokens = tokens
        self._lengths = lengths.astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._labels = labels.astype(np.int64)
        self._pad_id = pad_id
        self._longest = longest

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def token_count(self) -> int:
        """Tokens of one epoch, without padding."""
        return int(self._lengths.sum())

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each row, without padding."""
        found: np.ndarray = self._lengths[indices]
        return found

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """The class of each row."""
        found: np.ndarray = self._labels[indices]
        return found

    def padded_length(self, indices: np.ndarray) -> int:
        """The longest row of the batch, rounded up to `PAD_MULTIPLE` but not beyond the cut-off of the spec."""
        return int(padded(self._lengths[indices].max(), self._longest))

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`input_ids` and `attention_mask`, both (samples, columns), and `labels`, the class of each sample."""
        columns = np.arange(self.padded_length(indices) if pad_to is None else pad_to)
        lengths = self._lengths[indices]
        assert lengths.max() <= len(columns), "pad_to is shorter than a row"
        real = columns < lengths[:, None]
        places = np.where(real, self._starts[indices][:, None] + columns, 0)
        ids = np.where(real, self._tokens[places], self._pad_id).astype(np.int64)
        return {"input_ids": ids, "attention_mask": real.astype(np.int64), "labels": self.labels(indices)}


def write_packed(folder: Path, split: Split, parts: Iterable[np.ndarray]) -> int:
    """Writes a token stream part by part; the number of its tokens."""
    tokens = 0
    with (folder / f"{split}.bin").open("wb") as stream:
        for ids in parts:
            stream.write(ids.data)
            tokens += len(ids)
    return tokens


def write_labelled(
    folder: Path, split: Split, parts: Iterable[tuple[np.ndarray, np.ndarray]], *, labels: np.ndarray
) -> int:
    """Writes (ids, lengths) of rows part by part, and the class of each row; the number of their tokens."""
    lengths: list[np.ndarray] = []
    with (folder / f"{split}.bin").open("wb") as stream:
        for ids, each in parts:
            stream.write(ids.data)
            lengths.append(each)
    every = np.concatenate(lengths)
    np.save(folder / f"{split}.lengths.npy", every)
    np.save(folder / f"{split}.labels.npy", labels)
    return int(every.sum())


def padded(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Columns that rows of these lengths take: rounded up to `PAD_MULTIPLE`, but not beyond the cut-off."""
    columns: np.ndarray = np.minimum(-(-lengths // PAD_MULTIPLE) * PAD_MULTIPLE, longest)
    return columns


def row_columns(path: Path, split: Split, longest: int) -> np.ndarray:
    """Columns that each row of a split in the folder that `prepare` wrote would take alone."""
    return padded(np.load(path / f"{split}.lengths.npy").astype(np.int64), longest)


def histogram(columns: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(columns, how many rows take them), the fewest columns first."""
    values, counts = np.unique(columns, return_counts=True)
    return tuple(zip(values.tolist(), counts.tolist(), strict=True))


def packed_samples(tokens: int, length: int) -> int:
    """Blocks of `length` inputs in a stream: neighbours share a token, the target of one and input of the next."""
    return max(0, (tokens - 1) // length)


def masked_samples(tokens: int, length: int) -> int:
    """Blocks of `length` in a stream for masked language modelling: two tokens of each are not the stream's."""
    return tokens // (length - 2)


def packed_tokens(samples: int, length: int) -> int:
    """Tokens of a stream that so many blocks of `length` inputs take up."""
    return samples * length + 1


def masked_tokens(samples: int, length: int) -> int:
    """Tokens of a stream that so many blocks of `length` for masked language modelling take up."""
    return samples * (length - 2)


def shapes(path: Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What `DatasetCounts` says of the lengths of rows, or of the end of a stream that fills no block."""
    if not LEARNT[meta["task"]].models_language:
        train, validation = (row_columns(path, split, meta["sequence_length"]) for split in SPLITS)
        return {"columns": histogram(train), "longest": int(max(train.max(), validation.max()))}
    stream = (path / "train.bin").stat().st_size // np.dtype(meta["dtype"]).itemsize
    used = masked_tokens if LEARNT[meta["task"]].hides_tokens else packed_tokens
    return {"left_over_tokens": stream - used(meta["train_samples"], meta["sequence_length"])}


def open_split(path: Path, split: Split, *, masking: Masking | None = None) -> Samples:
    """A split of the folder that `prepare` wrote, without reading its tokens.

    `masking` is for masked language modelling alone; None is the usual one.
    Raises StorageError when the folder or a file of it is gone.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(path / f"{split}.bin", dtype=meta["dtype"], mode="r")
        # A plain array over the same map: np.memmap's own indexing costs 10 us more each time.
        plain = np.asarray(tokens)
        task = LEARNT[meta["task"]]
        if task.models_language and not task.hides_tokens:
            return PackedSamples(plain, length=meta["sequence_length"])
        if task.hides_tokens:
            vocabulary = Vocabulary.of(meta)
            return MaskedSamples(
                plain, length=meta["sequence_length"], vocabulary=vocabulary, masking=masking or Masking()
            )
        return LabelledSamples(
            plain,
            lengths=np.load(path / f"{split}.lengths.npy"),
            labels=np.load(path / f"{split}.labels.npy"),
            pad_id=meta["pad_id"],
            longest=meta["sequence_length"],
        )
    except OSError as error:
        raise StorageError(
            f"the prepared data in {path} cannot be read",
            got=error.strerror or str(error),
            do="the folder must be seen by every node: set ORCHESTRATOR_HOME or checkpoint.storage to a shared one",
        ) from error


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
