"""Which documents or labelled rows train, and which are held out: a function of the spec and the data alone.

Called by `prepare`, once to refuse data that cannot work before anything starts, and again to encode it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.data.columns import MAX_CLASSES
from orchestrator.data.sources import Source
from orchestrator.errors import DataError
from orchestrator.spec import RunSpec
from orchestrator.spec_data import DataSpec
from orchestrator.training import batches, drawing
from orchestrator.training.corpus import Documents, open_documents, read_rows

Sources = Sequence[Source]
LabelledRows = tuple[list[str], np.ndarray]
"""Texts, and the class number of each."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A document that is in both splits, its beginning in one and its end in the other."""

    number: int
    share: float
    """Of its bytes, in its end."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Some documents of a corpus; every iteration reads them anew, so that none has to stay in memory."""

    documents: Documents
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
    splits: dict[batches.Split, LabelledRows]
    notes: tuple[str, ...]
    """Where the split is not what was asked, and why."""

    def labels(self, split: batches.Split) -> list[str]:
        """The class of each row, by name."""
        return [self.names[number] for number in self.splits[split][1]]


def split_documents(spec: RunSpec, train_sources: Sources, validation_sources: Sources) -> tuple[Chosen, Chosen]:
    """(train, validation): as given, or documents drawn by `data.split_seed`, one of them cut to meet the share.

    Reads no text. Raises DataError when there is none, or its column is not there.
    """
    data, seed = spec.data, spec.data.split_seed
    assert data.text_column is not None, "named before"
    documents = open_documents(train_sources, text_column=data.text_column)
    train = Chosen(documents=documents, numbers=np.arange(len(documents)))
    if validation_sources:
        held = open_documents(validation_sources, text_column=data.text_column)
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
    notes: tuple[str, ...] = ()
    assert data.text_column is not None, "named before"
    assert data.label_column is not None, "named before"
    read = functools.partial(read_rows, text_column=data.text_column, label_column=data.label_column)
    texts, labels = read(train_sources)
    names = _class_names(labels, data.label_column)
    number = {name: index for index, name in enumerate(names)}
    train = texts, np.array([number[label] for label in labels], dtype=np.int32)
    if validation_sources:
        texts, labels = read(validation_sources)
        if unknown := sorted(set(labels) - set(names)):
            raise DataError(
                "the validation data has labels that the training data has not",
                got=", ".join(unknown[:5]),
                allowed=", ".join(names[:20]),
                do="check data.label_column of both, or split the data anew by removing data.validation",
            )
        validation = texts, np.array([number[label] for label in labels], dtype=np.int32)
    else:
        count, notes = _held_out_rows(train[1], names, data)
        held = drawing.draw_stratified(train[1], count, seed)
        rest = np.setdiff1d(np.arange(len(train[1])), held, assume_unique=True)
        train, validation = _rows(train, rest), _rows(train, held)
    splits: dict[batches.Split, LabelledRows] = {
        "train": _at_most_rows(train, data.max_train_examples, seed, "data.max_train_examples"),
        "validation": _at_most_rows(validation, data.max_validation_examples, seed, "data.max_validation_examples"),
    }
    return SplitRows(names=names, splits=splits, notes=notes)


def _class_names(labels: Sequence[str], column: str) -> tuple[str, ...]:
    """The distinct labels in order: by value when all are whole numbers, else by name."""
    distinct = sorted(set(labels))
    if not 2 <= len(distinct) <= MAX_CLASSES:
        raise DataError(
            f"column {column!r} is no class column" if distinct[1:] else f"column {column!r} holds one class only",
            got=f"{len(distinct)} distinct values in {len(labels)} rows, such as {distinct[0]!r}",
            allowed=f"2 to {MAX_CLASSES} classes",
            do="set data.label_column to the column that holds the class",
        )
    whole = all(re.fullmatch(r"-?\d+", name) for name in distinct)
    return tuple(sorted(distinct, key=int)) if whole else tuple(distinct)


def _held_out_rows(labels: np.ndarray, names: tuple[str, ...], data: DataSpec) -> tuple[int, tuple[str, ...]]:
    """(how many rows to hold out, notes): the fraction, but at least one of each class, and one of each left."""
    sizes = np.bincount(labels, minlength=len(names))
    if sizes.min() < 2:
        lonely = [names[index] for index in np.flatnonzero(sizes < 2)]
        raise DataError(
            "a class with one row cannot be in both the training and the held-out data",
            got=f"label {', '.join(lonely[:5])}" + (f" and {len(lonely) - 5} more" if lonely[5:] else ""),
            do="add rows, remove these, give data.validation, or set data.label_column if this is no class column",
        )
    asked = round(len(labels) * data.validation_fraction)
    count = int(np.clip(asked, len(names), len(labels) - len(names)))
    if count == asked:
        return count, ()
    side = "held out" if count > asked else "trained on"
    why = f"{count} rows are held out instead of {asked}: a row of each of the {len(names)} classes has to be {side}"
    return count, (why,)


def _rows(rows: LabelledRows, chosen: np.ndarray) -> LabelledRows:
    return [rows[0][index] for index in chosen], rows[1][chosen]


def _at_most_rows(rows: LabelledRows, count: int | None, seed: int, field: str) -> LabelledRows:
    if count is None or count >= len(rows[0]):
        return rows
    if count < (classes := len(np.unique(rows[1]))):
        raise DataError(f"{field} leaves some class without a row", got=count, allowed=f"at least {classes}")
    return _rows(rows, drawing.draw_stratified(rows[1], count, seed))
