"""Samples of unequal lengths fill blocks whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.samples.packing import alone, pack


@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_sample_is_in_one_block_that_has_room_for_it(lengths: list[int]) -> None:
    packs = pack(np.array(lengths, dtype=np.int32), 64)
    blocks = [packs.of(block).tolist() for block in range(len(packs))]
    assert sorted(number for block in blocks for number in block) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in block) <= 64 for block in blocks)
    # Best fit never leaves two blocks whose samples would fit into one.
    sizes = sorted(sum(lengths[number] for number in block) for block in blocks)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 64


def test_blocks_are_filled_up() -> None:
    packs = pack(np.array([6, 5, 5, 4, 3, 7]), 10)
    assert [packs.of(block).tolist() for block in range(len(packs))] == [[5, 4], [0, 3], [1, 2]]


def test_samples_that_share_no_block_keep_their_order() -> None:
    packs = alone(3)
    assert [packs.of(block).tolist() for block in range(len(packs))] == [[0], [1], [2]]
