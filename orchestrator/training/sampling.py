"""Files -> a `Reading` of their texts and classes: whole up to a size, blocks drawn at random beyond it.

For measuring, not for training: no table is built and nothing is cached, so that an answer about a dataset takes about
as long as reading it. Plain tables are read with the standard library, which also knows the line of a mistake.
"""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import itertools
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.data.columns import Columns, Preview, class_name
from orchestrator.data.sources import Source
from orchestrator.errors import DataError
from orchestrator.policy.dataset import Block, Reading
from orchestrator.training import columnar

WHOLE_BYTES = 32_000_000
"""Files of at most this size together are read whole: about 5 s (measured: 60 MB of short texts in CSV take 11 s)."""
SAMPLE_BLOCKS = 128
BLOCK_BYTES = 128_000
"""Larger ones in this many blocks of this size, 16 MB, one at a random place in each of as many equal parts."""
PACKED = 4
"""Bytes of text in a byte of a packed or Parquet file, roughly: deflate on prose and code."""
PREVIEW_ROWS = 200
"""Rows from which columns are guessed."""
_LONGEST_FIELD = 1 << 30  # The csv module's own limit is 131,072 characters, and documents are longer.
_RESYNC_LINES = 64  # Lines of a block at which a CSV row is tried to begin: quoted fields span lines.
_COMPLETE = 0.9  # Share of rows as wide as the header where it does; from inside of a field, hardly any are.

Row = dict[str, Any]


def preview(source: Source) -> Preview:
    """The columns and first rows of a source.

    Raises DataError when its first file cannot be read or parsed.
    """
    if source.reader == "text":
        return Preview(location=source.location, names=(), rows=())
    if source.reader in ("parquet", "hub"):
        names, rows = columnar.first_rows(source, PREVIEW_ROWS)
        return Preview(location=source.location, names=names, rows=rows)
    first = next((file for file in source.files if file.stat().st_size), source.files[0])
    rows = tuple(itertools.islice(_rows(first, source), PREVIEW_ROWS))
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise DataError(f"{first} holds no rows", got=f"{first.stat().st_size} bytes", do="check the file")
    return Preview(location=source.location, names=names, rows=rows)


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
        rows, runs = columnar.hub_runs(sources[0], runs=SAMPLE_BLOCKS, seed=seed)
        found = tuple(_block(run, columns, len(run), location) for run in runs)
        return Reading(location=location, blocks=found, extent=rows, columns=columns)
    files = [(file, source) for source in sources for file in _readable(source)]
    sizes = [file.stat().st_size for file, _ in files]
    if not sum(sizes):
        raise DataError(f"{location} is empty", got=f"{len(files)} files of 0 bytes", do="check the path")
    packed = sum(size for (file, source), size in zip(files, sizes, strict=True) if _is_packed(file, source))
    if sum(sizes) + (PACKED - 1) * packed <= whole_bytes:
        blocks = [
            _block(_rows(file, source, columns), columns, size, file)
            for (file, source), size in zip(files, sizes, strict=True)
            if size
        ]
    else:
        blocks = _drawn(files, sizes, columns, block_bytes=block_bytes, seed=seed)
    text = all(source.reader == "text" for source in sources) and not packed
    return Reading(
        location=location,
        blocks=tuple(blocks),
        extent=sum(sizes),
        columns=columns,
        document_bytes=tuple(sizes) if text else (),
    )


def _readable(source: Source) -> list[Path]:
    """Files of a source without the binary ones of a folder, by Git's test: a NUL among the first bytes."""
    if source.reader != "text":
        return list(source.files)
    binary = {file for file in source.files if file.suffix != ".gz" and b"\0" in _first_bytes(file)}
    if binary and (not source.searched or len(binary) == len(source.files)):
        raise DataError(f"{min(binary)} is not text", got="a binary file", allowed="text, jsonl, csv or parquet")
    return [file for file in source.files if file not in binary]


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(8000)
    except OSError as error:
        raise DataError(f"{file} cannot be read", got=error.strerror) from error


