"""A tokenizer and a task -> the pure function that turns a chunk of text into ids, here or in a Ray task."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from orchestrator.data.splits import Chosen
from orchestrator.errors import ModelError
from orchestrator.samples import base_tokenizer, new_tokenizer, tokenization
from orchestrator.samples.tokenization import Chunk, TextTokenizer
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of


def row_encoder(spec: RunSpec, tokenizer: TextTokenizer) -> Callable[[Chunk], tuple[np.ndarray, np.ndarray]]:
    """What turns rows into ids and their lengths, cut off where the spec says."""
    return functools.partial(
        tokenization.encode_rows,
        tokenizer=tokenizer.encoder,
        sequence_length=spec.data.sequence_length,
        pad_id=tokenizer.pad_id,
        side=tokenizer.truncation_side,
    )


def document_encoder(spec: RunSpec, tokenizer: TextTokenizer) -> Callable[[Chunk], np.ndarray]:
    """What turns documents into ids. Raises ModelError when the tokenizer lacks what the task needs."""
    before, after = around(tokenizer, spec)
    return functools.partial(tokenization.encode_documents, tokenizer=tokenizer.encoder, before=before, after=after)


def around(tokenizer: TextTokenizer, spec: RunSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after each document: those of the tokenizer's own template, with the end-of-text token after
    it where the template has that nowhere. Raises ModelError when the tokenizer lacks what the task needs.

    So Llama's documents begin with <s> and end with </s>, and GPT-2's have only <|endoftext|> between them.
    """
    if task_of(spec.task).hides_tokens:
        return (), (int(mask_ids(tokenizer, spec)["sep_id"]),)
    if tokenizer.eos_id is None:
        raise ModelError(
            "the tokenizer names no end-of-text token to put between documents",
            got=base_tokenizer.tokenizer_location(spec.model),
            do="use the tokenizer of a causal language model, or name eos_token in its tokenizer_config.json",
        )
    before, after = tokenizer.before, tokenizer.after
    return before, after if tokenizer.eos_id in (*before, *after) else (*after, tokenizer.eos_id)


def mask_ids(tokenizer: TextTokenizer, spec: RunSpec) -> dict[str, Any]:
    """What masking must know of the tokenizer. Raises ModelError when it has no mask token, or none around a text."""
    ids = {"mask_id": tokenizer.mask_id, "cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id}
    absent = [name.replace("_id", "_token") for name, found in ids.items() if found is None]
    if absent:
        raise ModelError(
            f"the tokenizer names no {' and no '.join(absent)}, which task: masked-lm needs",
            got=base_tokenizer.tokenizer_location(spec.model),
            do="use an encoder's, such as BERT's or RoBERTa's, or task: causal-lm for a decoder",
        )
    return {**ids, "special_ids": sorted({*tokenizer.special_ids, *ids.values()})}


def tokenizer_of(spec: RunSpec, train: Chosen, *, most_bytes: int = new_tokenizer.BPE_SAMPLE_BYTES) -> TextTokenizer:
    """A tokenizer of the documents: all, or so many drawn by the seed as it takes."""
    return new_tokenizer.train_tokenizer(
        sample(train, spec.data.split_seed, most_bytes),
        vocab_size=spec.model.vocab_size,
        sequence_length=spec.data.sequence_length,
        for_encoder=task_of(spec.task).hides_tokens,
    )


def sample(train: Chosen, seed: int, most_bytes: int) -> Chosen:
    """All documents, or as many drawn by the seed as it takes to hold so many bytes."""
    drawn = np.random.default_rng(seed).permutation(train.numbers)
    before = np.cumsum(train.documents.sizes[drawn]) - train.documents.sizes[drawn]
    return replace(train, numbers=np.sort(drawn[before < most_bytes]))
