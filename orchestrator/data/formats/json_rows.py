"""JSON files -> the rows in them, and the text that stands in a value. One object a line, or one array of objects."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.data.formats.raw_bytes import CHUNK_BYTES, chunks, not_utf8, opened
from orchestrator.errors import DataError

Row = dict[str, Any]


class Number(str):
    """A number as the file has it: 1.0 is not 1, and no digit is lost."""

    __slots__ = ()


class Constant(str):
    """NaN, Infinity or -Infinity, which JSON does not have and many programs write."""

    __slots__ = ()


class _Twice(ValueError):
    """A name that stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"the name {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return row


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=Constant, object_pairs_hook=_object)


def rows(file: Path) -> Iterator[tuple[int, Row]]:
    """(line on which it begins, row) of all rows of a file.

    Raises DataError for a line that is no UTF-8 or no JSON object, and for an object that has a name twice.
    """
    with opened(file) as stream:
        yield from parse(stream, file)


def parse(stream: BinaryIO, file: Path) -> Iterator[tuple[int, Row]]:
    """The same of bytes that come from a file."""
    first = True
    for number, raw in enumerate(stream, start=1):
        data = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if not data.strip():
            continue
        if first and data.lstrip().startswith(b"["):
            yield from _array(data, stream, file, number)
            return
        first = False
        yield number, _row(_decoded(data, file, number), file, number)


def _decoded(data: bytes, file: Path, line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(file, line, error.start + 1, data[error.start]) from error


def _row(text: str, file: Path, line: int) -> Row:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(text, file, line, error) from error
    return _checked(value, file, line)


def _checked(value: Any, file: Path, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"line {line} of {file} is no JSON object",
            got=json.dumps(value)[:60],
            allowed='objects such as {"text": "...", "label": "..."}, one a line or in one array',
            do="remove this line" if value is None else "write each row as an object",
        )
    return value


def _invalid(text: str, file: Path, line: int, error: Exception) -> DataError:
    if isinstance(error, _Twice):
        return DataError(f"line {line} of {file} has {error}", do="give each value a name of its own")
    reason = "nested too deeply" if isinstance(error, RecursionError) else error
    return DataError(
        f"line {line} of {file} is not valid JSON",
        got=f"{text.strip()[:60]} ({reason})",
        allowed="one object a line, or one array of objects",
        do="write each row on a line of its own",
    )


def _array(begin: bytes, stream: BinaryIO, file: Path, line: int) -> Iterator[tuple[int, Row]]:
    """The objects of an array, without having all of it in memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    pieces = _texts(begin, stream, decoder, file, line)
    text, place, more = next(pieces), 0, CHUNK_BYTES
    place = len(text) - len(text.lstrip()) + 1  # behind the bracket
    line += text.count("\n", 0, place)
    ended = False

    def longer() -> bool:
        """Takes what was read out of the text, and the next piece in."""
        nonlocal text, place, ended
        text, place = text[place:], 0
        wanted = len(text) + more
        while not ended and len(text) < wanted:
            piece = next(pieces, None)
            ended = piece is None
            text += piece or ""
        return bool(text)

    expects_value, seen = True, False
    while True:
        rest = text[place : place + 4096].lstrip(" \t\r\n")
        if not rest:
            skipped = text[place : place + 4096]
            line += skipped.count("\n")
            place += len(skipped)
            if place >= len(text) and (ended or not longer()):
                raise _invalid("the file ends inside of the array", file, line, ValueError("no closing bracket"))
            continue
        gap = len(text[place : place + 4096]) - len(rest)
        line += text.count("\n", place, place + gap)
        place += gap
        if text[place] == "]" and not (seen and expects_value):
            break
        if not expects_value:
            if text[place] != ",":
                raise _invalid(text[place : place + 60], file, line, ValueError("a comma is missing"))
            place, expects_value = place + 1, True
            continue
        try:
            value, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            if ended or isinstance(error, _Twice | RecursionError):
                raise _invalid(text[place : place + 60], file, line, error) from error
            more *= 2  # so that a long object is tried few times
            longer()
            continue
        yield line, _checked(value, file, line)
        line += text.count("\n", place, end)
        place, more, expects_value, seen = end, CHUNK_BYTES, False, True
    behind = text[place + 1 :] + "".join(pieces)
    if behind.strip():
        raise _invalid(behind.strip()[:60], file, line, ValueError("something behind the array"))


def _texts(begin: bytes, stream: BinaryIO, decoder: Any, file: Path, line: int) -> Iterator[str]:
    for data in (begin, *()):
        yield _piece(decoder, data, file, line)
    for data in chunks(stream):
        yield _piece(decoder, data, file, line)
    yield _piece(decoder, b"", file, line)


def _piece(decoder: Any, data: bytes, file: Path, line: int) -> str:
    try:
        return str(decoder.decode(data, final=not data))
    except UnicodeDecodeError as error:
        raise not_utf8(file, line, error.start + 1, error.object[error.start]) from error


def plain(value: Any) -> Any:
    """A value with its numbers as Python's, for a look at what it is."""
    if isinstance(value, Number | Constant):
        try:
            return int(value)
        except ValueError:
            return float(value)
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


def array(found: Sequence[tuple[int, Row]], name: str, file: Path) -> Any:
    """A pyarrow array of a column's texts: strings as they are, numbers and truth values as written, empty for null.

    Raises DataError for a list, an object, NaN, and half of a surrogate pair, with the line.
    """
    import pyarrow as pa

    return pa.array([_text(row.get(name), name, file, line) for line, row in found], pa.string())


def _text(value: Any, name: str, file: Path, line: int) -> str:
    if value is None:
        return ""
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, Constant):
        raise DataError(
            f"column {name!r} of {file} has {value} in line {line}, which is no JSON",
            do="write null for a missing value, or a string",
        )
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"column {name!r} of {file} has half of a surrogate pair in line {line}",
                    got=ascii(value[max(0, error.start - 10) : error.start + 10]),
                    do="write the file anew: this is no character",
                ) from error
        return str(value)
    raise DataError(
        f"column {name!r} of {file} does not hold text",
        got=f"a {type(value).__name__} in line {line}: {json.dumps(value)[:60]}",
        allowed="strings, numbers and truth values",
        do="name another column, or write this one as strings",
    )
