"""How long a training is: optimizer steps, the tokens that each sees, and the columns that its batches take.

Comes in: a spec and, once the data has been looked at, its counts. Goes out: a `Length`. Called by `plan`.

Tokens seen are those of the data, special ones included and padding not, for every task; what a batch computes is its
padded size. Packed blocks have no padding; a batch of any others is as wide as its longest sample, so what it takes
depends on the batch size, and is worked out here from how many rows there are of each length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import DataError
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.tasks.names import PACKED
from orchestrator.tasks.registry import task_of

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

PAD_MULTIPLE = 8
"""Columns of a batch of rows are rounded up to this: tensor cores want multiples of 8 in 16-bit formats (NVIDIA,
"Matrix Multiplication Background User's Guide")."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """What is trained on, step by step."""

    steps: int | None
    """Optimizer steps; None until the data that decides on them has been looked at."""
    tokens_per_step: int
    """Tokens seen in a step, on average; without padding, once the data has been looked at."""
    columns: tuple[tuple[int, float], ...]
    """(columns of a global batch, share of the batches that have so many), the fewest first."""
    longest: int
    """Columns of the longest batch that can occur, which its memory must hold."""
    reasons: tuple[str, ...]

    def padded_tokens(self, samples: int) -> float:
        """Tokens that a batch of so many samples computes, on average, padding included."""
        return samples * sum(columns * share for columns, share in self.columns)


def training_length(spec: RunSpec, counts: DatasetCounts | None) -> Length:
    """The length of a spec's training.

    Raises DataError when the data is smaller than one batch.
    """
    batch, cut_off, replayed = spec.training.global_batch, spec.data.sequence_length, spec.replayed
    own, retained = batch - replayed, None if counts is None else counts.retained
    if counts is not None and counts.train_samples < own:
        beside = f", {replayed} of them general data" if replayed else ""
        raise DataError(
            "the training data does not fill one batch",
            got=f"{counts.train_samples} samples of up to {cut_off} tokens for training.global_batch {batch}{beside}",
            do=f"set training.global_batch={max(1, counts.train_samples)} or less, a shorter data.sequence_length, "
            "or give more data",
        )
    if replayed and retained is not None and retained.train_samples < replayed:
        raise DataError(
            "the general data does not fill its part of one batch",
            got=f"{retained.train_samples} samples of up to {cut_off} tokens in retain.data",
            allowed=f"at least {replayed}: retain.replay {spec.retain.replay if spec.retain else 0:g} of {batch}",
            do="lower retain.replay, or give more general data",
        )
    is_packed = task_of(spec.task).form in PACKED
    known = counts is not None and (is_packed or counts.columns is not None)
    mean = counts.train_tokens / counts.train_samples if known and counts is not None else float(cut_off)
    if known and replayed and retained is not None:
        mean = (own * mean + replayed * retained.train_tokens / retained.train_samples) / batch
    columns: tuple[tuple[int, float], ...] = ((cut_off, 1.0),)
    longest = cut_off
    if counts is not None and counts.columns is not None:
        columns, longest = batch_columns(counts.columns, own), counts.longest or cut_off
        if retained is not None and retained.columns is not None:
            longest = max(longest, retained.longest or cut_off)
            columns = widest(columns, batch_columns(retained.columns, replayed)) if replayed else columns
    steps, why = _steps(spec, counts, mean if known or is_packed else None)
    return Length(
        steps=steps,
        tokens_per_step=max(1, round(batch * mean)),
        columns=columns,
        longest=longest,
        reasons=(why, *_about_samples(spec, counts, columns, mean)),
    )


def widest(one: tuple[tuple[int, float], ...], other: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """(columns, share) of the wider of two independent draws, ascending."""
    found, below = [], 0.0
    for width in sorted({width for width, _ in (*one, *other)}):
        at_most = math.prod(sum(share for columns, share in each if columns <= width) for each in (one, other))
        if at_most > below:
            found.append((width, at_most - below))
            below = at_most
    return tuple(found)


def batch_columns(columns: tuple[tuple[int, int], ...], batch: int) -> tuple[tuple[int, float], ...]:
    """(columns, share of the batches) when batches of `batch` samples are drawn from (columns, samples), ascending.

    A batch takes the columns of its longest sample. Of N samples, n of which take at most c columns, the share of
    batches with at most c is C(n, batch) / C(N, batch): an epoch draws without putting back.
    """
    every = sum(samples for _, samples in columns)
    found, below, reached = [], 0.0, 0
    for width, samples in columns:
        reached += samples
        at_most = math.exp(_log_choose(reached, batch) - _log_choose(every, batch)) if reached >= batch else 0.0
        if at_most > below:
            found.append((width, at_most - below))
            below = at_most
    return tuple(found)


def _log_choose(many: int, few: int) -> float:
    return math.lgamma(many + 1) - math.lgamma(few + 1) - math.lgamma(many - few + 1)


def warmup_steps(fraction: float, steps: int) -> int:
    """Steps over which the learning rate rises: the fraction rounded, and at least 1 unless it is zero."""
    return max(1, round(fraction * steps)) if fraction > 0 else 0


def _steps(spec: RunSpec, counts: DatasetCounts | None, mean: float | None) -> tuple[int | None, str]:
    """Optimizer steps and why; `mean` is the tokens of a sample where they are known."""
    training, batch = spec.training, spec.training.global_batch
    if training.steps is not None:
        return training.steps, f"steps: {training.steps:,}, as set"
    if training.tokens is not None:
        if mean is None:
            return None, f"steps: open until the data is read; the length is {training.tokens:,} tokens, padding aside"
        steps = math.ceil(training.tokens / (batch * mean))
        return steps, f"steps: {steps:,} = {training.tokens:,} tokens / ({batch} samples x {mean:.4g} tokens)"
    assert training.epochs is not None  # the spec holds one of the three
    if counts is None:
        return None, f"steps: open until the data is read; the length is {training.epochs:g} epochs"
    samples, own = counts.train_samples, batch - spec.replayed
    steps = math.ceil(training.epochs * samples / own)
    why = f"steps: {steps:,} = {training.epochs:g} epochs x {samples:,} samples / {own}"
    over = round(steps * own - training.epochs * samples)
    return steps, why + (f"; the last batch is filled up with {over} samples of the next pass" if over else "")


def _about_samples(
    spec: RunSpec, counts: DatasetCounts | None, columns: tuple[tuple[int, float], ...], mean: float
) -> Iterator[str]:
    """What a sample is, how much of a batch is padding, what is replayed, and what is left out."""
    length = spec.data.sequence_length
    if spec.replayed:
        yield f"replay: {spec.replayed} of the {spec.training.global_batch} samples of each batch are general data"
    if task_of(spec.task).form in PACKED:
        left = "" if counts is None else left_over(counts.left_over_tokens)
        yield (
            f"packing: documents stand one after the other with a separator between them, cut into blocks of {length} "
            f"tokens that go on over the end of a document{left}"
        )
    elif counts is None or counts.columns is None:
        yield f"lengths: every batch counts as {length} tokens wide, an upper bound, until the data is read"
    else:
        wide = sum(width * share for width, share in columns)
        yield (
            f"lengths: samples have {mean:.3g} tokens and batches are {wide:.3g} wide on average, as wide as their "
            f"longest one ({100 * (1 - mean / wide):.0f} % padding); memory is that of the widest, {counts.longest}"
        )


def left_over(tokens: int) -> str:
    """What ends a sentence about a stream of which so many tokens fill no block."""
    if not tokens:
        return ""
    return f"; the last {'token' if tokens == 1 else f'{tokens:,} tokens'} of the stream fill no block"
