"""Files -> a `Reading` of their texts and classes: whole up to a size, blocks drawn at random beyond it.

For measuring, not for training: what is read stays in memory. Values come through the reader that `run` has, so that
both see the same rows and classes.
"""

from __future__ import annotations

import bisect
import io
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data import parts
from orchestrator.data.columns import Columns
from orchestrator.data.formats import hub, json_rows, parquet
from orchestrator.data.formats.raw_bytes import is_binary, piece_of_text, read_text
from orchestrator.data.incomplete import Gaps
from orchestrator.data.labels import refuse_fractions, similar_labels
from orchestrator.data.reading import Block, Reading
from orchestrator.data.sources import Source
from orchestrator.data.tables import Table
from orchestrator.errors import DataError

WHOLE_BYTES = 32_000_000
"""Files of at most this size together are read whole: about 5 s (measured: 60 MB of short texts in CSV take 11 s)."""
SAMPLE_BLOCKS = 128
BLOCK_BYTES = 128_000
"""Larger ones in this many blocks of this size, 16 MB, one at a random place in each of as many equal parts."""
PACKED = 4
"""Bytes of text in a byte of a packed or Parquet file, roughly: deflate on prose and code."""
HEAD_BYTES = 4_000_000
"""First bytes that tell how a delimited file is written where it is too large to read whole. A guess."""
ROWS_OF_RUN = 1_000
"""Neighbouring rows that are drawn together, where a place is a row and not a byte."""


def read(
    sources: Sequence[Source],
    columns: Columns,
    *,
    whole_bytes: int = WHOLE_BYTES,
    block_bytes: int = BLOCK_BYTES,
    seed: int,
) -> Reading:
    """Texts and classes of all rows, or of blocks drawn by `seed` when the files pass `whole_bytes`.

    Raises DataError when a file cannot be read or parsed; the message names its line where there is one.
    """
    location = ", ".join(dict.fromkeys(source.location for source in sources))
    if any(source.reader == "hub" for source in sources):
        return _hub_reading(sources[0], columns, location, seed=seed)
    files = [(file, source) for source in sources for file in _readable(source)]
    sizes = [file.stat().st_size for file, _ in files]
    if not sum(sizes):
        raise DataError(f"{location} is empty", got=f"{len(files)} files of 0 bytes", do="check the path")
    packed = sum(size for (file, source), size in zip(files, sizes, strict=True) if _is_packed(file, source))
    whole = sum(sizes) + (PACKED - 1) * packed <= whole_bytes
    tables = {id(s): Table(s, looked_at=None if whole else HEAD_BYTES) for s in sources if s.reader != "text"}
    opened = [_File(path=file, table=tables.get(id(source)), columns=columns) for file, source in files]
    if whole:
        blocks = [file.block(size) for file, size in zip(opened, sizes, strict=True)]
    else:
        blocks = _drawn(opened, sizes, block_bytes=block_bytes, seed=seed)
    text = all(source.reader == "text" for source in sources) and not packed
    notes = [note for table in tables.values() for note in table.notes]
    return Reading(
        location=location,
        blocks=tuple(blocks),
        extent=sum(sizes),
        columns=columns,
        document_bytes=tuple(sizes) if text else (),
        notes=(*notes, *_about_labels(blocks, columns, location)),
    )


def _readable(source: Source) -> list[Path]:
    """Files of a source without the binary ones of a folder."""
    if source.reader != "text":
        return list(source.files)
    binary = {file for file in source.files if is_binary(file)}
    if binary and (not source.searched or len(binary) == len(source.files)):
        raise DataError(f"{min(binary)} is not text", got="a binary file", allowed="text, jsonl, csv or parquet")
    return [file for file in source.files if file not in binary]


def _is_packed(file: Path, source: Source) -> bool:
    return file.suffix == ".gz" or source.reader == "parquet"


def _about_labels(blocks: Sequence[Block], columns: Columns, location: str) -> list[str]:
    """What `run` would say of the rows: which miss a text or a label, and which labels look alike.

    Raises DataError where it would refuse the labels.
    """
    if columns.label is None:
        return []
    gaps = Gaps(location, columns.text or "", columns.label)
    counts: Counter[str] = Counter()
    for block in blocks:
        no_text = np.array([not text or text.isspace() for text in block.texts], dtype=bool)
        gaps.count(no_text, np.array([label is None for label in block.labels], dtype=bool))
        counts.update(label for label, blank in zip(block.labels, no_text, strict=True) if label and not blank)
    refuse_fractions(counts, column=columns.label, location=location)
    return [*gaps.advice(), *similar_labels(counts)]