def _is_packed(file: Path, source: Source) -> bool:
    return file.suffix == ".gz" or source.reader == "parquet"


def _block(rows: Iterable[Row], columns: Columns, extent: int, location: object) -> Block:
    texts: list[str] = []
    labels: list[str | None] = []
    for row in rows:
        value = columns.layout.text(row) if columns.layout else row.get(columns.text or _DOCUMENT)
        if isinstance(value, (list, dict)):
            raise DataError(
                f"column {columns.text!r} of {location} does not hold text",
                got=f"a {type(value).__name__}: {str(value)[:60]}",
                allowed="strings or numbers",
                do="name another column with --text-column, or write this one as strings",
            )
        texts.append("" if value is None else str(value))
        if columns.label is not None:
            labels.append(class_name(row.get(columns.label), column=columns.label, location=str(location)))
    return Block(texts=tuple(texts), labels=tuple(labels), extent=extent)


_DOCUMENT = ""
"""Key of the text in the single row that a text file is."""


def _rows(file: Path, source: Source, columns: Columns | None = None) -> Iterator[Row]:
    """All rows of a file; of Parquet files only the columns that are wanted."""
    if source.reader == "parquet":
        yield from columnar.parquet_rows(file, None if columns is None else list(columns.used))
        return
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield from _parsed(stream, file, source)  # type: ignore[arg-type]
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read", got=getattr(error, "strerror", None) or str(error)) from error


def _parsed(stream: BinaryIO, file: Path, source: Source) -> Iterator[Row]:
    if source.reader == "text":
        yield {_DOCUMENT: stream.read().decode("utf-8-sig", errors="replace")}  # as training reads it
    elif source.reader == "json":
        yield from _json_rows(stream, file)
    else:
        for _, row in _csv_rows(stream, file, _delimiter(source)):
            yield row


def _delimiter(source: Source) -> str:
    return "\t" if source.reader == "tsv" else ","


def _csv_rows(stream: BinaryIO, file: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """(line on which it ends, row) of all rows behind the header."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(_lines(stream, file), delimiter=delimiter)
    header: list[str] | None = None
    try:
        for fields in reader:
            if header is None:
                header = fields
            elif len(fields) > len(header):
                raise DataError(
                    f"line {reader.line_num} of {file} has more fields than the header",
                    got=f"{len(fields)} fields",
                    allowed=f"{len(header)}: {', '.join(header)}",
                    do="quote fields that hold the delimiter or a line break",
                )
            elif fields:
                yield reader.line_num, dict(itertools.zip_longest(header, fields))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {file} is not valid CSV", got=str(error)) from error


def _json_rows(stream: BinaryIO, file: Path) -> Iterator[Row]:
    """Rows of a file with one object a line, or with one array of objects."""
    lines = enumerate(_lines(stream, file), start=1)
    for number, line in lines:
        if line.lstrip().startswith("["):
            text = line + "".join(rest for _, rest in lines)
            for value in _parse(text, file, number):
                yield _object(value, file, number)
        elif line.strip():
            yield _object(_parse(line, file, number), file, number)


def _parse(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"line {line} of {file} is not valid JSON",
            got=f"{text.strip()[:60]} ({error})",
            allowed="one object a line, or one array of objects",
            do="write each row on a line of its own",
        ) from error


def _object(value: Any, file: Path, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"line {line} of {file} is no JSON object",
            got=json.dumps(value)[:60],
            allowed='objects such as {"text": "...", "label": "..."}',
        )
    return value


def _lines(stream: BinaryIO, file: Path) -> Iterator[str]:
    """Lines of UTF-8 text with their ends, without a byte order mark."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number} of {file} is not UTF-8",
                got=f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line",
                do=f"convert it: iconv -f latin1 -t utf-8 {file.name}, if it is Latin-1",
            ) from error


