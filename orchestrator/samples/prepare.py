"""A spec's data -> a folder of token ids that every worker maps into memory. Called once by the driver.

The folder's name is a fingerprint of all that shapes its content, so the same data is encoded once for all runs and
trials. It is written beside and renamed: a folder under its name is whole, whoever died on the way.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from orchestrator.data.contents import contents_of
from orchestrator.data.first_look import preview
from orchestrator.data.held_out import Account, HeldOut
from orchestrator.data.sources import Source, find_sources
from orchestrator.data.spec_columns import with_columns
from orchestrator.data.splits import Chosen, Split, SplitRows, split_documents, split_rows
from orchestrator.errors import DataError
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.samples import base_tokenizer, batches, kept_tokenizers, tokenization
from orchestrator.samples.covered import DocumentEncoding, covered_bytes
from orchestrator.samples.encoders import around, document_encoder, mask_ids, row_encoder, tokenizer_of
from orchestrator.samples.new_tokenizer import size_note
from orchestrator.samples.patience import go_on, patiently
from orchestrator.samples.tokenization import Chunk, TextTokenizer
from orchestrator.samples.whole_folder import is_whole, whole_folder
from orchestrator.spec import RunSpec
from orchestrator.spec_retain import SHARED
from orchestrator.tasks.base import BITS_PER_BYTE
from orchestrator.tasks.registry import task_of

T = TypeVar("T")

FORMAT_VERSION = 3
"""Part of the fingerprint: raise it when files of the same name would hold something else."""
TABLES_VERSION = 2
"""The same for tables alone: raise it when they are read otherwise."""


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
    train_examples: int | None
    """Documents or rows to train on; None for data that an earlier version encoded, which did not count them."""
    bytes: int
    """UTF-8 bytes of the training text."""
    validation_bytes: int
    """UTF-8 bytes of the held-out text."""
    covered_bytes: int | None
    """Those of the tokens that a causal language model is measured on (`covered`); None for other tasks."""
    tokenizer_fingerprint: str
    """Equal for data that is cut into the same tokens."""
    held_out: HeldOut
    """The examples that runs on this data are measured on."""
    columns: dict[str, str]
    """Those in use, by what they hold: `text` and `label`."""
    cached: bool
    """True when the folder was there already."""
    notes: tuple[str, ...] = ()
    """What was taken for granted of the data, a sentence each."""
    retained: PreparedData | None = None
    """The general data of `retain`, encoded alike: what is replayed, and what forgetting is measured on."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that a worker reads."""
        return (self.path,) if self.retained is None else (self.path, self.retained.path)

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
    is_exact: bool
    """Whether its ids are known to be those of `AutoTokenizer`."""

    @property
    def asked(self) -> float | None:
        """The share to hold out; None where the held-out data is given, or limits keep another share."""
        data = self.spec.data
        given = self.validation or data.max_train_examples or data.max_validation_examples
        return None if given else data.validation_fraction

    @property
    def columns(self) -> dict[str, str]:
        """The columns in use, by what they hold: `text` and `label`; none where files are documents."""
        data = self.spec.data
        tables = any(source.reader != "text" for source in self.train)
        named = {"text": data.text_column if tables else None, "label": data.label_column}
        return {holds: column for holds, column in named.items() if column is not None}


@dataclass(frozen=True, kw_only=True)
class Unprepared:
    """Data that was read and split, and that `prepare` would encode."""

    spec: RunSpec
    """With the columns named that it leaves open."""
    notes: tuple[str, ...]
    """What was taken for granted of the data, a sentence each."""
    columns: dict[str, str]
    """Those in use, by what they hold: `text` and `label`."""
    is_exact: bool
    """Whether the tokenizer's ids are known to be those of `AutoTokenizer`."""
    split: tuple[Chosen, Chosen] | SplitRows
    """Documents to train on and held out, or labelled rows."""
    asked: float | None
    """The share to hold out; None where the held-out data is given, or limits keep another share."""
    tokenizer: TextTokenizer | None
    """None until it is trained on the corpus."""


def find_prepared(spec: RunSpec, *, cache: Path, base: str | None = None) -> PreparedData | None:
    """What `prepare` would find below `cache`, or None after a look at the data that encodes nothing.

    Raises what `prepare` raises, but for what only tokens show: text too short for one block.
    """
    found = find_data(spec, cache=cache, base=base)
    with of_general_data(spec) as general:
        retained = None if general is None else find_data(general, cache=cache, base=base)
    if not isinstance(found, PreparedData) or isinstance(retained, Unprepared):
        return None
    return _with_retained(found, retained)