def _block(arrays: Sequence[Any], columns: Columns, extent: int) -> Block:
    """A block of the arrays of `columns.used`."""
    values = dict(zip(columns.used, (array.to_pylist() for array in arrays), strict=True))
    assert columns.text is not None, "layouts have rows"
    labels = () if columns.label is None else values[columns.label]
    return Block(
        texts=tuple(values[columns.text]),
        labels=tuple(label if label and not label.isspace() else None for label in labels),
        extent=extent,
    )


def _laid_out(rows: Iterable[dict[str, Any]], columns: Columns, extent: int) -> Block:
    """A block of rows whose text is that of several columns."""
    assert columns.layout is not None
    return Block(texts=tuple(columns.layout.text(row) for row in rows), labels=(), extent=extent)


def _joined(batches: Iterable[Sequence[Any]], columns: Columns, extent: int) -> Block:
    found = [_block(arrays, columns, 0) for arrays in batches]
    return Block(
        texts=tuple(itertools.chain.from_iterable(block.texts for block in found)),
        labels=tuple(itertools.chain.from_iterable(block.labels for block in found)),
        extent=extent,
    )


def _hub_reading(source: Source, columns: Columns, location: str, *, seed: int) -> Reading:
    """All rows of a dataset on the hub, or runs of neighbouring ones."""
    table = hub.load(source.location, split=source.split)
    total, runs = len(table), [range(len(table))]
    if total > SAMPLE_BLOCKS * ROWS_OF_RUN:
        draw, part = random.Random(seed), total // SAMPLE_BLOCKS
        starts = [number * part + draw.randrange(part - ROWS_OF_RUN + 1) for number in range(SAMPLE_BLOCKS)]
        runs = [range(start, start + ROWS_OF_RUN) for start in starts]
    blocks = tuple(
        _laid_out(hub.values(table, run), columns, len(run))
        if columns.layout
        else _joined(hub.read(table, columns.used, location=location, rows=run), columns, len(run))
        for run in runs
    )
    notes = tuple(_about_labels(blocks, columns, location))
    return Reading(location=location, blocks=blocks, extent=total, columns=columns, notes=notes)


