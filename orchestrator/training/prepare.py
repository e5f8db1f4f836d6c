"""A spec's data -> a folder of token ids that every worker maps into memory. Called once by the driver.

The folder's name is a fingerprint of all that shapes its content, so the same data is encoded once for all runs and
trials. It is written beside and renamed: a folder under its name is whole, whoever died on the way.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from orchestrator.data.contents import contents_of
from orchestrator.data.held_out import Account, HeldOut
from orchestrator.data.sources import Source, find_sources
from orchestrator.data.spec_columns import with_columns
from orchestrator.errors import DataError, ModelError
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.spec import RunSpec
from orchestrator.training import base_tokenizer, batches, new_tokenizer, tokenization
from orchestrator.training.sampling import preview
from orchestrator.training.splits import Chosen, split_documents, split_rows
from orchestrator.training.tokenization import Chunk, TextTokenizer
from orchestrator.training.whole_folder import whole_folder

T = TypeVar("T")

FORMAT_VERSION = 2
"""Part of the fingerprint: raise it when files of the same name would hold something else."""


class EncodeMany(Protocol):
    """Applies a pure function to chunks of text and gives the results in order; knows where to run it."""

    def __call__(self, function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        """Takes chunks only as fast as results are taken."""
        ...


def encode_here(function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
    """Encodes in this process, on its threads."""
    return map(function, chunks)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Where the encoded data lies, and what it holds."""

    path: Path
    fingerprint: str
    """Hex digits over everything that shaped the data; also the folder's name."""
    counts: DatasetCounts
    label_names: tuple[str, ...] | None
    """Name of each class, by its number; None for language modelling."""
    tokenizer_folder: Path
    """Loads with `transformers.AutoTokenizer.from_pretrained`."""
    eos_id: int | None
    """Ends a document; some encoder models have none."""
    pad_id: int
    cls_id: int | None
    """Begins every block for masked language modelling; None for other tasks."""
    bytes: int
    """UTF-8 bytes of the training text."""
    validation_bytes: int
    """UTF-8 bytes of the held-out text; with the loss they give bits per byte, comparable across tokenizers."""
    held_out: HeldOut
    """The examples that runs on this data are measured on."""
    cached: bool
    """True when the folder was there already."""
    notes: tuple[str, ...] = ()
    """What was taken for granted of the data, a sentence each."""

    @property
    def held_out_fingerprint(self) -> str:
        """Equal for runs that are measured on the same text, whatever their tokenizers."""
        return self.held_out.fingerprint


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What is known before any text is read."""

    spec: RunSpec
    """With the columns named that it leaves open."""
    notes: tuple[str, ...]
    train: tuple[Source, ...]
    validation: tuple[Source, ...]
    location: str | None
    """Of the tokenizer, if it is not trained on the corpus."""
    tokenizer: TextTokenizer | None
    """None until it is trained on the corpus."""


def find_prepared(spec: RunSpec, *, cache: Path, base: str | None = None) -> PreparedData | None:
    """What `prepare` would find below `cache`, or None after a look at the data that encodes nothing.

    Raises what `prepare` raises, but for what only tokens show: text too short for one block.
    """
    inputs = _find_inputs(spec, base)
    folder = cache / _fingerprint(inputs)
    if (folder / "meta.json").is_file():
        return _load(folder, inputs, cached=True)
    split = split_documents if spec.models_language else split_rows
    split(inputs.spec, inputs.train, inputs.validation)
    return None


def prepare(spec: RunSpec, *, cache: Path, encode: EncodeMany, base: str | None = None) -> PreparedData:
    """The spec's data, split, encoded and on disk below `cache`; a second call finds it there.

    `base` says where `model.base` lies when the caller fetched it (a finished run's model).
    Raises DataError for data that does not hold what the spec says, ModelError for an unusable tokenizer,
    StorageError when `cache` cannot be written.
    """
    inputs = _find_inputs(spec, base)
    fingerprint = _fingerprint(inputs)
    folder = cache / fingerprint
    if (folder / "meta.json").is_file():
        return _load(folder, inputs, cached=True)
    with whole_folder(folder, last="meta.json") as partial:
        _write(inputs, partial, encode)
    return _load(folder, inputs, cached=False)


def _find_inputs(spec: RunSpec, base: str | None) -> _Inputs:
    data = spec.data
    location = base_tokenizer.tokenizer_location(spec.model)
    if base is not None and location == spec.model.base:
        location = base
    tokenizer = None if location is None else base_tokenizer.load_tokenizer(location)
    if tokenizer is not None and spec.models_language:
        _around(tokenizer, spec)  # refused before anything starts
    find = functools.partial(find_sources, exclude=data.exclude, data_format=data.format)
    train = find(data.train)
    named, notes = with_columns(spec, train, look=preview)
    return _Inputs(
        spec=named,
        notes=notes,
        train=train,
        validation=() if data.validation is None else find(data.validation, split="validation"),
        location=location,
        tokenizer=tokenizer,
    )


def _fingerprint(inputs: _Inputs) -> str:
    spec, data = inputs.spec, inputs.spec.data
    drawn = not (inputs.validation and inputs.tokenizer) or data.max_train_examples or data.max_validation_examples
    parts = {
        "format": FORMAT_VERSION,
        "task": spec.task,
        "train": contents_of(inputs.train),
        "validation": contents_of(inputs.validation),
        "columns": [data.text_column, data.label_column],
        "validation_fraction": None if inputs.validation else data.validation_fraction,
        "max_examples": [data.max_train_examples, data.max_validation_examples],
        "seed": data.split_seed if drawn else None,
        "sequence_length": data.sequence_length,
        "tokenizer": spec.model.vocab_size if inputs.tokenizer is None else inputs.tokenizer.fingerprint(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(inputs: _Inputs, folder: Path, encode: EncodeMany) -> None:
    """All files of the prepared folder, `meta.json` last."""
    if inputs.spec.models_language:
        tokenizer, found = _write_documents(inputs, folder, encode)
    else:
        assert inputs.tokenizer is not None, "classification fine-tunes a base model, which has a tokenizer"
        tokenizer, found = inputs.tokenizer, _write_rows(inputs, inputs.tokenizer, folder, encode)
    tokenizer.save(folder / "tokenizer")
    meta = {
        "task": inputs.spec.task,
        "dtype": np.dtype(tokenization.token_dtype(tokenizer.vocab_size)).name,
        "sequence_length": inputs.spec.data.sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        **(_mask_ids(tokenizer, inputs.spec) if inputs.spec.task == "masked-lm" else {}),
        **found,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _load(folder: Path, inputs: _Inputs, *, cached: bool) -> PreparedData:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    names = None if meta["label_names"] is None else tuple(meta["label_names"])
    counted = {key: meta[key] for key in ("train_samples", "train_tokens", "validation_samples", "vocab_size")}
    return PreparedData(
        path=folder,
        fingerprint=folder.name,
        counts=DatasetCounts(**counted, **_shapes(folder, meta), num_labels=None if names is None else len(names)),
        label_names=names,
        tokenizer_folder=folder / "tokenizer",
        eos_id=meta["eos_id"],
        pad_id=meta["pad_id"],
        cls_id=meta.get("cls_id"),
        bytes=meta["train_bytes"],
        validation_bytes=meta["validation_bytes"],
        held_out=HeldOut.of(meta["held_out"]),
        cached=cached,
        notes=inputs.notes,
    )


def _shapes(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """What counts say of the lengths of rows, or of a stream that blocks are cut from."""
    if meta["task"] == "text-classification":
        wide = [batches.row_columns(folder, split, meta["sequence_length"]) for split in ("train", "validation")]
        return {"columns": batches.histogram(wide[0]), "longest": int(max(columns.max() for columns in wide))}
    stream = (folder / "train.bin").stat().st_size // np.dtype(meta["dtype"]).itemsize
    used = batches.masked_tokens if meta["task"] == "masked-lm" else batches.packed_tokens
    return {"left_over_tokens": stream - used(meta["train_samples"], meta["sequence_length"])}


def _write_documents(inputs: _Inputs, folder: Path, encode: EncodeMany) -> tuple[TextTokenizer, dict[str, Any]]:
    spec = inputs.spec
    train, validation = split_documents(spec, inputs.train, inputs.validation)
    _compare(inputs, train)
    tokenizer = inputs.tokenizer or new_tokenizer.train_tokenizer(
        _sample(train, spec.data.split_seed),
        vocab_size=spec.model.vocab_size,
        sequence_length=spec.data.sequence_length,
        for_encoder=spec.task == "masked-lm",
    )
    before, after = _around(tokenizer, spec)
    function = functools.partial(tokenization.encode_documents, tokenizer=tokenizer.encoder, before=before, after=after)
    count_samples = batches.masked_samples if spec.task == "masked-lm" else batches.packed_samples
    found: dict[str, Any] = {"label_names": None}
    # The small one first: if it is too short, nothing long was encoded in vain.
    account = Account()
    splits: tuple[tuple[batches.Split, Iterator[str]], ...] = (
        ("validation", account.held_out(_not_blank(validation))),
        ("train", account.training(_not_blank(train))),
    )
    for split, texts in splits:
        chunks = tokenization.document_chunks(texts, cuts=tokenizer.cuts)
        tokens = batches.write_packed(folder, split, encode(function, chunks))
        samples = count_samples(tokens, spec.data.sequence_length)
        if samples == 0:
            raise _too_short(split, tokens, inputs)
        found |= {f"{split}_samples": samples, f"{split}_tokens": samples * spec.data.sequence_length}
    return tokenizer, found | _accounted(account, inputs)


def _around(tokenizer: TextTokenizer, spec: RunSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after each document: those of the tokenizer's own template, with the end-of-text token after
    it where the template has that nowhere. Raises ModelError when the tokenizer lacks what the task needs.

    So Llama's documents begin with <s> and end with </s>, and GPT-2's have only <|endoftext|> between them.
    """
    if spec.task == "masked-lm":
        return (), (int(_mask_ids(tokenizer, spec)["sep_id"]),)
    if tokenizer.eos_id is None:
        raise ModelError(
            "the tokenizer names no end-of-text token to put between documents",
            got=base_tokenizer.tokenizer_location(spec.model),
            do="use the tokenizer of a causal language model, or name eos_token in its tokenizer_config.json",
        )
    before, after = tokenizer.before, tokenizer.after
    return before, after if tokenizer.eos_id in (*before, *after) else (*after, tokenizer.eos_id)


def _compare(inputs: _Inputs, texts: Iterable[str]) -> None:
    """Raises ModelError where a sample of the training text gets other ids than transformers gives it."""
    if inputs.tokenizer is not None and inputs.location is not None:
        base_tokenizer.check_sample(inputs.tokenizer, inputs.location, texts)


def _mask_ids(tokenizer: TextTokenizer, spec: RunSpec) -> dict[str, Any]:
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


def _not_blank(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text and not text.isspace())


def _accounted(account: Account, inputs: _Inputs, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What `meta.json` says of the text of both splits."""
    held_out = account.result(
        "documents" if inputs.spec.models_language else "rows",
        asked=None if inputs.validation else inputs.spec.data.validation_fraction,
        notes=notes,
    )
    return {
        "train_bytes": account.training_bytes,
        "validation_bytes": account.held_bytes,
        "held_out": held_out.to_dict(),
    }


def _sample(train: Chosen, seed: int) -> Chosen:
    """Documents to train a tokenizer on: all, or so many drawn by the seed as it takes."""
    drawn = np.random.default_rng(seed).permutation(train.numbers)
    before = np.cumsum(train.documents.sizes[drawn]) - train.documents.sizes[drawn]
    return replace(train, numbers=np.sort(drawn[before < new_tokenizer.BPE_SAMPLE_BYTES]))


def _too_short(split: batches.Split, tokens: int, inputs: _Inputs) -> DataError:
    spec, length = inputs.spec, inputs.spec.data.sequence_length
    masked = spec.task == "masked-lm"
    needed = length - 2 if masked else length + 1
    why = "less a first and a last token" if masked else "and the token after it"
    hold_out = ""
    if split == "validation" and not inputs.validation:
        # A tenth more: the text of another end has another number of tokens.
        enough = 1.1 * spec.data.validation_fraction * needed / max(1, tokens)
        value = f"set data.validation_fraction={enough:.2g}" if enough < 0.5 else "raise data.validation_fraction"
        hold_out = f"{value}, "
    return DataError(
        f"the {split} data is shorter than one block" if tokens else f"the {split} data holds no text but white space",
        got=f"{tokens} tokens",
        allowed=f"at least {needed}: data.sequence_length {why}",
        do=f"{hold_out}lower data.sequence_length, or give more text in data.{split}",
    )


def _write_rows(inputs: _Inputs, tokenizer: TextTokenizer, folder: Path, encode: EncodeMany) -> dict[str, Any]:
    data = inputs.spec.data
    rows = split_rows(inputs.spec, inputs.train, inputs.validation)
    _compare(inputs, rows.splits["train"][0])
    function = functools.partial(
        tokenization.encode_rows,
        tokenizer=tokenizer.encoder,
        sequence_length=data.sequence_length,
        pad_id=tokenizer.pad_id,
        side=tokenizer.truncation_side,
    )
    account = Account()
    found: dict[str, Any] = {"label_names": rows.names}
    order: tuple[batches.Split, ...] = ("validation", "train")
    for split in order:
        texts, labels = rows.splits[split]
        seen = account.held_out(texts, rows.labels(split)) if split == "validation" else account.training(texts)
        tokens = batches.write_labelled(folder, split, encode(function, tokenization.row_chunks(seen)), labels=labels)
        found |= {f"{split}_samples": len(texts), f"{split}_tokens": tokens}
    return found | _accounted(account, inputs, rows.notes)
