"""The held-out text that a causal language model is measured on, in bytes: what its bits per byte are divided by.

Evaluation predicts every token of whole blocks: all but the first, which nothing precedes, and the remainder after the
last whole block. The text of those two does not count. So models compare that cut the same text into other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.data.splits import Chosen
from orchestrator.samples.tokenization import CUTS, Cut, Encoder, count_tokens, end_of_tokens, pieces


@dataclass(frozen=True, kw_only=True)
class DocumentEncoding:
    """How a document becomes tokens, as `tokenization.encode_documents` does it."""

    encoder: Encoder
    cuts: Cut
    before: Sequence[int]
    after: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    text: str
    begins: bool
    ends: bool


def covered_bytes(held_out: Chosen, encoding: DocumentEncoding, *, all_bytes: int, left_over: int) -> int:
    """UTF-8 bytes of the held-out documents from the end of their first token to the start of their last `left_over`.

    `all_bytes` is those of all of them but blank ones, which `encode_documents` does not get either. Reads and encodes
    only what lies at the two ends. A character of which only a part is in the first token or in the last one that
    counts is taken to be all in it; white space that the tokenizer drops counts with what follows.
    """
    first = next(_pieces(held_out, encoding.cuts))
    uncovered = 0 if encoding.before else _bytes_up_to(first, 1, encoding)
    for piece in _from_the_end(held_out, encoding.cuts):
        if left_over == 0:
            break
        tokens = _tokens(piece, encoding)
        taken = min(left_over, tokens)
        between = 0 if piece.begins else CUTS[encoding.cuts][1]  # a blank that was left out where the text was cut
        covered = _bytes_up_to(piece, tokens - taken, encoding)
        uncovered += len(piece.text.encode()) - covered + (between if taken == tokens else 0)
        left_over -= taken
    return all_bytes - uncovered


def _pieces(documents: Chosen, cuts: Cut) -> Iterator[_Piece]:
    for text in documents:
        if text and not text.isspace():
            begins = True
            for part, ends in pieces(text, cuts):
                yield _Piece(text=part, begins=begins, ends=ends)
                begins = False


def _from_the_end(documents: Chosen, cuts: Cut) -> Iterator[_Piece]:
    """All pieces, the last one first; documents are read two, four, eight at a time."""
    end, count = len(documents.numbers), 1
    while end > 0:
        start = max(0, end - count)
        some = replace(documents, numbers=np.asarray(documents.numbers)[start:end])
        yield from reversed(list(_pieces(some, cuts)))
        end, count = start, 2 * count


def _tokens(piece: _Piece, encoding: DocumentEncoding) -> int:
    around = len(encoding.before) * piece.begins + len(encoding.after) * piece.ends
    return count_tokens(piece.text, tokenizer=encoding.encoder) + around


def _bytes_up_to(piece: _Piece, tokens: int, encoding: DocumentEncoding) -> int:
    """Bytes of a piece up to the end of so many of its tokens, those that stand around its document included."""
    own = tokens - len(encoding.before) * piece.begins
    return len(piece.text[: end_of_tokens(piece.text, own, tokenizer=encoding.encoder)].encode()) if own > 0 else 0
