"""Bytes of files, unpacked where they are packed, and the check that they are UTF-8. Called by all readers."""

from __future__ import annotations

import codecs
import gzip
import re
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from orchestrator.data.sources import unreadable
from orchestrator.errors import DataError

CHUNK_BYTES = 1 << 20
"""Read at once: large against the cost of a call, small against the memory of a process."""
_WINDOWS_ONLY = re.compile(rb"[\x80-\x9f]")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it ends in .gz.

    Raises DataError when it cannot be read or unpacked, also while the caller reads.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


def chunks(stream: BinaryIO, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """All bytes of a stream, `size` at a time."""
    while chunk := stream.read(size):
        yield chunk


class Utf8Check:
    """Told the bytes of a file in order; raises DataError at the first that is no UTF-8, with its line."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self._first = True

    def feed(self, chunk: bytes) -> None:
        """The next bytes; none at the end of the file."""
        if self._first and chunk:
            self._first = False
            if chunk.startswith(_UTF16):
                raise _convert(
                    self._file,
                    f"line 1 of {self._file}",
                    f"bytes 0x{chunk[0]:02x} 0x{chunk[1]:02x} at its start: UTF-16",
                    "utf-16",
                )
        try:
            if self._decoder.getstate()[0] or not chunk.isascii() or not chunk:
                self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # The chunk before may have begun a character.
            offset = self._bytes - (len(error.object) - len(chunk)) + error.start
            raise not_utf8(self._file, *self._place(offset), error.object[error.start]) from error
        self._bytes += len(chunk)

    def _place(self, offset: int) -> tuple[int, int]:
        """(line of a byte, its position there), both from 1. Counted now, as few files are ever asked."""
        line, begin, seen = 1, 0, 0
        with opened(self._file) as stream:
            while seen < offset and (chunk := stream.read(min(CHUNK_BYTES, offset - seen))):
                if newlines := chunk.count(b"\n"):
                    line, begin = line + newlines, seen + chunk.rfind(b"\n") + 1
                seen += len(chunk)
        return line, offset - begin + 1


def not_utf8(file: Path, line: int, position: int, byte: int) -> DataError:
    """The error for a byte that is no UTF-8, with the command that converts the file."""
    return _convert(
        file, f"line {line} of {file}", f"byte 0x{byte:02x} at position {position} of the line", _likely(file)
    )


def _likely(file: Path) -> str:
    """The encoding of a file that is no UTF-8, by all its bytes: Latin-1 has control characters in 0x80 to 0x9f, where
    Windows has quotes, dashes and the euro sign."""
    with opened(file) as stream:
        return "cp1252" if any(_WINDOWS_ONLY.search(chunk) for chunk in chunks(stream)) else "latin1"


def _convert(file: Path, place: str, got: str, encoding: str) -> DataError:
    name = {"latin1": "Latin-1", "cp1252": "Windows-1252", "utf-16": "UTF-16"}[encoding]
    packed = f"gunzip {shlex.quote(str(file))}, then " if file.suffix == ".gz" else ""
    source = file.with_suffix("") if packed else file
    converted = source.with_name(f"utf8-{source.name}")
    return DataError(
        f"{place} is not UTF-8",
        got=got,
        do=f"convert it, if it is {name}: {packed}"
        f"iconv -f {encoding} -t utf-8 {shlex.quote(str(source))} > {shlex.quote(str(converted))}",
    )


def check_utf8(file: Path) -> None:
    """Reads a file to its end. Raises DataError when a byte is no UTF-8, or it cannot be read."""
    check = Utf8Check(file)
    with opened(file) as stream:
        for chunk in chunks(stream):
            check.feed(chunk)
        check.feed(b"")


def read_text(file: Path) -> str:
    """A text file as a document, without a byte order mark. Raises DataError where it is no UTF-8."""
    with opened(file) as stream:
        data = stream.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before.count(b"\n") + 1
        raise not_utf8(file, line, error.start - before.rfind(b"\n"), data[error.start]) from error


def piece_of_text(file: Path, piece: bytes, offset: int) -> str:
    """Bytes from within a text file as text, without the characters that are cut at either end.

    Raises DataError where they are no UTF-8.
    """
    cut = next((place for place, byte in enumerate(piece[:4]) if byte & 0xC0 != 0x80), 0) if offset else 0
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(piece[cut:]).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise _convert(
            file, f"{file}", f"byte 0x{byte:02x} at byte {offset + cut + error.start}", _likely(file)
        ) from error


def is_binary(file: Path) -> bool:
    """Git's test, a NUL in the first 8000 bytes; packed files are taken for text, and UTF-16 has NULs too."""
    if file.suffix == ".gz":
        return False
    with opened(file) as stream:
        head = stream.read(8000)
    return b"\0" in head and not head.startswith(_UTF16)
