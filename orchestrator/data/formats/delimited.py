"""csv, tsv and tab files -> the text that stands in each field, exactly as Python's csv module reads it.

`inspect` says how a file is written, from its first rows, and of tab-separated files from all; `read` streams the
fields of the columns in use as pyarrow's arrays of strings, and refuses what no reader could tell from the rows that it
gives. No value is taken for a number, a truth value, a date or for missing.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from orchestrator.data.formats.arrow_memory import memory
from orchestrator.data.formats.delimiters import NAMES, find_delimiter
from orchestrator.data.formats.orange import has_orange_headers
from orchestrator.data.formats.quoting import LONGEST_FIELD, QuoteScan, find_swallowed, judge_tabs
from orchestrator.data.formats.raw_bytes import CHUNK_BYTES, Utf8Check, check_utf8, chunks, opened
from orchestrator.errors import DataError, one_line

BLOCK_BYTES = 3 << 17
"""Parsed at once. Each block passes from pyarrow's reading thread to ours, which may wait 5 ms for Python's lock: with
1 << 17, 500 MB of short texts took twice the time; with pyarrow's default of 1 << 20, a sixth more memory."""
_ROWS_OF_CSV = 1_000
_LONGEST_ROW = 1 << 30  # Bytes; pyarrow counts a block's bytes in 31 bits.
_RELEASE_S = 10.0  # Of waiting for pyarrow's thread, which takes microseconds.


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a delimited file is written."""

    delimiter: str
    quoted: bool
    """Whether a quote at the start of a field quotes."""
    names: tuple[str, ...]
    """The columns, in the file's order."""
    header_rows: int
    """Rows, blank lines among them, before the first that holds data."""
    has_rows: bool = True
    """Whether anything stands behind the header."""
    notes: tuple[str, ...] = ()
    """What a reader of the file's content may not expect, a sentence each."""


def inspect(file: Path, *, usual: str, named: str | None = None, limit: int | None = None) -> Dialect:
    """How a file is written; of a large one from its first `limit` bytes.

    `usual` is the delimiter of the file's ending, `named` the one that someone has set. Raises DataError when the file
    is empty, its delimiter cannot be told, or a name stands twice in its header.
    """
    head, cut = _head(file, limit or CHUNK_BYTES)
    if not head:
        raise empty(file)
    delimiter, notes = _delimiter(file, head, usual=usual, named=named, cut=cut)
    quoted = True
    if delimiter == "\t":
        quoted, note = _tabs_quote(file, head, limit)
        notes += note
    with _lines(file, limit, head) as lines:
        names, header_rows, orange, has_rows = _header(lines, delimiter, quoted=quoted)
    if orange:
        notes.append(f"{file.name}: rows 2 and 3 are Orange's types and roles ({orange}), no data")
    _refuse_twice(file, names)
    return Dialect(
        delimiter=delimiter, quoted=quoted, names=names, header_rows=header_rows, has_rows=has_rows, notes=tuple(notes)
    )


def empty(file: Path) -> DataError:
    """The error for a file without a byte: not even a header says what it holds."""
    return DataError(f"{file} is empty", got="0 bytes", do="remove it, or leave it out with data.exclude")


def _head(file: Path, size: int) -> tuple[bytes, bool]:
    """(the first bytes of a file, up to the end of a line where one ends there; whether there are more)."""
    with opened(file) as stream:
        head = stream.read(size)
        cut = len(head) == size and bool(stream.read(1))
    return (head[: head.rfind(b"\n") + 1] or head) if cut else head, cut


def _delimiter(file: Path, head: bytes, *, usual: str, named: str | None, cut: bool) -> tuple[str, list[str]]:
    """(delimiter, a note where it is not the usual one)."""
    sample = head.decode("utf-8-sig", errors="replace")
    if named is not None:
        found = find_delimiter(sample, usual=named, cut=cut)
        if found.value != named:
            raise DataError(
                f"{NAMES.get(named, repr(named))} do not separate the fields of {file}",
                got=f"the header {sample.splitlines()[0][:80]!r}; {found.reason}",
                do=f"name {NAMES[found.value]}, or no delimiter",
            )
        return named, []
    found = find_delimiter(sample, usual=usual, cut=cut)
    if found.rivals:
        raise DataError(
            f"the delimiter of {file} cannot be told",
            got=f"header and rows agree on {' and on '.join(NAMES[value] for value in found.rivals)} alike",
            allowed=", ".join(NAMES.values()),
            do="name it with data.delimiter, or --delimiter of advise",
        )
    notes = [f"{file.name}: fields are separated by {NAMES[found.value]}: {found.reason}"]
    return found.value, notes if found.value != usual else []


