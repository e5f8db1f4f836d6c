"""Which tokens a masked language model predicts, and what it sees in their place (Devlin et al. 2019).

Called by `forms.masked_blocks` for every batch. All draws are a pure function of (seed, sample, how often it was seen),
so that any number of workers, any micro-batch and any resumed run sees the same masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.samples.counter_rng import GOLDEN, mix
from orchestrator.spec import MASKING_RATE
from orchestrator.tasks.masked_lm import NO_LABEL

Batch = dict[str, np.ndarray]

HIDDEN, REPLACED = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token, and any other token; the rest stays (Devlin et al. 2019)."""
# What the draws are for, so that they share none with each other or with the order of the samples.
_TRAINING, _EVALUATION = np.uint64(0x6D61736B65642D31), np.uint64(0x6D61736B65642D32)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What masking knows of a tokenizer."""

    size: int
    """Highest id plus one."""
    mask_id: int
    cls_id: int
    """Begins every block."""
    sep_id: int
    """Ends every block, and documents within."""
    special_ids: tuple[int, ...]
    """Ids that are never chosen and never drawn as a replacement, the three above among them."""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Vocabulary:
        """That of prepared data, from its `meta.json`."""
        return cls(
            size=meta["vocab_size"],
            mask_id=meta["mask_id"],
            cls_id=meta["cls_id"],
            sep_id=meta["sep_id"],
            special_ids=tuple(meta["special_ids"]),
        )

    @cached_property
    def is_special(self) -> np.ndarray:
        """For every id whether it is special."""
        return np.isin(np.arange(self.size), self.special_ids)

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """All ids that are not special."""
        return np.flatnonzero(~self.is_special)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How much is predicted, and the seed that says what."""

    rate: float = MASKING_RATE
    seed: int = 0

    def keys(self, samples: np.ndarray, epochs: np.ndarray | None) -> np.ndarray:
        """One uint64 for every time that a sample is seen; without `epochs` one for each sample, whatever the seed."""
        numbers = np.asarray(samples).astype(np.uint64)
        if epochs is None:
            return mix(numbers ^ _EVALUATION)
        seed = mix(np.full(1, self.seed, dtype=np.uint64) ^ _TRAINING)
        return mix(mix(seed ^ np.asarray(epochs).astype(np.uint64)) ^ numbers)


def predicted_tokens(length: int, rate: float) -> int:
    """Tokens that are predicted in each block of `length`: as in BERT's own code the rate rounded, at least one."""
    return max(1, round(rate * length))


def mask(blocks: np.ndarray, keys: np.ndarray, *, rate: float, vocabulary: Vocabulary) -> Batch:
    """`input_ids` like `blocks`, with some tokens hidden, and `positions` and `labels` of those, (blocks, chosen).

    Every block has as many positions, so that the mean over equal micro-batches is the mean over all of them, however
    they are cut. A block with fewer ordinary tokens than that fills up with positions whose label is `NO_LABEL`.
    """
    chosen = _chosen(blocks, keys, count=predicted_tokens(blocks.shape[1], rate), vocabulary=vocabulary)
    tokens = np.take_along_axis(blocks, chosen, axis=1)
    ordinary = ~vocabulary.is_special[tokens]
    # A second draw for each: the upper half says what becomes of the token, the lower which one replaces it.
    drawn = mix(mix(keys)[:, None] + chosen.astype(np.uint64) * GOLDEN)
    fate = (drawn >> np.uint64(32)).astype(np.float64) / 2**32
    other = vocabulary.ordinary_ids[(drawn & np.uint64(0xFFFFFFFF)) % np.uint64(len(vocabulary.ordinary_ids))]
    seen = np.select(
        [~ordinary, fate < HIDDEN, fate < HIDDEN + REPLACED], [tokens, vocabulary.mask_id, other], default=tokens
    )
    inputs = blocks.copy()
    np.put_along_axis(inputs, chosen, seen, axis=1)
    return {"input_ids": inputs, "positions": chosen, "labels": np.where(ordinary, tokens, NO_LABEL)}


def _chosen(blocks: np.ndarray, keys: np.ndarray, *, count: int, vocabulary: Vocabulary) -> np.ndarray:
    """Ascending positions of `count` tokens of each block: those that draw the least; special ones only for want."""
    places = np.arange(blocks.shape[1], dtype=np.uint64)
    drawn = mix(keys[:, None] + places * GOLDEN) >> np.uint64(1)
    drawn[vocabulary.is_special[blocks]] = np.iinfo(np.uint64).max
    return np.sort(np.argpartition(drawn, count - 1, axis=1)[:, :count], axis=1)
