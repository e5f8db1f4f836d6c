from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.facts.row_lengths import RowLengths, fine_tuning_batch
from orchestrator.samples.forms.labelled_texts import padded

TOKENS = st.lists(st.integers(0, 5000), min_size=1, max_size=200)


def simulated(tokens: list[int], *, cut_off: int, batch: int, epochs: int) -> float:
    """Columns of batches that are really drawn and padded as `run` pads them, per row."""
    draw, columns = random.Random(0), []
    lengths = np.minimum(np.array(tokens) + 2, cut_off)
    for _ in range(epochs):
        order = draw.sample(range(len(tokens)), len(tokens))
        for start in range(0, len(order) - batch + 1, batch):
            columns.append(int(padded(lengths[order[start : start + batch]].max(), cut_off)))
    return sum(columns) / len(columns)


def test_padded_tokens_are_those_of_batches_as_wide_as_their_longest_row() -> None:
    draw = random.Random(1)
    tokens = [min(900, int(draw.lognormvariate(3.5, 0.8))) for _ in range(640)]
    seen = RowLengths.of(tokens).seen(context=None, batch=16)
    assert seen.padded_tokens == pytest.approx(simulated(tokens, cut_off=512, batch=16, epochs=40), rel=0.02)
    assert seen.padded_tokens < 0.35 * seen.cut_off, "the cut-off is no measure of what is computed"


def test_rows_longer_than_the_base_reads_are_cut_there_and_the_share_is_told() -> None:
    seen = RowLengths.of([1000] * 9 + [10]).seen(context=256, batch=16)
    assert (seen.cut_off, seen.widest, seen.cut_rows) == (256, 256, 0.9)
    assert seen.left_out == pytest.approx(9 * (1002 - 256) / 9010)
    assert RowLengths.of([1000]).cut_off(8192) == 512


def test_short_rows_are_not_cut() -> None:
    seen = RowLengths.of([9, 40, 61]).seen(context=512, batch=16)
    assert (seen.cut_off, seen.widest, seen.left_out, seen.cut_rows) == (64, 64, 0.0, 0.0)


@given(TOKENS, st.sampled_from([None, 64, 512, 8192]), st.sampled_from([1, 16]))
def test_what_is_seen_is_within_its_bounds(tokens: list[int], context: int | None, batch: int) -> None:
    lengths = RowLengths.of(tokens)
    seen = lengths.seen(context=context, batch=batch)
    assert seen.cut_off <= min(512, context or 512)
    assert min(max(tokens) + 2, seen.cut_off) <= seen.widest <= seen.cut_off
    assert seen.padded_tokens <= seen.widest
    assert seen.padded_tokens * len(tokens) >= 0.999 * sum(min(one + 2, seen.cut_off) for one in tokens)
    assert 0 <= seen.left_out < 1
    assert (seen.left_out == 0) == (seen.cut_rows == 0) or seen.cut_rows > 0


def test_a_few_rows_still_make_some_steps() -> None:
    assert [fine_tuning_batch(examples) for examples in (1, 10, 64, 10_000)] == [1, 2, 16, 16]