def _tabs_quote(file: Path, head: bytes, limit: int | None) -> tuple[bool, list[str]]:
    """(whether quotes in a tab-separated file quote, a note where that makes a difference)."""
    scan = QuoteScan("\t")
    with opened(file) if limit is None else io.BytesIO(head) as stream:
        for number, chunk in enumerate(chunks(stream)):
            scan.feed(chunk.removeprefix(codecs.BOM_UTF8) if number == 0 else chunk)
        scan.finish()
    if not scan.opens_fields:
        return False, []  # It is all the same, and faster without.
    with _lines(file, limit, head) as lines:
        verdict = judge_tabs(lines, cut=limit is not None)
    if not verdict.quoted:
        return False, [f"{file.name}: quotes are characters like others there: {verdict.reason}"]
    spanning = f"{file.name}: quoted fields go on over {verdict.spanning} more lines than there are rows"
    return True, [spanning] if verdict.spanning else []


@contextmanager
def _lines(file: Path, limit: int | None, head: bytes) -> Iterator[Iterator[str]]:
    """Lines as csv wants them: with their ends, at \\n, \\r and \\r\\n."""
    with opened(file) if limit is None else io.BytesIO(head) as stream:
        yield iter(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=""))


def _refuse_swallowed(file: Path, delimiter: str) -> None:
    with _lines(file, None, b"") as lines:
        swallowed = find_swallowed(lines, delimiter)
    if swallowed is not None:
        raise DataError(
            f"a quote opens a field in line {swallowed.first_line} of {file} and does not close at the end of one",
            got=f"{swallowed.lines} lines as one row" if swallowed.closes else "the file ends inside of the quotes",
            allowed='fields such as "a ""quoted"" word", in quotes as a whole, with quotes inside doubled',
            do="quote that field, or take the quote out; a tab-separated file needs no quotes",
        )


def _header(lines: Iterator[str], delimiter: str, *, quoted: bool) -> tuple[tuple[str, ...], int, str, bool]:
    """(column names, rows up to the first with data, Orange's roles or nothing, whether there are further rows)."""
    reader = _csv_reader(lines, delimiter, quoted=quoted)
    names: list[str] = []
    before = 0
    for names in reader:
        before += 1
        if names:
            break
    following = list(itertools.islice(reader, 3))
    fits = [len(row) for row in following[:2]] == [len(names)] * 2
    if delimiter == "\t" and fits and has_orange_headers(*following[:2]):
        said = ", ".join(cell for row in following[:2] for cell in row if cell)
        return tuple(names), before + 2, said, len(following) > 2
    return tuple(names), before, "", bool(following)


def _csv_reader(lines: Iterator[str], delimiter: str, *, quoted: bool) -> Any:
    csv.field_size_limit(LONGEST_FIELD)
    return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)


def _refuse_twice(file: Path, names: Sequence[str]) -> None:
    for name in names:
        places = [str(place) for place, other in enumerate(names, start=1) if other == name]
        if name and len(places) > 1:
            raise DataError(
                f"the header of {file} has the name {name!r} twice",
                got=f"columns {' and '.join(places)} of {len(names)}: {', '.join(map(repr, names))}",
                do="give each column a name of its own",
            )


class _Checked:
    """A file that pyarrow reads, on a thread of its own, and whose bytes are looked at on their way.

    Reading ends at the first fault and keeps it: pyarrow 25 may wait for ever after an exception in such a thread.
    """

    def __init__(self, stream: BinaryIO, file: Path, dialect: Dialect, *, check: bool) -> None:
        self._stream = stream
        self._encoding = Utf8Check(file) if check else None
        self._quotes = QuoteScan(dialect.delimiter) if check and dialect.quoted else None
        self.bytes = 0
        self.fault: Exception | None = None
        self.too_short = False
        """Whether a row was longer than what was parsed at once."""

    def read(self, size: int = -1) -> bytes:
        if self.fault is not None:
            return b""
        try:
            return self._read(size)
        except Exception as error:  # Raised again by the reader, which then gives no more rows.
            self.fault = error
            return b""

    def _read(self, size: int) -> bytes:
        chunk = self._stream.read(size)
        if b"\0" in chunk:
            raise _NulError
        if self._encoding is not None:
            self._encoding.feed(chunk)
        if self._quotes is not None:
            self._quotes.feed(chunk if self.bytes else chunk.removeprefix(codecs.BOM_UTF8))
        self.bytes += len(chunk)
        return chunk

    def quotes_in_place(self) -> bool:
        """At the end: whether every quote opens a field, closes one, or is doubled."""
        if self._quotes is not None:
            self._quotes.finish()
        return self._quotes is None or self._quotes.in_place


