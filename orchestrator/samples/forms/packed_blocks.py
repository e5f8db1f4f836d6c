"""Packed blocks: every token of a stream of documents is predicted once, from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.splits import Chosen, Split
from orchestrator.errors import ModelError
from orchestrator.samples import base_tokenizer
from orchestrator.samples.covered import DocumentEncoding, covered_bytes
from orchestrator.samples.forms.base import Inputs
from orchestrator.samples.forms.document_blocks import BlockSamples, DocumentBlocks, Ids
from orchestrator.samples.forms.token_file import read_tokens
from orchestrator.samples.masking import Batch, Masking
from orchestrator.samples.tokenization import TextTokenizer
from orchestrator.spec import RunSpec


class PackedSamples(BlockSamples):
    """Blocks for causal language modelling: neighbours share a token, the target of one and input of the next."""

    def __init__(self, tokens: np.ndarray, *, length: int) -> None:
        super().__init__(tokens, length=length, samples=_blocks(len(tokens), length))
        self._offsets = np.arange(length + 1)

    def batch(self, indices: np.ndarray, *, pad_to: int | None = None, epochs: np.ndarray | None = None) -> Batch:
        """`input_ids` and `labels`, the next token of each; both (samples, block length)."""
        blocks = self._tokens[np.asarray(indices)[:, None] * self._length + self._offsets].astype(np.int64)
        return {"input_ids": blocks[:, :-1], "labels": blocks[:, 1:]}


class PackedBlocks(DocumentBlocks):
    """See the module."""

    name = "packed-blocks"
    for_encoder = False
    beside_block = "and the token after it"

    def around(self, spec: RunSpec, tokenizer: TextTokenizer) -> tuple[Ids, Ids]:
        """See `DocumentBlocks`: those of the tokenizer's own template, with the end-of-text token after a document
        where the template has that nowhere.

        So Llama's documents begin with <s> and end with </s>, and GPT-2's have only <|endoftext|> between them.
        """
        if tokenizer.eos_id is None:
            raise ModelError(
                "the tokenizer names no end-of-text token to put between documents",
                got=base_tokenizer.tokenizer_location(spec.model),
                do="use the tokenizer of a causal language model, or name eos_token in its tokenizer_config.json",
            )
        before, after = tokenizer.before, tokenizer.after
        return before, after if tokenizer.eos_id in (*before, *after) else (*after, tokenizer.eos_id)

    def blocks(self, tokens: int, length: int) -> int:
        """See `DocumentBlocks`."""
        return _blocks(tokens, length)

    def stream(self, blocks: int, length: int) -> int:
        """See `DocumentBlocks`: the last token is a target alone."""
        return blocks * length + 1

    def covered(
        self, inputs: Inputs, tokenizer: TextTokenizer, held_out: Chosen, *, held_bytes: int, left_over: int
    ) -> dict[str, Any]:
        """See `DocumentBlocks`: what bits per byte are divided by."""
        before, after = self.around(inputs.spec, tokenizer)
        encoding = DocumentEncoding(encoder=tokenizer.encoder, cuts=tokenizer.cuts, before=before, after=after)
        return {"covered_bytes": covered_bytes(held_out, encoding, all_bytes=held_bytes, left_over=left_over)}

    def open(self, path: Path, split: Split, meta: Mapping[str, Any], *, masking: Masking) -> PackedSamples:
        """See `SampleForm`."""
        return PackedSamples(read_tokens(path, split, meta), length=meta["sequence_length"])


def _blocks(tokens: int, length: int) -> int:
    return max(0, (tokens - 1) // length)
