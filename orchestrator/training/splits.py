"""Which documents or labelled rows train, and which are held out: a pure function of the spec and the data.

Called by `prepare`, once to refuse data that cannot work before anything starts, and again to encode it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data.columns import MAX_CLASSES
from orchestrator.data.sources import Source
from orchestrator.errors import DataError
from orchestrator.spec import DataSpec, RunSpec
from orchestrator.training import batches
from orchestrator.training.corpus import Documents, open_documents, read_rows

Sources = Sequence[Source]
LabelledRows = tuple[list[str], np.ndarray]
"""Texts, and the class number of each."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Some documents of a corpus; every iteration reads them anew, so that none has to stay in memory."""

    documents: Documents
    numbers: np.ndarray

    def __iter__(self) -> Iterator[str]:
        return self.documents.read(self.numbers)


def split_documents(
    spec: RunSpec, train_sources: Sources, validation_sources: Sources
) -> tuple[Chosen | list[str], Chosen | list[str]]:
    """(train, validation): as given, or whole documents drawn by the seed; of a single document its end.

    Reads no text beyond that of a single document. Raises DataError when there is none, or its column is not there.
    """
    data, seed = spec.data, spec.training.seed
    documents = open_documents(train_sources, text_column=data.text_column)
    numbers = np.arange(len(documents))
    if validation_sources:
        held = open_documents(validation_sources, text_column=data.text_column)
        validation = Chosen(documents=held, numbers=np.arange(len(held)))
    elif len(documents) == 1:
        text = next(documents.read(numbers))
        end = int(len(text) * (1 - data.validation_fraction))
        cut = text.rfind("\n", 0, end) + 1 or end
        return [text[:cut]], [text[cut:]]
    else:
        chosen = batches.draw_documents(documents.sizes, data.validation_fraction, seed)
        numbers = np.setdiff1d(numbers, chosen, assume_unique=True)
        validation = Chosen(documents=documents, numbers=chosen)
    train = Chosen(documents=documents, numbers=numbers)
    return _at_most(train, data.max_train_examples, seed), _at_most(validation, data.max_validation_examples, seed)


def _at_most(chosen: Chosen, count: int | None, seed: int) -> Chosen:
    if count is None or count >= len(chosen.numbers):
        return chosen
    drawn = np.random.default_rng(seed).permutation(chosen.numbers)[:count]
    return Chosen(documents=chosen.documents, numbers=np.sort(drawn))


def split_rows(
    spec: RunSpec, train_sources: Sources, validation_sources: Sources
) -> tuple[tuple[str, ...], dict[batches.Split, LabelledRows]]:
    """(class names, texts and class numbers of each split), stratified where rows are drawn.

    Raises DataError when a column is not there, or its values are no classes that both splits can hold.
    """
    data, seed = spec.data, spec.training.seed
    assert data.label_column is not None, "the spec asks for it"
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
        held = batches.draw_stratified(train[1], _held_out_rows(train[1], names, data), seed)
        rest = np.setdiff1d(np.arange(len(train[1])), held, assume_unique=True)
        train, validation = _rows(train, rest), _rows(train, held)
    return names, {
        "train": _at_most_rows(train, data.max_train_examples, seed, "data.max_train_examples"),
        "validation": _at_most_rows(validation, data.max_validation_examples, seed, "data.max_validation_examples"),
    }


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


def _held_out_rows(labels: np.ndarray, names: tuple[str, ...], data: DataSpec) -> int:
    """How many rows to hold out: the fraction, but at least one of each class, and one of each left."""
    sizes = np.bincount(labels, minlength=len(names))
    if sizes.min() < 2:
        lonely = [names[index] for index in np.flatnonzero(sizes < 2)]
        raise DataError(
            "a class with one row cannot be in both the training and the held-out data",
            got=f"label {', '.join(lonely[:5])}" + (f" and {len(lonely) - 5} more" if lonely[5:] else ""),
            do="add rows, remove these, give data.validation, or set data.label_column if this is no class column",
        )
    return int(np.clip(round(len(labels) * data.validation_fraction), len(names), len(labels) - len(names)))


def _rows(rows: LabelledRows, chosen: np.ndarray) -> LabelledRows:
    return [rows[0][index] for index in chosen], rows[1][chosen]


def _at_most_rows(rows: LabelledRows, count: int | None, seed: int, field: str) -> LabelledRows:
    if count is None or count >= len(rows[0]):
        return rows
    if count < (classes := len(np.unique(rows[1]))):
        raise DataError(f"{field} leaves some class without a row", got=count, allowed=f"at least {classes}")
    return _rows(rows, batches.draw_stratified(rows[1], count, seed))
