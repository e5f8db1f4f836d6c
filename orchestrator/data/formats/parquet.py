"""Parquet files -> the columns in use, some rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.data.formats.typed import as_text, class_names_of
from orchestrator.errors import DataError, one_line

ROWS_AT_A_TIME = 1_000
"""A few MB of text."""


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; what goes wrong with it is a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            _refuse_twice(file, table.schema_arrow.names)
            yield table
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two for bytes that are no text
        reason = one_line(error, most=200)
        raise DataError(f"{file} cannot be read as Parquet", got=reason or "no rows", do="write it anew") from error


def _refuse_twice(file: Path, names: Sequence[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        places = [str(place) for place, name in enumerate(names, start=1) if name == twice[0]]
        raise DataError(
            f"{file} has the column name {twice[0]!r} twice",
            got=f"columns {' and '.join(places)} of {len(names)}",
            do="give each column a name of its own",
        )


def names(file: Path) -> tuple[str, ...]:
    """The columns of a file."""
    with opened(file) as table:
        return tuple(table.schema_arrow.names)


def read(
    file: Path, columns: Sequence[str], *, groups: Sequence[int] | None = None, rows: int = ROWS_AT_A_TIME
) -> Iterator[tuple[Any, ...]]:
    """For some rows at a time, an array of strings without nulls for each column; of all row groups or some."""
    done = 0
    with opened(file) as table:
        named = class_names_of(table.schema_arrow.metadata)
        for batch in table.iter_batches(batch_size=rows, columns=list(dict.fromkeys(columns)), row_groups=groups):
            yield tuple(
                as_text(batch.column(name), name=name, location=file, first_row=done, class_names=named.get(name))
                for name in columns
            )
            done += len(batch)


def first_rows(file: Path, count: int) -> tuple[dict[str, Any], ...]:
    """The first rows with all columns, as Python values; class numbers as their names."""
    return tuple(itertools.islice(values(file), count))


def values(
    file: Path, columns: Sequence[str] | None = None, *, groups: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows with some columns or all, as Python values; class numbers as their names."""
    with opened(file) as table:
        named = class_names_of(table.schema_arrow.metadata)
        for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns, row_groups=groups):
            for row in batch.to_pylist():
                yield {name: class_name(value, named.get(name)) for name, value in row.items()}


def rows_at(file: Path, start: int, count: int) -> Iterator[dict[str, Any]]:
    """So many rows from a number on, with all columns, as Python values; those before are decoded, not converted."""
    with opened(file) as table:
        named = class_names_of(table.schema_arrow.metadata)
        done = 0
        for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME):
            if start < done + len(batch):
                for row in batch.slice(max(0, start - done), count).to_pylist():
                    yield {name: class_name(value, named.get(name)) for name, value in row.items()}
                return
            done += len(batch)


def group_at(file: Path, place: float) -> tuple[int, int, int]:
    """(number of the row group that lies `place` 0..1 into a file, rows in it, rows in the file)."""
    with opened(file) as table:
        metadata = table.metadata
        group = min(int(place * metadata.num_row_groups), metadata.num_row_groups - 1)
        return group, metadata.row_group(group).num_rows if group >= 0 else 0, metadata.num_rows


def class_name(value: Any, names: Sequence[str] | None) -> Any:
    """A value of a column whose numbers stand for classes as the class's name; a negative one is no class."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
