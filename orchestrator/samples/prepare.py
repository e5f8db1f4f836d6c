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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from orchestrator.architectures.families import model_config
from orchestrator.data.contents import contents_of
from orchestrator.data.first_look import preview
from orchestrator.data.held_out import HeldOut
from orchestrator.data.sources import find_sources
from orchestrator.data.spec_columns import with_columns
from orchestrator.errors import DataError
from orchestrator.method_names import EVALUATE
from orchestrator.planning.base_fit import classes_of
from orchestrator.planning.run_plan import DatasetCounts
from orchestrator.samples import base_tokenizer, kept_tokenizers, tokenization
from orchestrator.samples.forms.base import EncodeMany, Inputs
from orchestrator.samples.forms.registry import form_of
from orchestrator.samples.new_tokenizer import size_note
from orchestrator.samples.patience import go_on
from orchestrator.samples.tokenization import Chunk
from orchestrator.samples.whole_folder import is_whole, whole_folder
from orchestrator.spec import RunSpec
from orchestrator.spec_retain import SHARED
from orchestrator.tasks.registry import task_of

T = TypeVar("T")

FORMAT_VERSION = 3
"""Part of the fingerprint: raise it when files of the same name would hold something else."""
TABLES_VERSION = 2
"""The same for tables alone: raise it when they are read otherwise."""
CHATS_VERSION = 1
"""The same for conversations."""


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
    turn_ends: tuple[int, ...] = ()
    """Special tokens that end an assistant's turns; none for other tasks."""
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
class Unprepared:
    """Data that was split, and that `prepare` would encode."""

    inputs: Inputs
    fingerprint: str
    """Of what it would encode."""
    split: Any
    """The examples to train on and those held out, as the form of the samples has them."""


def find_prepared(spec: RunSpec, *, cache: Path, base: str | None = None) -> PreparedData | None:
    """What `prepare` would find below `cache`, or None after a look at the data that encodes nothing.

    Raises what `prepare` raises, but for what only tokens show: text too short for one block.
    """
    found = find_data(spec, cache=cache, base=base)
    check_test(spec, found, base)
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
    fingerprint = _fingerprint(inputs)
    folder = cache / fingerprint
    # Where the tokenizer is not exact nothing was encoded with it, which `prepare` would have kept.
    if inputs.is_exact and is_whole(folder):
        return _load(folder, inputs, cached=True)
    return Unprepared(inputs=inputs, fingerprint=fingerprint, split=form_of(task_of(spec.task)).split(inputs))


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


def check_test(spec: RunSpec, found: PreparedData | Unprepared, base: str | None = None) -> None:
    """Raises DataError where the model that a training on what was `found` leaves could not be measured on its test
    set: data that cannot be read, and labels that the model never had."""
    data = spec.data
    if data.test is None:
        return
    if isinstance(found, PreparedData):
        names, columns = found.label_names, found.columns
    else:
        names, columns = getattr(found.split, "names", None), found.inputs.columns
    named = {f"{holds}_column": column for holds, column in columns.items() if holds in ("text", "label")}
    block = data.model_copy(update={"validation": data.test, "validation_split": data.test_split, **named})
    seen = spec.model_copy(update={"kind": EVALUATE, "data": block})
    try:
        form_of(task_of(spec.task)).split(replace(_find_inputs(seen, base), classes=names))
    except DataError as error:
        parts = (error.got, error.allowed, error.do)
        got, allowed, do = (part and str(part).replace("data.validation", "data.test") for part in parts)
        raise DataError(f"test set: {error.what}", got=got, allowed=allowed, do=do) from error


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


def _find_inputs(spec: RunSpec, base: str | None, *, exactly: bool = True) -> Inputs:
    data = spec.data
    location = base_tokenizer.tokenizer_location(spec.model)
    if base is not None and location == spec.model.base:
        location = base
    tokenizer, is_exact, said_of_it = None, True, None
    if location is not None:
        load = kept_tokenizers.load_exactly if exactly else kept_tokenizers.load_at_hand
        tokenizer, is_exact = load(location)
        base_tokenizer.check_fit(spec, tokenizer)
    if tokenizer is not None:
        form = form_of(task_of(spec.task))
        form.check_tokenizer(spec, tokenizer)  # refused before anything starts
        tokenizer, said_of_it = form.own_tokenizer(spec, tokenizer)
    find = functools.partial(find_sources, exclude=data.exclude, data_format=data.format, delimiter=data.delimiter)
    measured_alone = spec.kind == EVALUATE and data.validation is not None
    train = () if measured_alone else find(data.train, with_validation=data.validation is None)
    beside = tuple(held for source in train for held in source.validation)
    validation = beside if data.validation is None else find(data.validation, split=data.validation_split)
    if spec.kind == EVALUATE and beside:
        train = ()  # what a training on them is measured on lies beside them
    found = with_columns(spec, train or validation, look=preview)
    said = [note for note in (*(source.note for source in (*train, *validation)), said_of_it) if note is not None]
    return Inputs(
        spec=found.spec,
        layout=found.layout,
        notes=(*said, *found.assumed),
        train=train,
        validation=validation,
        location=location,
        tokenizer=tokenizer,
        is_exact=is_exact,
        classes=_classes(spec),
    )


def _classes(spec: RunSpec) -> tuple[str, ...] | None:
    """See `Inputs`."""
    if spec.kind != EVALUATE or not task_of(spec.task).is_classification:
        return None
    return tuple(classes_of(model_config(spec.model)))


def _fingerprint(inputs: Inputs) -> str:
    spec, data = inputs.spec, inputs.spec.data
    drawn = not (inputs.validation and inputs.tokenizer) or data.max_train_examples or data.max_validation_examples
    parts: dict[str, Any] = {
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
    if inputs.layout is not None:
        parts["conversations"] = [CHATS_VERSION, *asdict(inputs.layout).values(), data.too_long]
    if inputs.classes is not None:
        parts["classes"] = list(inputs.classes)
    if any(source.reader != "text" for source in (*inputs.train, *inputs.validation)):
        parts["tables"] = [TABLES_VERSION, data.delimiter, data.incomplete_rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(inputs: Inputs, folder: Path, encode: EncodeMany, pause: Callable[[], None]) -> None:
    """All files of the prepared folder."""
    form = form_of(task_of(inputs.spec.task))
    tokenizer, found = form.write(inputs, form.split(inputs), folder, encode, pause)
    tokenizer.save(folder / "tokenizer")
    meta = {
        "task": inputs.spec.task,
        "dtype": np.dtype(tokenization.token_dtype(tokenizer.vocab_size)).name,
        "sequence_length": inputs.spec.data.sequence_length,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint()[:16],
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        **found,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _load(folder: Path, inputs: Inputs, *, cached: bool) -> PreparedData:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    names = None if meta["label_names"] is None else tuple(meta["label_names"])
    counted = {key: meta[key] for key in ("train_samples", "train_tokens", "validation_samples", "vocab_size")}
    return PreparedData(
        path=folder,
        fingerprint=folder.name,
        counts=DatasetCounts(
            **counted,
            validation_tokens=None if meta["train_samples"] else meta["validation_tokens"],
            **form_of(task_of(inputs.spec.task)).shapes(folder, meta),
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
        turn_ends=tuple(meta.get("turn_ends", ())),
        cached=cached,
        notes=inputs.notes if inputs.tokenizer else (*inputs.notes, *size_note(meta, inputs.spec.model.vocab_size)),
    )
