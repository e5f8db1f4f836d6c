"""Which documents or labelled rows train, and which are held out: a function of the spec and the data alone.

Called by `prepare`, once to refuse data that cannot work before anything starts, and again to encode it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from orchestrator.data import drawing
from orchestrator.data.conversations import Conversations
from orchestrator.data.documents import Documents, open_documents
from orchestrator.data.labelled_rows import Rows, Texts, read_rows
from orchestrator.data.labels import refuse_no_classes, refuse_single_rows
from orchestrator.data.layouts import Layout
from orchestrator.data.sources import Source
from orchestrator.errors import DataError
from orchestrator.planning.base_fit import own_name
from orchestrator.spec import RunSpec
from orchestrator.spec_data import DataSpec

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_PIECE_ROWS = 1 << 16
Sources = Sequence[Source]
LabelledRows = tuple[Texts, np.ndarray]
"""Texts, read when they are iterated over, and the class number of each."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A document that is in both splits, its beginning in one and its end in the other."""

    number: int
    share: float
    """Of its bytes, in its end."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Some documents or conversations; every iteration reads them anew, so that none has to stay in memory."""

    documents: Documents | Conversations
    numbers: np.ndarray
    """Sorted."""
    cut: Cut | None = None
    """The document, if it is among them, of which only a part is meant."""
    end: bool = False
    """Whether that part is its end."""

    def __iter__(self) -> Iterator[str]:
        texts = self.documents.read(self.numbers)
        if self.cut is None:
            yield from texts
            return
        for number, text in zip(self.numbers, texts, strict=True):
            if number == self.cut.number:
                place = drawing.cut_near_end(text, share=self.cut.share)
                text = text[place:] if self.end else text[:place]
            yield text


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Labelled rows, split."""

    names: tuple[str, ...]
    """Name of each class, by its number."""
    splits: dict[Split, LabelledRows]
    notes: tuple[str, ...]
    """What a reader of the data may not expect, and where the split is not what was asked."""

    def labels(self, split: Split) -> list[str]:
        """The class of each row, by name."""
        return [self.names[number] for number in self.splits[split][1]]


def split_documents(spec: RunSpec, train_sources: Sources, validation_sources: Sources) -> tuple[Chosen, Chosen]:
    """(train, validation): as given, or documents drawn by `data.split_seed`, one of them cut to meet the share.

    Reads no text. Raises DataError when there is none, or its column is not there.
    """
    data, seed = spec.data, spec.data.split_seed
    assert data.text_column is not None, "named before"
    documents = open_documents(train_sources or validation_sources, text_column=data.text_column)
    train = Chosen(documents=documents, numbers=np.arange(len(documents) if train_sources else 0))
    if validation_sources:
        held = open_documents(validation_sources, text_column=data.text_column) if train_sources else documents
        validation = Chosen(documents=held, numbers=np.arange(len(held)))
    else:
        drawn = drawing.draw_documents(documents.sizes, data.validation_fraction, seed)
        rest = np.setdiff1d(train.numbers, drawn.whole, assume_unique=True)
        numbers, cut = drawn.whole, None
        if drawn.cut is not None:
            numbers = np.sort(np.append(drawn.whole, drawn.cut))
            cut = Cut(number=drawn.cut, share=drawn.end_bytes / float(documents.sizes[drawn.cut]))
        train = Chosen(documents=documents, numbers=rest, cut=cut)
        validation = Chosen(documents=documents, numbers=numbers, cut=cut, end=True)
    return _at_most(train, data.max_train_examples, seed), _at_most(validation, data.max_validation_examples, seed)


def split_conversations(
    spec: RunSpec, layout: Layout, train_sources: Sources, validation_sources: Sources
) -> tuple[Chosen, Chosen]:
    """(train, validation): as given, or the rows drawn by `data.split_seed`.

    Raises DataError for a row that is no conversation, and where there are too few to hold one out.
    """
    data, seed = spec.data, spec.data.split_seed
    read = functools.partial(Conversations, layout=layout, incomplete=data.incomplete_rows)
    rows = read(train_sources or validation_sources)
    train = Chosen(documents=rows, numbers=np.arange(len(rows) if train_sources else 0))
    if validation_sources:
        held = read(validation_sources) if train_sources else rows
        validation = Chosen(documents=held, numbers=np.arange(len(held)))
    else:
        if len(rows) < 2:
            raise DataError(
                "one conversation cannot be trained on and held out",
                got=", ".join(source.location for source in train_sources),
                do="give more, or held-out ones in data.validation",
            )
        count = min(max(1, round(len(rows) * data.validation_fraction)), len(rows) - 1)
        order = np.random.default_rng(seed).permutation(len(rows))
        train, validation = (Chosen(documents=rows, numbers=np.sort(part)) for part in (order[count:], order[:count]))
    return _at_most(train, data.max_train_examples, seed), _at_most(validation, data.max_validation_examples, seed)


def _at_most(chosen: Chosen, count: int | None, seed: int) -> Chosen:
    if count is None or count >= len(chosen.numbers):
        return chosen
    drawn = np.random.default_rng(seed).permutation(chosen.numbers)[:count]
    return replace(chosen, numbers=np.sort(drawn))


def split_rows(spec: RunSpec, train_sources: Sources, validation_sources: Sources) -> SplitRows:
    """Rows as given, or drawn by `data.split_seed`, stratified.

    Raises DataError when a column is not there, or its values are no classes that both splits can hold.
    """
    data, seed = spec.data, spec.data.split_seed
    assert data.text_column is not None, "named before"
    assert data.label_column is not None, "named before"
    read = functools.partial(
        read_rows, text_column=data.text_column, label_column=data.label_column, incomplete=data.incomplete_rows
    )
    rows = read(train_sources)
    names = _class_names(rows, data.label_column)
    train, notes = _numbered(rows, names), rows.notes
    if validation_sources:
        held_rows = read(validation_sources)
        if unknown := sorted(set(held_rows.names) - set(names)):
            raise DataError(
                "the validation data has labels that the training data has not",
                got=", ".join(unknown[:5]),
                allowed=", ".join(names[:20]),
                do="check data.label_column of both, or split the data anew by removing data.validation",
            )
        validation, notes = _numbered(held_rows, names), (*notes, *held_rows.notes)
    else:
        count, why = _held_out_rows(train[1], names, data)
        notes = (*notes, *why)
        held = drawing.draw_stratified(train[1], count, seed)
        left = np.ones(len(train[1]), dtype=bool)
        left[held] = False
        numbers = np.arange(len(left), dtype=np.int32 if len(left) < 1 << 31 else np.int64)  # half the memory
        numbers = numbers[left]
        train, validation = (train[0].take(numbers), train[1][left]), _rows(train, held)
    splits: dict[Split, LabelledRows] = {
        "train": _at_most_rows(train, data.max_train_examples, seed, "data.max_train_examples"),
        "validation": _at_most_rows(validation, data.max_validation_examples, seed, "data.max_validation_examples"),
    }
    return SplitRows(names=names, splits=splits, notes=notes)


def measured_rows(spec: RunSpec, sources: Sources, classes: Sequence[str]) -> SplitRows:
    """All rows, to measure a model of these classes on, and none to train on.

    Raises DataError when a column is not there, there are no rows, or one is of another class.
    """
    data = spec.data
    assert data.text_column is not None, "named before"
    assert data.label_column is not None, "named before"
    rows = read_rows(
        sources, text_column=data.text_column, label_column=data.label_column, incomplete=data.incomplete_rows
    )
    if not len(rows.labels):
        location = ", ".join(source.location for source in sources)
        raise DataError(f"{location} holds no row to measure on", do="check data.validation")
    every = _numbered(rows, rows.names)
    none = every[0].take(np.arange(0)), every[1][:0]
    held = _at_most_rows(every, data.max_validation_examples, data.split_seed, "data.max_validation_examples")
    found = SplitRows(names=rows.names, splits={"train": none, "validation": held}, notes=rows.notes)
    return as_classes(found, classes, column=data.label_column)


def as_classes(found: SplitRows, classes: Sequence[str], *, column: str) -> SplitRows:
    """The same rows with the numbers that a model has for their classes.

    Raises DataError for a row of another class, with its place.
    """
    names = model_classes(found.names, classes)
    number = {name: index for index, name in enumerate(names)}
    wanted = np.array([number.get(name, -1) for name in found.names], dtype=np.int32)
    splits: dict[Split, LabelledRows] = {}
    for split, (texts, labels) in found.splits.items():
        splits[split] = texts, wanted[labels]
        unknown = np.flatnonzero(splits[split][1] < 0)
        if len(unknown):
            location, row = texts.place(int(unknown[0]))
            raise DataError(
                "the data has a label that the model never had",
                got=f"{found.names[labels[unknown[0]]]!r} in column {column!r} of {location}, row {row:,}"
                + (f"; {len(unknown):,} rows of such labels in all" if len(unknown) > 1 else ""),
                allowed=", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else ""),
                do="write the labels as the model has them, remove such rows, or give the column in data.label_column",
            )
    return replace(found, names=names, splits=splits)


def model_classes(found: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    """A model's classes as the data writes them: transformers calls classes without names LABEL_0, LABEL_1 and so on,
    which are their numbers unless the data says so too."""
    if set(found) <= set(classes):
        return tuple(classes)
    return tuple(map(own_name, classes))


def _class_names(rows: Rows, column: str) -> tuple[str, ...]:
    """The distinct labels in order: by value when all are whole numbers, else by name."""
    sizes = drawing.class_sizes(rows.labels, len(rows.names)).tolist()
    location = ", ".join(table.source.location for table in rows.tables)
    refuse_no_classes(dict(zip(rows.names, sizes, strict=True)), column=column, location=location)
    distinct = sorted(rows.names)
    whole = all(re.fullmatch(r"-?\d{1,18}", name) for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name), name))) if whole else tuple(distinct)


def _numbered(rows: Rows, names: Sequence[str]) -> LabelledRows:
    """All rows, with the number of each one's class in `names`."""
    number = {name: index for index, name in enumerate(names)}
    wanted = np.array([number[name] for name in rows.names], dtype=np.int32)
    labels = np.empty_like(rows.labels)
    for start in range(0, len(labels), _PIECE_ROWS):  # whole it would take 8 bytes a row besides
        labels[start : start + _PIECE_ROWS] = wanted[rows.labels[start : start + _PIECE_ROWS]]
    return rows.texts(), labels