def find_data(
    spec: RunSpec, *, cache: Path, base: str | None = None, exactly: bool = True
) -> PreparedData | Unprepared:
    """As `find_prepared`, of `data` without `retain.data`, with what was read of data that is not encoded yet; where it
    need not be `exactly` the ids of `AutoTokenizer`, with a tokenizer that loads without transformers."""
    inputs = _find_inputs(spec, base, exactly=exactly)
    if inputs.is_exact:  # else nothing was encoded with this tokenizer, which `prepare` would have kept
        folder = cache / _fingerprint(inputs)
        if is_whole(folder):
            return _load(folder, inputs, cached=True)
    split = split_documents if spec.models_language else split_rows
    return Unprepared(
        spec=inputs.spec,
        notes=inputs.notes,
        columns=inputs.columns,
        is_exact=inputs.is_exact,
        split=split(inputs.spec, inputs.train, inputs.validation),
        asked=inputs.asked,
        tokenizer=inputs.tokenizer,
    )


def prepare(
    spec: RunSpec, *, cache: Path, encode: EncodeMany, base: str | None = None, pause: Callable[[], None] = go_on
) -> PreparedData:
    """The spec's data, split, encoded and on disk below `cache`; a second call finds it there.

    `base` says where `model.base` lies when the caller fetched it (a finished run's model). `pause` is called while a
    tokenizer is trained, and ends that by what it raises.
    Raises DataError for data that does not hold what the spec says, ModelError for an unusable tokenizer,
    StorageError when `cache` cannot be written.
    """
    data = _prepare(spec, cache, encode, base, pause)
    with of_general_data(spec) as general:
        retained = None if general is None else _prepare(general, cache, encode, base, pause)
    return _with_retained(data, retained)


def _with_retained(data: PreparedData, retained: PreparedData | None) -> PreparedData:
    if retained is None:
        return data
    return replace(data, retained=retained, counts=replace(data.counts, retained=retained.counts))


@contextlib.contextmanager
def of_general_data(spec: RunSpec) -> Iterator[RunSpec | None]:
    """`RunSpec.of_general_data`; meanwhile errors name the fields of `retain` instead of those of `data`."""
    try:
        yield spec.of_general_data
    except DataError as error:
        raise DataError(
            f"general data of retain: {_in_retain(error.what)}",
            got=_in_retain(error.got),
            allowed=_in_retain(error.allowed),
            do=_in_retain(error.do),
        ) from error


def _in_retain(part: object) -> str | None:
    """A part of a message, by the names that the fields have in `retain`."""
    if part is None:
        return None
    names = "|".join(SHARED)
    text = re.sub(r"\bdata\.(train|validation)\b", "retain.data", str(part))
    return re.sub(rf"\bdata\.({names})\b", r"retain.\1", text)


def _prepare(
    spec: RunSpec, cache: Path, encode: EncodeMany, base: str | None, pause: Callable[[], None]
) -> PreparedData:
    """The data of one block."""
    inputs = _find_inputs(spec, base)
    fingerprint = _fingerprint(inputs)
    folder = cache / fingerprint
    if is_whole(folder):
        return _load(folder, inputs, cached=True)
    with whole_folder(folder) as partial:
        _write(inputs, partial, encode, pause)
        if _fingerprint(inputs) != fingerprint:
            raise DataError("the data has changed while it was read", do="run the same command again once it is whole")
    return _load(folder, inputs, cached=False)


