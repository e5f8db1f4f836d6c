"""Samples of unequal lengths -> blocks that they fill, each of them whole. Pure."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Which samples share a block."""

    members: np.ndarray
    """int64, numbers of the samples, those of each block together."""
    starts: np.ndarray
    """int64, one more than there are blocks: where each block's members begin, and where the last one's end."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, block: int) -> np.ndarray:
        """The samples in a block."""
        found: np.ndarray = self.members[self.starts[block] : self.starts[block + 1]]
        return found


def pack(lengths: np.ndarray, room: int) -> Packs:
    """Samples in blocks of at most `room` tokens by best-fit decreasing: the longest first, each into the fullest block
    that has room for it.

    It takes at most 11/9 of the fewest blocks possible, and one more (Johnson et al. 1974). Samples of one length keep
    their order, so the result is a function of the lengths alone. Those longer than `room` are the caller's to cut.
    """
    assert not len(lengths) or int(lengths.max()) <= room, "a sample is longer than a block"
    blocks: list[list[int]] = []
    open_blocks: dict[int, list[int]] = {}  # by the room that is left
    left: list[int] = []  # its keys, sorted
    for number in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[number])
        place = bisect.bisect_left(left, length)
        if place == len(left):
            free, block = room, len(blocks)
            blocks.append([])
        else:
            free = left[place]
            block = open_blocks[free].pop()
            if not open_blocks[free]:
                del open_blocks[free], left[place]
        blocks[block].append(number)
        free -= length
        if free not in open_blocks:
            bisect.insort(left, free)
            open_blocks[free] = []
        open_blocks[free].append(block)
    sizes = np.array([len(block) for block in blocks], dtype=np.int64)
    return Packs(
        members=np.array([number for block in blocks for number in block], dtype=np.int64),
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )


def alone(samples: int) -> Packs:
    """Each sample in a block of its own."""
    return Packs(members=np.arange(samples, dtype=np.int64), starts=np.arange(samples + 1, dtype=np.int64))