def _held_out_rows(labels: np.ndarray, names: tuple[str, ...], data: DataSpec) -> tuple[int, tuple[str, ...]]:
    """(how many rows to hold out, notes): the fraction, but at least one of each class, and one of each left."""
    sizes = drawing.class_sizes(labels, len(names))
    refuse_single_rows(dict(zip(names, sizes.tolist(), strict=True)), column=data.label_column or "")
    asked = round(len(labels) * data.validation_fraction)
    count = int(np.clip(asked, len(names), len(labels) - len(names)))
    if count == asked:
        return count, ()
    side = "held out" if count > asked else "trained on"
    why = f"{count} rows are held out instead of {asked}: a row of each of the {len(names)} classes has to be {side}"
    return count, (why,)


def _rows(rows: LabelledRows, chosen: np.ndarray) -> LabelledRows:
    return rows[0].take(chosen), rows[1][chosen]


def _at_most_rows(rows: LabelledRows, count: int | None, seed: int, field: str) -> LabelledRows:
    if count is None or count >= len(rows[0]):
        return rows
    if count < (classes := len(np.unique(rows[1]))):
        raise DataError(f"{field} leaves some class without a row", got=count, allowed=f"at least {classes}")
    return _rows(rows, drawing.draw_stratified(rows[1], count, seed))
