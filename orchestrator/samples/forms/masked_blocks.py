"""Masked blocks: a share of the tokens of each block is hidden, and predicted from both sides.

A block stands between two special tokens. That is RoBERTa's FULL-SENTENCES format (Liu et al. 2019): it goes on over
the end of a document, and the stream holds a separator there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.splits import Split
from orchestrator.errors import ModelError
from orchestrator.samples import base_tokenizer
from orchestrator.samples.forms.document_blocks import BlockSamples, DocumentBlocks, Ids
from orchestrator.samples.forms.token_file import read_tokens
from orchestrator.samples.masking import Batch, Masking, Vocabulary, mask
from orchestrator.samples.tokenization import TextTokenizer
from orchestrator.spec import RunSpec


class MaskedSamples(BlockSamples):
    """Blocks for masked language modelling, each between two special tokens."""

    def __init__(self, tokens: np.ndarray, *, length: int, vocabulary: Vocabulary, masking: Masking) -> None:
        super().__init__(tokens, length=length, samples=_blocks(len(tokens), length))
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


class MaskedBlocks(DocumentBlocks):
    """See the module."""

    name = "masked-blocks"
    for_encoder = True
    beside_block = "less a first and a last token"

    def around(self, spec: RunSpec, tokenizer: TextTokenizer) -> tuple[Ids, Ids]:
        """See `DocumentBlocks`: a separator after each."""
        return (), (int(self.kept_ids(spec, tokenizer)["sep_id"]),)

    def kept_ids(self, spec: RunSpec, tokenizer: TextTokenizer) -> dict[str, Any]:
        """What masking must know of the tokenizer. Raises ModelError when it has no mask token, or none around a
        text."""
        ids = {"mask_id": tokenizer.mask_id, "cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id}
        absent = [name.replace("_id", "_token") for name, found in ids.items() if found is None]
        if absent:
            raise ModelError(
                f"the tokenizer names no {' and no '.join(absent)}, which task: masked-lm needs",
                got=base_tokenizer.tokenizer_location(spec.model),
                do="use an encoder's, such as BERT's or RoBERTa's, or task: causal-lm for a decoder",
            )
        return {**ids, "special_ids": sorted({*tokenizer.special_ids, *ids.values()})}

    def blocks(self, tokens: int, length: int) -> int:
        """See `DocumentBlocks`."""
        return _blocks(tokens, length)

    def stream(self, blocks: int, length: int) -> int:
        """See `DocumentBlocks`: two tokens of a block are not the stream's."""
        return blocks * (length - 2)

    def open(self, path: Path, split: Split, meta: Mapping[str, Any], *, masking: Masking) -> MaskedSamples:
        """See `SampleForm`."""
        tokens, vocabulary = read_tokens(path, split, meta), Vocabulary.of(meta)
        return MaskedSamples(tokens, length=meta["sequence_length"], vocabulary=vocabulary, masking=masking)


def _blocks(tokens: int, length: int) -> int:
    return tokens // (length - 2)
