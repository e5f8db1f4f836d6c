"""A source -> the text of the columns in use, some rows at a time: the one reader behind `advise`, `plan` and `run`.

Each format has a module of its own; here they look alike. A value is the text that stands in the file, empty where
nothing does. Files are read as they are at that moment: nothing is cached but how each of them is written.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.formats import delimited, hub, json_rows, parquet
from orchestrator.data.sources import Reader, Source, unreadable
from orchestrator.errors import DataError

USUAL_DELIMITER: dict[Reader, str] = {"csv": ",", "tsv": "\t"}
"""What the endings of delimited files say."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows that follow each other in one file."""

    file: Path | str
    """For messages; a hub dataset's name."""
    start: int
    """Number of the first of them in the file, from 0."""
    columns: tuple[Any, ...]
    """A pyarrow array of strings for each column that was asked for, without nulls, all of one length."""

    def __len__(self) -> int:
        return len(self.columns[0])


class Table:
    """The rows of a source that is no text.

    `notes` fills while files are opened: what a reader of their content may not expect, a sentence each. `looked_at`
    is how many first bytes of a delimited file tell how it is written; None for all that it takes.
    """

    def __init__(self, source: Source, *, looked_at: int | None = None) -> None:
        assert source.reader != "text", "text has no columns"
        self.source = source
        self._looked_at = looked_at
        self.notes: list[str] = []
        self._dialects: dict[Path, delimited.Dialect] = {}
        self._seen: dict[Path, tuple[tuple[int, ...], int]] = {}
        self._hub: Any = None

    def names(self) -> tuple[str, ...]:
        """The columns of the first file; of JSON, those of its first rows."""
        if self.source.reader == "hub":
            return tuple(self.hub_table().column_names)
        file = self.source.files[0]
        if self.source.reader == "parquet":
            return parquet.names(file)
        if self.source.reader == "json":
            rows = itertools.islice(json_rows.rows(file), parquet.ROWS_AT_A_TIME)
            return tuple(dict.fromkeys(name for _, row in rows for name in row))
        return self.dialect(file).names

    def batches(self, columns: Sequence[str], *, fields: Sequence[str] = ()) -> Iterator[Batch]:
        """All rows, in order, with the columns asked for; no other is looked at.

        `fields` are what the spec calls each column, for messages. Raises DataError when a file cannot be read or
        parsed, a column is not there, or a file has changed since an earlier call.
        """
        if self.source.reader == "hub":
            table, done = self.hub_table(), 0
            self._require(columns, fields, self.names(), self.source.location)
            for arrays in hub.read(table, columns, location=self.source.location):
                yield Batch(file=self.source.location, start=done, columns=arrays)
                done += len(arrays[0])
            return
        for file in self.source.files:
            yield from self.of_file(file, columns, fields=fields)

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[object, dict[str, Any]]]:
        """(the file, the values of these columns) of all rows, in order, as the format has them: lists and objects too.

        A row of JSON lacks the columns that it does not name. Raises what `batches` raises.
        """
        wanted = list(dict.fromkeys(columns))
        if self.source.reader == "hub":
            table = self.hub_table()
            self._require(wanted, (), self.names(), self.source.location)
            for row in hub.values(table.select_columns(wanted), range(len(table))):
                yield self.source.location, row
            return
        for file in self.source.files:
            before, done = _state(file), 0
            self._refuse_changed(file, before)
            for row in self._values_of(file, wanted):
                yield file, row
                done += 1
            self._refuse_changed(file, before, done)
            self._seen[file] = (before, done)

    def _values_of(self, file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
        if self.source.reader == "json":
            if not file.stat().st_size:
                raise delimited.empty(file)
            for _, row in json_rows.rows(file):
                yield {name: json_rows.plain(row[name]) for name in columns if name in row}
            return
        self.require(file, columns)
        if self.source.reader == "parquet":
            yield from parquet.values(file, columns)
            return
        for arrays in delimited.read(file, self.dialect(file), columns, check=file not in self._seen):
            for values in zip(*map(_values, arrays), strict=True):
                yield dict(zip(columns, values, strict=True))

    def of_file(self, file: Path, columns: Sequence[str], *, fields: Sequence[str] = ()) -> Iterator[Batch]:
        """The same of one of its files."""
        before, done = _state(file), 0
        self._refuse_changed(file, before)
        for arrays in self._read(file, columns, fields):
            yield Batch(file=file, start=done, columns=arrays)
            done += len(arrays[0])
        self._refuse_changed(file, before, done)
        self._seen[file] = (before, done)

    def first_rows(self, count: int) -> tuple[dict[str, Any], ...]:
        """The first rows with all columns, with values as the format has them, for a look at what they are."""
        if self.source.reader == "hub":
            return hub.first_rows(self.hub_table(), count)
        file = self.source.files[0]
        if self.source.reader == "parquet":
            return parquet.first_rows(file, count)
        if self.source.reader == "json":
            return tuple(json_rows.plain(row) for _, row in itertools.islice(json_rows.rows(file), count))
        dialect = self.dialect(file)
        names = list(dict.fromkeys(dialect.names))
        batches = delimited.read(file, dialect, names, check=False)
        rows = (
            dict(zip(names, row, strict=True)) for arrays in batches for row in zip(*map(_values, arrays), strict=True)
        )
        return tuple(itertools.islice(rows, count))

    def hub_table(self) -> Any:
        """The `datasets.Dataset` of a hub name, opened once."""
        if self._hub is None:
            self._hub = hub.load(self.source.location, split=self.source.split)
        return self._hub

    def _read(self, file: Path, columns: Sequence[str], fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        if self.source.reader == "json":
            yield from self._json(file, columns, fields)
        elif self.source.reader == "parquet":
            self.require(file, columns, fields=fields)
            yield from parquet.read(file, columns)
        else:
            self.require(file, columns, fields=fields)
            yield from delimited.read(file, self.dialect(file), columns, check=file not in self._seen)

    def require(self, file: Path, columns: Sequence[str], *, fields: Sequence[str] = ()) -> None:
        """Raises DataError when one of its files lacks one of these columns; of JSON only its rows tell."""
        if self.source.reader != "json":
            names = parquet.names(file) if self.source.reader == "parquet" else self.dialect(file).names
            self._require(columns, fields, names, file)

    def dialect(self, file: Path) -> delimited.Dialect:
        """How one of its delimited files is written."""
        if file not in self._dialects:
            usual = USUAL_DELIMITER[self.source.reader]
            self._dialects[file] = delimited.inspect(
                file, usual=usual, named=self.source.delimiter, limit=self._looked_at
            )
            self.notes += self._dialects[file].notes
        return self._dialects[file]

    def _json(self, file: Path, columns: Sequence[str], fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        if not file.stat().st_size:
            raise delimited.empty(file)
        absent: set[str] = set(columns)
        names: dict[str, None] = {}
        rows = json_rows.rows(file)
        while found := list(itertools.islice(rows, parquet.ROWS_AT_A_TIME)):
            if absent:
                names.update((name, None) for _, row in found for name in row)
                absent -= names.keys()
            yield tuple(json_rows.array(found, name, file) for name in columns)
        if names or not absent:
            self._require(columns, fields, tuple(names), file, absent=absent)

    def _require(
        self,
        columns: Sequence[str],
        fields: Sequence[str],
        names: Sequence[str],
        place: object,
        *,
        absent: set[str] | None = None,
    ) -> None:
        gone = [name for name in columns if (name not in names if absent is None else name in absent)]
        if not gone:
            return
        number = list(columns).index(gone[0])
        option = f"data.{fields[number]}=" if fields else "column "
        near = difflib.get_close_matches(gone[0], names, n=1, cutoff=0.4) or list(names)[:1]
        raise DataError(
            f"{place} has no column {gone[0]!r}",
            got=f"{option}{gone[0]}",
            allowed=", ".join(names),
            do=f"set {option}{near[0]}" if near else None,
        )

    def _refuse_changed(self, file: Path, before: tuple[int, ...], rows: int | None = None) -> None:
        """Between two passes over a file, or during one, it may be replaced: rows would be others than were counted."""
        seen = self._seen.get(file)
        changed = _state(file) != before or (seen is not None and (seen[0] != before or rows not in (None, seen[1])))
        if changed:
            raise DataError(f"{file} has changed while it was read", do="start again once it is written whole")


def _values(array: Any) -> list[str]:
    found: list[str] = array.to_pylist()
    return found


def _state(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError as error:
        raise unreadable(file, error) from error
    return found.st_size, found.st_mtime_ns, found.st_ino