def _drawn(
    files: Sequence[tuple[Path, Source]], sizes: Sequence[int], columns: Columns, *, block_bytes: int, seed: int
) -> list[Block]:
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
        (file, source), offset = files[index], place - (ends[index] - sizes[index])
        if source.reader == "parquet":
            group, rows, extent = columnar.parquet_run(file, list(columns.used), at=offset / sizes[index])
            blocks[index, group] = _block(rows, columns, extent, file)
        elif file.suffix != ".gz":
            rows, extent = _plain_run(file, source, offset, block_bytes)
            blocks[index, offset] = _block(rows, columns, extent, file)
        elif (index, 0) not in blocks:
            share = block_bytes * max(1, SAMPLE_BLOCKS // len(files)) // PACKED
            rows, extent = _packed_run(file, source, share)
            blocks[index, 0] = _block(rows, columns, extent, file)
    return list(blocks.values())


def _plain_run(file: Path, source: Source, offset: int, length: int) -> tuple[list[Row], int]:
    """Rows that begin in `length` bytes from `offset`, or that piece of a text; and the bytes looked at."""
    looked_at = min(length, file.stat().st_size - offset)
    with file.open("rb") as stream:
        header = b"" if source.reader in ("text", "json") else stream.readline()
        if source.reader == "text":
            stream.seek(offset)
            return [{_DOCUMENT: stream.read(length).decode(errors="ignore")}], looked_at
        if offset >= max(1, len(header)):
            stream.seek(offset - 1)
            stream.readline()  # the row that is cut here begins in the part before
        part = stream.read(max(0, offset + length - stream.tell()))
        if part and not part.endswith(b"\n"):
            part += stream.readline()
        ahead = b"" if source.reader == "json" else stream.read(length)  # a quoted field may go on there
    if source.reader != "json":
        return _csv_run(header, part, ahead, file, _delimiter(source)), looked_at
    try:
        return list(_json_rows(io.BytesIO(part), file)), looked_at
    except DataError as error:  # its line counts from the block's first
        raise DataError(
            f"{file} is too large to read whole, and a part of it cannot be read",
            got=f"within {length} bytes of byte {offset}: {error.got}",
            allowed=error.allowed or "one object a line",
            do="write each row on a line of its own, in UTF-8",
        ) from error


def _csv_run(header: bytes, part: bytes, ahead: bytes, file: Path, delimiter: str) -> list[Row]:
    """Rows that begin in a part of a CSV file, which begins at a line: maybe one in the middle of a quoted field.

    Rows are taken to begin where what follows parses into rows as wide as the header.
    """
    lines = part.splitlines(keepends=True)
    for start in range(min(len(lines), _RESYNC_LINES)):
        if _ends_a_field(lines[start], delimiter.encode()):
            continue
        stream = io.BytesIO(header + b"".join(lines[start:]) + ahead)
        rows: list[Row] = []
        end = 1  # the header's line
        try:
            for line, row in _csv_rows(stream, file, delimiter):
                if end > len(lines) - start:
                    break
                rows.append(row)
                end = line
        except DataError:
            continue
        complete = [None not in row.values() for row in rows]
        if rows and complete[0] and sum(complete) >= _COMPLETE * len(rows):
            return rows
    return []


def _ends_a_field(line: bytes, delimiter: bytes) -> bool:
    """Whether a quote closes in a line where none has opened."""
    fields = line.split(delimiter)
    return next((not field.startswith(b'"') for field in fields if b'"' in field), False)


def _packed_run(file: Path, source: Source, length: int) -> tuple[list[Row], int]:
    """Rows in the first `length` bytes on disk of a packed file, and how many bytes that were."""
    with file.open("rb") as stream:
        packed = stream.read(length)
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)  # with gzip's header
    try:
        part = unpacker.decompress(packed)
    except zlib.error as error:
        raise DataError(f"{file} cannot be read", got=str(error)) from error
    if source.reader != "text" and not unpacker.eof:
        part = part[: part.rfind(b"\n") + 1]
    return list(_parsed(io.BytesIO(part), file, source)), len(packed) - len(unpacker.unused_data)
