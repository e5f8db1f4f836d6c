"""Sources -> the rows of a classification dataset: classes in memory, texts left in the files. Called by `splits`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data.drawing import class_sizes
from orchestrator.data.incomplete import Gaps
from orchestrator.data.labels import refuse_fractions, similar_labels
from orchestrator.data.sources import Source
from orchestrator.data.tables import Batch, Table
from orchestrator.data.texts import chosen_texts, coded, is_blank
from orchestrator.errors import DataError
from orchestrator.spec_data import IncompleteRows

_FIELDS = ("text_column", "label_column")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows of a classification dataset: their classes in memory, their texts in the files."""

    tables: tuple[Table, ...]
    text_column: str
    numbers: tuple[np.ndarray | int, ...]
    """Of each table, sorted: the rows that have a text and a label; where all have, how many there are."""
    labels: np.ndarray
    """int32, the number of each row's class in `names`."""
    names: tuple[str, ...]
    """As they are written, in the order in which they appear."""
    notes: tuple[str, ...]
    """What a reader of the files may not expect, a sentence each."""

    def texts(self) -> Texts:
        """The texts of all rows."""
        return Texts(rows=self, chosen=None)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of some rows; every iteration reads them anew, so that none has to stay in memory."""

    rows: Rows
    chosen: np.ndarray | None
    """Sorted numbers; None for all."""

    def __len__(self) -> int:
        return len(self.rows.labels) if self.chosen is None else len(self.chosen)

    def __iter__(self) -> Iterator[str]:
        before = 0
        for table, complete in zip(self.rows.tables, self.rows.numbers, strict=True):
            count = complete if isinstance(complete, int) else len(complete)
            wanted: np.ndarray | None = None
            if self.chosen is not None:
                first, last = np.searchsorted(self.chosen, [before, before + count])
                wanted = self.chosen[first:last] - before
            if not isinstance(complete, int):
                wanted = complete if wanted is None else complete[wanted]
            before += count
            yield from chosen_texts(table, self.rows.text_column, wanted)

    def at(self, places: np.ndarray) -> list[str]:
        """Some of these texts in the order asked for, in memory; one pass over the files."""
        distinct, order = np.unique(places, return_inverse=True)
        found = list(self.take(distinct))
        return [found[index] for index in order]

    def place(self, index: int) -> tuple[str, int]:
        """(location, row from 1) of one of these texts."""
        number = index if self.chosen is None else int(self.chosen[index])
        for table, complete in zip(self.rows.tables, self.rows.numbers, strict=True):
            count = complete if isinstance(complete, int) else len(complete)
            if number < count:
                return table.source.location, 1 + (number if isinstance(complete, int) else int(complete[number]))
            number -= count
        raise IndexError(index)

    def take(self, chosen: np.ndarray) -> Texts:
        """Some of these texts, by their sorted numbers among them."""
        return Texts(rows=self.rows, chosen=chosen if self.chosen is None else self.chosen[chosen])


def read_rows(
    sources: Sequence[Source], *, text_column: str, label_column: str, incomplete: IncompleteRows = "refuse"
) -> Rows:
    """The classes of all rows of a classification dataset, and where their texts are.

    Raises DataError when a column is not there, the labels are no classes, or rows that are `incomplete` are to be
    refused and a text or a label is missing.
    """
    if text := next((source for source in sources if source.reader == "text"), None):
        raise DataError(
            f"{text.files[0]} is read as text, which carries no labels",
            allowed="jsonl, csv, tsv or parquet files, or a hub dataset",
            do=f"give files with the columns {text_column} and {label_column}, or set data.format",
        )
    tables = tuple(Table(source) for source in sources)
    number_of: dict[str, int] = {}
    labels: list[np.ndarray] = []
    numbers: list[np.ndarray | int] = []
    notes: list[str] = []
    for table in tables:
        gaps = Gaps(table.source.location, text_column, label_column)
        found = array("i")  # grows without a copy, where many small arrays would stay in memory beside their sum
        for batch in table.batches([text_column, label_column], fields=_FIELDS):
            found.frombytes(_labels(batch, number_of, gaps).tobytes())
        if gaps.incomplete and incomplete == "refuse":
            raise gaps.refusal()
        every = np.frombuffer(found, dtype=np.int32) if found else np.empty(0, dtype=np.int32)
        complete = np.flatnonzero(every >= 0) if gaps.incomplete else None
        numbers.append(len(every) if complete is None else complete)
        labels.append(every if complete is None else every[complete])
        notes += [*table.notes, *gaps.notes()]
    every = labels[0] if len(labels) == 1 else np.concatenate(labels)
    names = np.array([*number_of, ""], dtype=object)[:-1]
    sizes = class_sizes(every, len(names))
    if not sizes.all():  # a class of incomplete rows alone
        every = (np.cumsum(sizes > 0) - 1)[every].astype(np.int32)
        names, sizes = names[sizes > 0], sizes[sizes > 0]
    refuse_fractions(names, column=label_column, location=", ".join(table.source.location for table in tables))
    return Rows(
        tables=tables,
        text_column=text_column,
        numbers=tuple(numbers),
        labels=every,
        names=tuple(names),
        notes=(*notes, *similar_labels(dict(zip(names, sizes.tolist(), strict=True)))),
    )


def _labels(batch: Batch, number_of: dict[str, int], gaps: Gaps) -> np.ndarray:
    """The number of each row's class, -1 where text or label is missing; names that are new get the next number."""
    texts, labels = batch.columns
    names, numbers = coded(labels)
    missing = is_blank(names)
    known = [
        -1 if blank else number_of.setdefault(name, len(number_of))
        for name, blank in zip(names.to_pylist(), missing, strict=True)
    ]
    found: np.ndarray = np.array(known, dtype=np.int32)[numbers]
    no_text = is_blank(texts)
    gaps.count(no_text, found < 0)
    found[no_text] = -1
    return found
