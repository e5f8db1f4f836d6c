"""Rows of Parquet files and hub datasets, whole or in runs, for `sampling`. Loads pyarrow or `datasets` when called."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.data.hub import load_table
from orchestrator.data.sources import Source
from orchestrator.errors import DataError

Row = dict[str, Any]

ROWS_OF_RUN = 1_000
"""Neighbouring rows that are drawn together."""


def parquet_rows(file: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """All rows of a Parquet file, with all or some of its columns."""
    import pyarrow as pa

    try:
        for batch in _open(file).iter_batches(batch_size=ROWS_OF_RUN, columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def parquet_run(file: Path, columns: list[str], *, at: float) -> tuple[int, list[Row], int]:
    """(number, first rows, their share of the file's bytes) of the row group that lies `at` 0..1 into a file."""
    import pyarrow as pa

    try:
        table = _open(file)
        group = min(int(at * table.num_row_groups), table.num_row_groups - 1)
        rows = next(table.iter_batches(batch_size=ROWS_OF_RUN, row_groups=[group], columns=columns)).to_pylist()
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise _unreadable(file, error) from error
    return group, rows, round(file.stat().st_size * len(rows) / table.metadata.num_rows)


def hub_runs(source: Source, *, runs: int, seed: int) -> tuple[int, list[list[Row]]]:
    """(rows in all, runs of neighbouring rows) of a dataset on the hub; everything in one run where that is less."""
    table = load_table(source)
    total = len(table)
    if total <= runs * ROWS_OF_RUN:
        return total, [[_named(row, table.features) for row in table]]
    draw = random.Random(seed)
    part = total // runs
    starts = [number * part + draw.randrange(part - ROWS_OF_RUN + 1) for number in range(runs)]
    return total, [
        [_named(row, table.features) for row in table.select(range(start, start + ROWS_OF_RUN))] for start in starts
    ]


def first_rows(source: Source, count: int) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """(column names, first rows) of a source."""
    if source.reader == "hub":
        table = load_table(source)
        return tuple(table.column_names), tuple(
            _named(row, table.features) for row in table.select(range(min(count, len(table))))
        )
    file = source.files[0]
    return tuple(_open(file).schema_arrow.names), tuple(itertools.islice(parquet_rows(file), count))


def _named(row: Row, features: Any) -> Row:
    """The row with the hub's class numbers as their names; a negative one is no class."""
    return {
        name: (features[name].names[value] if value is not None and value >= 0 else None)
        if hasattr(features[name], "int2str")
        else value
        for name, value in row.items()
    }


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: BaseException) -> DataError:
    return DataError(
        f"{file} cannot be read as Parquet", got=" ".join(str(error).split())[:200] or "no rows", do="write it anew"
    )