class _Feed:
    """What pyarrow reads from; says when it has let go of it.

    pyarrow 25.0.1 may do so on its own thread, after the last row or error was handed out. That takes Python's lock,
    and a thread that asks for it while the interpreter ends aborts the process: so nobody goes on before.
    """

    closed = False

    def __init__(self, read: Callable[[int], bytes], released: threading.Event) -> None:
        self.read, self._released = read, released  # no method: an error's traceback would keep hold of `self`

    def close(self) -> None:
        self.closed = True

    def __del__(self) -> None:
        self._released.set()


class _NulError(Exception):
    """The file holds a NUL: see `_by_csv`."""


def read(file: Path, dialect: Dialect, columns: Sequence[str], *, check: bool = True) -> Iterator[tuple[Any, ...]]:
    """For some rows at a time, an array of strings without nulls for each of the columns.

    Raises DataError for a row with more or fewer fields than the header has, and, unless an earlier call has done so,
    at the end for a file that is no UTF-8 somewhere, or whose quotes swallow rows.
    """
    block, done = BLOCK_BYTES, 0
    while dialect.has_rows and block:
        with opened(file) as stream:
            checked = _Checked(stream, file, dialect, check=check)
            for arrays in _from(checked, file, dialect, columns, block=block, skip=done):
                yield arrays
                done += len(arrays[0])
        if isinstance(checked.fault, _NulError):
            yield from _by_csv(file, dialect, columns, skip=done)
            return
        block = block * 16 if checked.too_short else 0
    if dialect.has_rows and not checked.quotes_in_place():
        _refuse_swallowed(file, dialect.delimiter)


def _from(
    checked: _Checked, file: Path, dialect: Dialect, columns: Sequence[str], *, block: int, skip: int
) -> Iterator[tuple[Any, ...]]:
    """Rows behind the first `skip`, up to the end, to a fault that `read` deals with, or to a row that is too long."""
    import pyarrow as pa

    checked.too_short, refused, released = False, "", threading.Event()
    try:
        source = pa.PythonFile(_Feed(checked.read, released), mode="r")
        for arrays in _parsed(source, dialect, columns, block=block):
            if checked.fault is not None:  # The last rows may be torn.
                break
            if len(arrays[0]) > skip:
                yield tuple(array.slice(skip) for array in arrays)
            skip = max(0, skip - len(arrays[0]))
    except pa.ArrowInvalid as error:
        refused = one_line(error, most=None)  # the error itself would keep hold of the source
    finally:
        del source
        released.wait(_RELEASE_S)
    if checked.fault is None and refused:
        checked.too_short = "straddling" in refused and block <= min(checked.bytes, _LONGEST_ROW)
        if not checked.too_short:
            _explain(file, dialect, refused)
    if checked.fault is not None and not isinstance(checked.fault, _NulError):
        raise checked.fault


def parse(data: bytes, dialect: Dialect, columns: Sequence[str], *, header_rows: int = 0) -> tuple[Any, ...] | None:
    """An array for each of the columns of some rows, by default without a header.

    None when some row has not the header's fields, or is no UTF-8.
    """
    import pyarrow as pa

    if b"\0" in data:
        return _parsed_by_csv(data, dialect, columns, header_rows=header_rows)
    if not data.strip(b"\r\n"):
        return tuple(pa.array([], pa.string()) for _ in columns)
    try:
        parts = list(_parsed(_in_arrow(data), dialect, columns, block=len(data) + 1, header_rows=header_rows))
    except pa.ArrowInvalid:
        return None
    return tuple(pa.chunked_array(column, pa.string()).combine_chunks() for column in zip(*parts, strict=True))


def _in_arrow(data: bytes) -> Any:
    """A copy that pyarrow's threads can let go of without Python's lock: see `_Feed`."""
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    stream.write(data)
    return pa.BufferReader(stream.getvalue())