def _find_inputs(spec: RunSpec, base: str | None, *, exactly: bool = True) -> _Inputs:
    data = spec.data
    location = base_tokenizer.tokenizer_location(spec.model)
    if base is not None and location == spec.model.base:
        location = base
    tokenizer, is_exact = None, True
    if location is not None:
        load = kept_tokenizers.load_exactly if exactly else kept_tokenizers.load_at_hand
        tokenizer, is_exact = load(location)
        base_tokenizer.check_fit(spec, tokenizer)
    if tokenizer is not None and spec.models_language:
        document_encoder(spec, tokenizer)  # refused before anything starts
    find = functools.partial(find_sources, exclude=data.exclude, data_format=data.format, delimiter=data.delimiter)
    train = find(data.train, with_validation=data.validation is None)
    beside = tuple(held for source in train for held in source.validation)
    validation = beside if data.validation is None else find(data.validation, split="validation")
    named, notes = with_columns(spec, train, look=preview)
    said = tuple(source.note for source in (*train, *validation) if source.note is not None)
    return _Inputs(
        spec=named,
        notes=(*said, *notes),
        train=train,
        validation=validation,
        location=location,
        tokenizer=tokenizer,
        is_exact=is_exact,
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
    if any(source.reader != "text" for source in (*inputs.train, *inputs.validation)):
        parts["tables"] = [TABLES_VERSION, data.delimiter, data.incomplete_rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(inputs: _Inputs, folder: Path, encode: EncodeMany, pause: Callable[[], None]) -> None:
    """All files of the prepared folder."""
    if inputs.spec.models_language:
        tokenizer, found = _write_documents(inputs, folder, encode, pause)
    else:
        assert inputs.tokenizer is not None, "classification fine-tunes a base model, which has a tokenizer"
        tokenizer, found = inputs.tokenizer, _write_rows(inputs, inputs.tokenizer, folder, encode)
    tokenizer.save(folder / "tokenizer")
    meta = {
        "task": inputs.spec.task,
        "dtype": np.dtype(tokenization.token_dtype(tokenizer.vocab_size)).name,
        "sequence_length": inputs.spec.data.sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint()[:16],
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        **(mask_ids(tokenizer, inputs.spec) if task_of(inputs.spec.task).hides_tokens else {}),
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
        counts=DatasetCounts(
            **counted,
            **batches.shapes(folder, meta),
            num_labels=None if names is None else len(names),
            label_names=names,
        ),
        label_names=names,
        tokenizer_folder=folder / "tokenizer",
        eos_id=meta["eos_id"],
        pad_id=meta["pad_id"],
        cls_id=meta.get("cls_id"),
        train_examples=meta.get("train_examples"),
        bytes=meta["train_bytes"],
        validation_bytes=meta["validation_bytes"],
        covered_bytes=meta.get("covered_bytes"),
        tokenizer_fingerprint=meta["tokenizer_fingerprint"],
        held_out=HeldOut.of(meta["held_out"]),
        columns=inputs.columns,
        cached=cached,
        notes=inputs.notes if inputs.tokenizer else (*inputs.notes, *size_note(meta, inputs.spec.model.vocab_size)),
    )


def _write_documents(
    inputs: _Inputs, folder: Path, encode: EncodeMany, pause: Callable[[], None]
) -> tuple[TextTokenizer, dict[str, Any]]:
    spec = inputs.spec
    train, validation = split_documents(spec, inputs.train, inputs.validation)
    _compare(inputs, train)
    tokenizer = inputs.tokenizer or patiently(lambda: tokenizer_of(spec, train), pause)
    function = document_encoder(spec, tokenizer)
    count_samples = batches.masked_samples if task_of(spec.task).hides_tokens else batches.packed_samples
    found: dict[str, Any] = {"label_names": None}
    # The small one first: if it is too short, nothing long was encoded in vain.
    account = Account()
    splits: tuple[tuple[Split, Iterator[str]], ...] = (
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
        if split == "validation" and BITS_PER_BYTE in task_of(spec.task).metrics:
            before, after = around(tokenizer, spec)
            encoding = DocumentEncoding(encoder=tokenizer.encoder, cuts=tokenizer.cuts, before=before, after=after)
            left_over = tokens - batches.packed_tokens(samples, spec.data.sequence_length)
            found["covered_bytes"] = covered_bytes(
                validation, encoding, all_bytes=account.held_bytes, left_over=left_over
            )
    return tokenizer, found | _accounted(account, inputs, document_notes(train, validation))


def document_notes(train: Chosen, validation: Chosen) -> tuple[str, ...]:
    """What a reader of the data may not expect, each once."""
    return tuple(dict.fromkeys((*train.documents.notes, *validation.documents.notes)))


def _compare(inputs: _Inputs, texts: Iterable[str]) -> None:
    """Raises ModelError where a sample of the training text gets other ids than transformers gives it."""
    if inputs.tokenizer is not None and inputs.location is not None:
        base_tokenizer.check_sample(inputs.tokenizer, inputs.location, texts)


def _not_blank(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text and not text.isspace())


def _accounted(account: Account, inputs: _Inputs, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What `meta.json` says of the text of both splits."""
    held_out = account.result(
        "documents" if inputs.spec.models_language else "rows",
        asked=inputs.asked,
        notes=notes,
    )
    return {
        "train_examples": account.training_count,
        "train_bytes": account.training_bytes,
        "validation_bytes": account.held_bytes,
        "held_out": held_out.to_dict(),
    }


def _too_short(split: Split, tokens: int, inputs: _Inputs) -> DataError:
    spec, length = inputs.spec, inputs.spec.data.sequence_length
    masked = task_of(spec.task).hides_tokens
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
    rows = split_rows(inputs.spec, inputs.train, inputs.validation)
    _compare(inputs, rows.splits["train"][0])
    function = row_encoder(inputs.spec, tokenizer)
    account = Account()
    found: dict[str, Any] = {"label_names": rows.names}
    order: tuple[Split, ...] = ("validation", "train")
    for split in order:
        texts, labels = rows.splits[split]
        seen = account.held_out(texts, rows.labels(split)) if split == "validation" else account.training(texts)
        tokens = batches.write_labelled(folder, split, encode(function, tokenization.row_chunks(seen)), labels=labels)
        found |= {f"{split}_samples": len(texts), f"{split}_tokens": tokens}
    return found | _accounted(account, inputs, rows.notes)
