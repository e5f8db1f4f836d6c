"""How long the rows of a labelled dataset are -> where to cut them off, and what batches of them take. Pure.

`advise` prices with the cut-off that the spec it writes trains with, and with batches as wide as their longest row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.planning.length import PAD_MULTIPLE, batch_columns

SPECIAL_TOKENS = 2
"""Tokens that a tokenizer puts around a row, as BERT's and RoBERTa's do."""
LONGEST_CUT_OFF = 512
"""Tokens of a row at most: the context of BERT and RoBERTa, and where Sun et al. 2019 (How to fine-tune BERT for text
classification) cut film reviews and news without loss. A guess for other texts."""
SHORTEST_CUT_OFF = 32
LEFT_OUT = 0.001
"""Share of the text that a cut-off may leave out to be shorter by half. A guess, near none: batches are as wide as
their longest row, so a longer cut-off costs no time, only the memory of the longest."""
BATCH = 16
"""Rows of an optimizer step: what the film-review runs and most published fine-tunings of encoders took."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a training sees of the rows."""

    cut_off: int
    """Tokens of a row at most, special ones included."""
    padded_tokens: float
    """Tokens that a row takes in its batch, on average, padding included."""
    widest: int
    """Columns of the widest batch, whose memory is needed."""
    left_out: float
    """Share of the text that stands behind the cut-off."""
    cut_rows: float
    """Share of the rows that are cut."""


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """How many of the rows read have how many tokens."""

    rows: tuple[tuple[int, int], ...]
    """(tokens without special ones, rows), ascending; empty rows have none."""

    @classmethod
    def of(cls, tokens: Iterable[int]) -> RowLengths:
        """From the tokens of each row."""
        return cls(rows=tuple(sorted(Counter(tokens).items())))

    def left_out(self, cut_off: int) -> float:
        """Share of the text behind a cut-off."""
        every = sum(tokens * rows for tokens, rows in self.rows)
        behind = sum(max(0, tokens + SPECIAL_TOKENS - cut_off) * rows for tokens, rows in self.rows)
        return behind / every if every else 0.0

    def cut_off(self, context: int | None) -> int:
        """The least power of two that leaves out next to nothing, within the base's context and `LONGEST_CUT_OFF`."""
        limit = min(LONGEST_CUT_OFF, context or LONGEST_CUT_OFF)
        cut_off = SHORTEST_CUT_OFF
        while cut_off < limit and self.left_out(cut_off) > LEFT_OUT:
            cut_off *= 2
        return min(cut_off, limit)

    def seen(self, *, context: int | None, batch: int) -> Seen:
        """What batches of so many rows take, cut off where `cut_off` says."""
        cut_off, every = self.cut_off(context), sum(rows for _, rows in self.rows)
        columns: Counter[int] = Counter()
        for tokens, rows in self.rows:
            columns[min(-(-(tokens + SPECIAL_TOKENS) // PAD_MULTIPLE) * PAD_MULTIPLE, cut_off)] += rows
        widths = batch_columns(tuple(sorted(columns.items())), min(batch, every))
        return Seen(
            cut_off=cut_off,
            padded_tokens=sum(width * share for width, share in widths),
            widest=max(columns),
            left_out=self.left_out(cut_off),
            cut_rows=sum(rows for tokens, rows in self.rows if tokens + SPECIAL_TOKENS > cut_off) / every,
        )


def fine_tuning_batch(examples: int) -> int:
    """Rows of an optimizer step: fewer where there are few, so that a pass has some steps."""
    return max(1, min(BATCH, examples // 4))