def _parsed(
    source: Any, dialect: Dialect, columns: Sequence[str], *, block: int, header_rows: int | None = None
) -> Iterator[tuple[Any, ...]]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    numbers = [str(dialect.names.index(name)) for name in columns]
    skip = dialect.header_rows if header_rows is None else header_rows
    reader = arrow_csv.open_csv(
        source,
        memory_pool=memory(),
        read_options=arrow_csv.ReadOptions(
            use_threads=False,
            block_size=block,
            column_names=[str(number) for number in range(len(dialect.names))],
            skip_rows_after_names=skip,
        ),
        parse_options=arrow_csv.ParseOptions(
            delimiter=dialect.delimiter,
            quote_char='"' if dialect.quoted else False,
            newlines_in_values=dialect.quoted,
        ),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(numbers, pa.string()),
            include_columns=numbers,
            null_values=[],
            strings_can_be_null=False,
            quoted_strings_can_be_null=False,
        ),
    )
    try:
        for batch in reader:
            yield tuple(batch.columns)
    finally:
        reader.close()


def _by_csv(file: Path, dialect: Dialect, columns: Sequence[str], *, skip: int) -> Iterator[tuple[Any, ...]]:
    """Rows behind the first `skip`, by Python's csv module, of a file that holds a NUL.

    pyarrow 25.0.1 misses delimiters behind a NUL: rows and fields are joined, in large files without an error.
    """
    import pyarrow as pa

    check_utf8(file)
    if dialect.quoted and dialect.delimiter != "\t":
        _refuse_swallowed(file, dialect.delimiter)
    places = [dialect.names.index(name) for name in columns]
    with _lines(file, None, b"") as lines:
        rows = itertools.islice(_rows_of(lines, file, dialect), skip, None)
        while found := list(itertools.islice(rows, _ROWS_OF_CSV)):
            yield tuple(pa.array([fields[place] for fields in found], pa.string()) for place in places)


def _parsed_by_csv(
    data: bytes, dialect: Dialect, columns: Sequence[str], *, header_rows: int
) -> tuple[Any, ...] | None:
    import pyarrow as pa

    try:
        lines = iter(io.StringIO(data.decode("utf-8-sig"), newline=""))
        rows = list(_rows_of(lines, Path(), dialect, header_rows=header_rows))
    except (UnicodeDecodeError, DataError):
        return None
    places = [dialect.names.index(name) for name in columns]
    return tuple(pa.array([fields[place] for fields in rows], pa.string()) for place in places)


def _rows_of(
    lines: Iterator[str], file: Path, dialect: Dialect, *, header_rows: int | None = None
) -> Iterator[list[str]]:
    """Fields of all rows behind the header. Raises DataError for one with more or fewer than the header has."""
    reader = _csv_reader(lines, dialect.delimiter, quoted=dialect.quoted)
    row = 0
    try:
        for number, fields in enumerate(reader):
            if number < (dialect.header_rows if header_rows is None else header_rows) or not fields:
                continue
            row += 1
            if len(fields) != len(dialect.names):
                raise _unequal(file, dialect, fields, row=row, line=reader.line_num)
            yield fields
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {file} is not valid CSV", got=str(error)) from error


def _explain(file: Path, dialect: Dialect, refused: str) -> NoReturn:
    """Raises the DataError that names the row, found by reading the file once more with Python's csv module."""
    check_utf8(file)
    if dialect.quoted and dialect.delimiter != "\t":
        _refuse_swallowed(file, dialect.delimiter)
    with _lines(file, None, b"") as lines:
        for _ in _rows_of(lines, file, dialect):
            pass
    raise DataError(f"{file} cannot be read", got=refused)


def _unequal(file: Path, dialect: Dialect, fields: Sequence[str], *, row: int, line: int) -> DataError:
    width, shown = len(dialect.names), ", ".join(repr(field[:30]) for field in fields[:6])
    more = len(fields) > width
    return DataError(
        f"row {row} of {file}, line {line}, has {'more' if more else 'fewer'} fields than the header",
        got=f"{len(fields)}: {shown}{', ...' if len(fields) > 6 else ''}",
        allowed=f"{width}: {', '.join(dialect.names)}, separated by {NAMES.get(dialect.delimiter, dialect.delimiter)}",
        do="quote fields that hold the delimiter or a line break, or name another with data.delimiter"
        if more
        else "write each row with all its fields; an empty one is nothing between two delimiters",
    )
