"""Conversations as JSON -> token ids, and which of them an assistant said. Pure; here or in a Ray task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.errors import DataError
from orchestrator.samples.chat_templates import ChatTemplate, Rendered, rendered
from orchestrator.samples.tokenization import Chunk, Encoder, locate_tokens, token_dtype
from orchestrator.spec_data import TooLong


@dataclass(frozen=True, kw_only=True)
class ChatEncoding:
    """How conversations become tokens."""

    template: ChatTemplate
    tokenizer: Encoder
    vocab_size: int
    special_ids: tuple[int, ...]
    """Ids that stand for no text, one of which ends a turn."""
    length: int
    """Tokens of a sample at most."""
    too_long: TooLong


@dataclass(frozen=True, kw_only=True)
class EncodedChats:
    """Samples, one after the other: each conversation is one, or one for each of its answers."""

    tokens: np.ndarray
    spoken: np.ndarray
    """uint8, for each token whether an assistant said it."""
    lengths: np.ndarray
    """int32, tokens of each sample."""
    ends: frozenset[int]
    """Special tokens that end an assistant's turns."""
    conversations: int
    cut: int
    """Samples that were too long and lost their end."""
    left_out: int
    """Samples that were too long, or held no answer any more when they were cut."""
    problem: tuple[int, DataError] | None = None
    """The first conversation that cannot be encoded, by its number among these, and why."""


def encode_chats(chunk: Chunk, *, encoding: ChatEncoding) -> EncodedChats:
    """The conversations of a chunk, up to the first that cannot be encoded."""
    samples: list[tuple[list[int], np.ndarray]] = []
    ends: set[int] = set()
    cut = left_out = 0
    problem = None
    for number, text in enumerate(chunk.texts):
        try:
            found = list(rendered(json.loads(text), encoding.template))
            for ids, spoken in _tokens(found, encoding, ends):
                if len(ids) > encoding.length:
                    if encoding.too_long == "refuse":
                        raise _too_long(len(ids), encoding.length)
                    if encoding.too_long == "leave-out" or not spoken[: encoding.length].any():
                        left_out += 1
                        continue
                    cut += 1
                if spoken.any():
                    samples.append((ids[: encoding.length], spoken[: encoding.length]))
                else:
                    left_out += 1
        except DataError as error:
            problem = number, error
            break
    return EncodedChats(
        tokens=np.array([i for ids, _ in samples for i in ids], dtype=token_dtype(encoding.vocab_size)),
        spoken=np.concatenate([np.empty(0, dtype=np.uint8), *(spoken for _, spoken in samples)]),
        lengths=np.array([len(ids) for ids, _ in samples], dtype=np.int32),
        ends=frozenset(ends),
        conversations=len(chunk.texts),
        cut=cut,
        left_out=left_out,
        problem=problem,
    )


def _tokens(texts: Sequence[Rendered], encoding: ChatEncoding, ends: set[int]) -> list[tuple[list[int], np.ndarray]]:
    """(ids, uint8 whether an assistant said each) of each text; the special tokens that end turns come to `ends`."""
    borders = [[place for span in one.spoken for place in span] for one in texts]
    located = locate_tokens([one.text for one in texts], borders, tokenizer=encoding.tokenizer)
    special = np.array(encoding.special_ids, dtype=np.int64)
    found = []
    for one, (ids, begins) in zip(texts, located, strict=True):
        begin_of, is_special = np.array(begins, dtype=np.int64), np.isin(np.array(ids, dtype=np.int64), special)
        spoken = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in one.spoken:
            own = np.flatnonzero((begin_of >= begin) & (begin_of < end))
            marks = own[is_special[own]]
            # What a template writes behind the token that ends a turn is not the assistant's.
            if len(marks) and marks[-1] < own[-1] and not one.text[begin_of[marks[-1] + 1] : end].strip():
                own = own[own <= marks[-1]]
            if len(marks) and marks[-1] == own[-1]:
                ends.add(ids[marks[-1]])
            spoken[own] = 1
        found.append((ids, spoken))
    return found


def _too_long(tokens: int, length: int) -> DataError:
    return DataError(
        "a conversation is longer than data.sequence_length",
        got=f"{tokens:,} tokens",
        allowed=f"at most {length:,}",
        do="raise data.sequence_length, or set data.too_long to cut or leave-out",
    )
