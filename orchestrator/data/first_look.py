"""A source -> its columns and some of its rows: the first, and of a large one some from further on.

Rows are often sorted by class, so that the first tell nothing of the others. `advise` and `run` look alike, and choose
the same columns.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.data import parts
from orchestrator.data.columns import Preview
from orchestrator.data.formats import hub, json_rows, parquet
from orchestrator.data.sampling import HEAD_BYTES, WHOLE_BYTES
from orchestrator.data.sources import Source
from orchestrator.data.tables import Table
from orchestrator.errors import DataError

FIRST_ROWS = 400
LATER_ROWS = 50
"""From each of the places below."""
PLACES = (0.25, 0.5, 0.75, 0.999)
"""Where else rows are looked at, as shares of all bytes, or of a hub dataset's rows. A guess."""
LATER_BYTES = 64_000
"""Looked at from each place, and as much again for the row that ends behind them."""


def preview(source: Source) -> Preview:
    """The columns and some rows of a source.

    Raises DataError when its first file cannot be read or parsed, or has no rows.
    """
    if source.reader == "text":
        return Preview(location=source.location, names=(), rows=())
    large = source.reader in ("csv", "tsv") and source.files[0].stat().st_size > WHOLE_BYTES
    table = Table(source, looked_at=HEAD_BYTES if large else None)
    rows = table.first_rows(FIRST_ROWS)
    if not rows:
        place = source.files[0] if source.files else source.location
        raise DataError(f"{place} holds no rows", got="a header at most", do="check the file")
    names = tuple(dict.fromkeys(name for row in rows for name in row)) if source.reader == "json" else table.names()
    if not names:
        place = source.files[0] if source.files else source.location
        raise DataError(f"{place} holds no columns", got=f"{len(rows)} empty rows", do="check the file")
    if len(rows) == FIRST_ROWS:
        seen_bytes = sum(len(repr(row).encode(errors="replace")) for row in rows)
        rows += tuple({name: row.get(name) for name in names} for row in _later(table, names, seen_bytes))
    return Preview(location=source.location, names=names, rows=rows)


def _later(table: Table, names: tuple[str, ...], seen_bytes: int) -> Iterator[dict[str, Any]]:
    """Rows from further on, where they can be had without reading all before them; what cannot be read is left out.

    `seen_bytes` is about as much as the first rows take.
    """
    source = table.source
    if source.reader == "hub":
        every = table.hub_table()
        for start in (round(place * len(every)) for place in PLACES):
            yield from hub.values(every, range(max(FIRST_ROWS, start), min(len(every), start + LATER_ROWS)))
        return
    sizes = [file.stat().st_size for file in source.files]
    ends = list(itertools.accumulate(sizes))
    for place in PLACES:
        number = next(index for index, end in enumerate(ends) if place * ends[-1] <= end)
        file, offset = source.files[number], int(place * ends[-1]) - (ends[number] - sizes[number])
        if number or offset > seen_bytes or source.reader == "parquet":
            with suppress(DataError, OSError):
                yield from itertools.islice(_rows_at(table, file, offset, names), LATER_ROWS)


def _rows_at(table: Table, file: Path, offset: int, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    table.require(file, names)
    if table.source.reader == "parquet":
        start = int(offset / max(1, file.stat().st_size) * parquet.group_at(file, 0)[2])
        if start >= FIRST_ROWS or file != table.source.files[0]:
            yield from parquet.rows_at(file, start, LATER_ROWS)
        return
    if file.suffix == ".gz":
        return
    with file.open("rb") as stream:
        stream.seek(offset)
        if not stream.readline(LATER_BYTES).endswith(b"\n"):  # the row that is cut here
            return
        part = stream.read(LATER_BYTES)
        if not part.endswith(b"\n"):
            part += stream.readline(LATER_BYTES)
        ahead = stream.read(LATER_BYTES)
    if table.source.reader == "json":
        yield from (json_rows.plain(row) for _, row in json_rows.parse(io.BytesIO(part), file))
    elif (arrays := parts.rows_in(part, ahead, table.dialect(file), names)) is not None:
        values = (array.to_pylist() for array in arrays)
        yield from (dict(zip(names, row, strict=True)) for row in zip(*values, strict=True))