class _File:
    """A file, and how its rows or its text become blocks."""

    def __init__(self, *, path: Path, table: Table | None, columns: Columns) -> None:
        self.path, self._table, self._columns = path, table, columns
        self.reader = "text" if table is None else table.source.reader
        if table is not None:
            table.require(path, columns.used)

    def block(self, size: int) -> Block:
        """All of it."""
        if self._table is None:
            return Block(texts=(read_text(self.path),), labels=(), extent=size)
        if self._columns.layout is not None:
            return _laid_out(self._rows(), self._columns, size)
        batches = self._table.of_file(self.path, self._columns.used)
        return _joined((batch.columns for batch in batches), self._columns, size)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """All rows as Python values."""
        assert self._table is not None
        if self.reader == "json":
            yield from (json_rows.plain(row) for _, row in json_rows.rows(self.path))
        elif self.reader == "parquet":
            yield from parquet.values(self.path, list(self._columns.used))
        else:
            for batch in self._table.of_file(self.path, self._columns.used):
                yield from self._dicts(batch.columns)

    def _dicts(self, arrays: Sequence[Any]) -> Iterator[dict[str, Any]]:
        names = self._columns.used
        return (dict(zip(names, row, strict=True)) for row in zip(*(a.to_pylist() for a in arrays), strict=True))

    def parquet_run(self, place: float, size: int) -> tuple[int, Block]:
        """(number of the row group at a place 0..1, its first rows)."""
        group, rows, total = parquet.group_at(self.path, place)
        count = min(rows, ROWS_OF_RUN)
        extent = round(size * count / max(1, total))
        if self._columns.layout is not None:
            values = itertools.islice(parquet.values(self.path, list(self._columns.used), groups=[group]), count)
            return group, _laid_out(values, self._columns, extent)
        batches = parquet.read(self.path, self._columns.used, groups=[group], rows=max(1, count))
        return group, _joined(itertools.islice(batches, 1), self._columns, extent)

    def plain_run(self, offset: int, length: int, size: int) -> Block:
        """Rows that begin in `length` bytes from `offset`, or that piece of a text."""
        extent = min(length, size - offset)
        with self.path.open("rb") as stream:
            if self._table is None:
                stream.seek(offset)
                return Block(texts=(piece_of_text(self.path, stream.read(length), offset),), labels=(), extent=extent)
            header = 0 if self.reader == "json" else self._begin_of_rows(stream.readline)
            if offset >= max(1, header):
                stream.seek(offset - 1)
                stream.readline()  # the row that is cut here begins in the part before
            part = stream.read(max(0, offset + length - stream.tell()))
            if part and not part.endswith(b"\n"):
                part += stream.readline()
            ahead = b"" if self.reader == "json" else stream.read(length)  # a quoted field may go on there
        return self._parsed(part, ahead, extent, f"within {length} bytes of byte {offset}")

    def _begin_of_rows(self, readline: Any) -> int:
        """Bytes of the header, with the stream left behind it."""
        assert self._table is not None
        return sum(len(readline()) for _ in range(self._table.dialect(self.path).header_rows))

    def packed_run(self, length: int) -> Block:
        """Rows in the first `length` bytes on disk of a packed file."""
        with self.path.open("rb") as stream:
            packed = stream.read(length)
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)  # with gzip's header
        try:
            part = unpacker.decompress(packed)
        except zlib.error as error:
            raise DataError(f"{self.path} cannot be read", got=str(error)) from error
        extent = len(packed) - len(unpacker.unused_data)
        if self._table is None:
            return Block(texts=(piece_of_text(self.path, part, 0),), labels=(), extent=extent)
        if not unpacker.eof:
            part = part[: part.rfind(b"\n") + 1]
        if self.reader != "json":
            lines = io.BytesIO(part)
            self._begin_of_rows(lines.readline)
            part = lines.read()
        return self._parsed(part, b"", extent, f"in its first {length} bytes")

    def _parsed(self, part: bytes, ahead: bytes, extent: int, place: str) -> Block:
        assert self._table is not None
        if self.reader == "json":
            return self._json_block(part, extent, place)
        dialect = self._table.dialect(self.path)
        arrays = parts.rows_in(part, ahead, dialect, self._columns.used)
        if arrays is None:
            if not dialect.quoted and part.strip():
                raise DataError(
                    f"{self.path} has a row with more or fewer fields than the header, or that is no UTF-8",
                    got=place,
                    allowed=f"{len(dialect.names)} fields: {', '.join(dialect.names)}",
                    do="write each row with all its fields, in UTF-8",
                )
            return Block(texts=(), labels=(), extent=extent)
        if self._columns.layout is not None:
            return _laid_out(self._dicts(arrays), self._columns, extent)
        return _block(arrays, self._columns, extent)

    def _json_block(self, part: bytes, extent: int, place: str) -> Block:
        try:
            found = list(json_rows.parse(io.BytesIO(part), self.path))
            if self._columns.layout is not None:
                return _laid_out((json_rows.plain(row) for _, row in found), self._columns, extent)
            arrays = [json_rows.array(found, name, self.path) for name in self._columns.used]
        except DataError as error:  # its line counts from the block's first
            raise DataError(
                f"{self.path} is too large to read whole, and a part of it cannot be read",
                got=f"{place}: {error.got}",
                allowed=error.allowed or "one object a line",
                do="write each row on a line of its own, in UTF-8",
            ) from error
        return _block(arrays, self._columns, extent)


def _drawn(files: Sequence[_File], sizes: Sequence[int], *, block_bytes: int, seed: int) -> list[Block]:
    """Blocks at random places, one in each of `SAMPLE_BLOCKS` equal parts of all bytes.

    There are no places inside of packed files, so their beginnings are read; Parquet files have row groups.
    """
    ends = list(itertools.accumulate(sizes))
    part = ends[-1] / SAMPLE_BLOCKS
    block_bytes = min(block_bytes, max(1, int(part)))  # so that no two overlap, whose rows would look like copies
    draw = random.Random(seed)
    blocks: dict[tuple[int, int], Block] = {}
    for number in range(SAMPLE_BLOCKS):
        place = min(int(number * part + draw.random() * (part - block_bytes)), ends[-1] - 1)
        index = bisect.bisect_right(ends, place)
        file, offset = files[index], place - (ends[index] - sizes[index])
        if file.reader == "parquet":
            group, block = file.parquet_run(offset / sizes[index], sizes[index])
            blocks[index, group] = block
        elif file.path.suffix != ".gz":
            blocks[index, offset] = file.plain_run(offset, block_bytes, sizes[index])
        elif (index, 0) not in blocks:
            share = block_bytes * max(1, SAMPLE_BLOCKS // len(files)) // PACKED
            blocks[index, 0] = file.packed_run(share)
    return list(blocks.values())
