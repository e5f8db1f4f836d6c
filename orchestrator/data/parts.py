"""A part of a large delimited file -> the rows that begin in it, though it may begin in the middle of one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

from orchestrator.data.formats import delimited
from orchestrator.data.formats.delimited import Dialect
from orchestrator.data.formats.quoting import LONGEST_FIELD

_RESYNC_LINES = 64  # Lines of a part at which a row is tried to begin: quoted fields span lines.


def rows_in(part: bytes, ahead: bytes, dialect: Dialect, columns: Sequence[str]) -> tuple[Any, ...] | None:
    """An array for each of the columns of the rows that begin in `part`, which begins at a line.

    That line may be in the middle of a quoted field: rows are taken to begin where all that follows parses into rows
    as wide as the header. `ahead` is what follows the part in the file. None when there is no such line.
    """
    lines = part.splitlines(keepends=True)
    for start in range(min(len(lines), _RESYNC_LINES) if dialect.quoted else 1):
        if dialect.quoted and _ends_a_field(lines[start], dialect.delimiter.encode()):
            continue
        whole = _whole_rows(lines[start:], ahead, dialect) if dialect.quoted else part
        found = delimited.parse(whole, dialect, columns) if whole.strip() else None
        if found is not None and len(found[0]):
            return found
    return None


def _whole_rows(lines: Sequence[bytes], ahead: bytes, dialect: Dialect) -> bytes:
    """The bytes of the rows that begin in some lines, of which the last one may end in what follows."""
    csv.field_size_limit(LONGEST_FIELD)
    following = ahead.splitlines(keepends=True)
    texts = (line.decode(errors="replace") for line in (*lines, *following))
    reader = csv.reader(texts, delimiter=dialect.delimiter)
    for _ in reader:
        if reader.line_num >= len(lines):
            break
    else:
        return b""
    return b"".join([*lines, *following][: reader.line_num])


def _ends_a_field(line: bytes, delimiter: bytes) -> bool:
    """Whether a quote closes in a line where none has opened."""
    fields = line.split(delimiter)
    return next((not field.startswith(b'"') for field in fields if b'"' in field), False)
