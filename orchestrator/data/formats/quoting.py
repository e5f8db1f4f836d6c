"""The bytes of a delimited file -> whether its quotes close where fields end, and how many lines they swallow."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

LONGEST_FIELD = 1 << 30
"""Characters; the csv module's own limit is 131,072, and documents are longer."""
_QUOTE = ord('"')


class QuoteScan:
    """Told the bytes of a file in order, at about the speed of memory; knows then whether every quote is in its place.

    In its place is a quote that opens a field, closes one, or is doubled inside of one. A quote elsewhere is no fault
    yet (`5" disk`), but then only `csv` can tell.
    """

    def __init__(self, delimiter: str) -> None:
        ends = np.zeros(256, dtype=bool)
        ends[[ord("\n"), ord("\r"), *delimiter.encode()]] = True
        self._ends = ends
        self._tail = np.frombuffer(b"\n", dtype=np.uint8)
        self._seen = 0
        self.in_place = True
        self.opens_fields = False
        """Whether a quote stands at the start of some field."""

    def feed(self, chunk: bytes) -> None:
        """The next bytes, without the byte order mark."""
        self._look(np.concatenate([self._tail, np.frombuffer(chunk, dtype=np.uint8)]))

    def finish(self) -> None:
        """The file ends here."""
        self._look(np.concatenate([self._tail, np.frombuffer(b"\n", dtype=np.uint8)]))
        self.in_place &= self._seen % 2 == 0

    def _look(self, data: np.ndarray) -> None:
        """Judges all bytes that have a neighbour on both sides; the last two stay for the next call."""
        if len(data) > 2:
            is_quote = data[1:-1] == _QUOTE
            if np.count_nonzero(is_quote):
                found = np.flatnonzero(is_quote)
                first, second = found[self._seen % 2 :: 2], found[1 - self._seen % 2 :: 2]
                before, after = data[first], data[second + 2]  # `found` counts from the second byte
                opens = self._ends[before]
                self.opens_fields |= bool(opens.any())
                self.in_place &= bool((opens | (before == _QUOTE)).all())
                self.in_place &= bool((self._ends[after] | (after == _QUOTE)).all())
                self._seen += len(found)
        self._tail = data[-2:]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether quotes mean something in a tab-separated file, and why."""

    quoted: bool
    reason: str
    spanning: int = 0
    """Rows that stand on several lines."""


def judge_tabs(lines: Iterable[str], *, cut: bool = False) -> Verdict:
    """Whether the quotes of a tab-separated file are quotes, or characters like others; `lines` keep their ends.

    Most such files quote nothing. They are quotes when every one that opens a field closes at a field's end, on its
    own line, or on a later one in a file whose lines alone have unequal numbers of fields. `cut` says that the lines
    are a file's first, so that its last field may be open.
    """
    widths: set[int] = set()
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for line in lines:
            if bare := line.rstrip("\r\n"):
                widths.add(bare.count("\t"))
                count += 1
            yield line

    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(counted(), delimiter="\t", strict=True)
    rows = 0
    proper, fields_of_rows = True, set()
    try:
        for fields in reader:
            if fields:
                rows += 1
                fields_of_rows.add(len(fields))
    except csv.Error as error:
        proper = cut and "unexpected end" in str(error)
        for _ in counted():  # csv has stopped: the widths of the other lines still count
            pass
    spanning = count - rows
    if not proper or len(fields_of_rows) > 1:
        return Verdict(quoted=False, reason="a quote that opens a field does not close at the end of one")
    if spanning and len(widths) == 1:
        return Verdict(
            quoted=False, reason=f"every line is a row without them, and {spanning} lines were lost with them"
        )
    return Verdict(quoted=True, reason="every quote that opens a field closes at the end of one", spanning=spanning)


@dataclass(frozen=True, kw_only=True)
class Swallowed:
    """A row that a stray quote has made of several."""

    first_line: int
    lines: int
    closes: bool
    """False where the file ends inside of the quotes."""


def find_swallowed(lines: Iterable[str], delimiter: str) -> Swallowed | None:
    """The first row over several lines whose quotes do not close at the end of a field, or not at all."""
    csv.field_size_limit(LONGEST_FIELD)
    seen: list[str] = []

    def recorded() -> Iterator[str]:
        for line in lines:
            seen.append(line)
            yield line

    reader = csv.reader(recorded(), delimiter=delimiter)
    before = 0
    ahead = next(reader, None)
    while ahead is not None:
        row_lines, seen[:] = list(seen), []
        number = reader.line_num
        ahead = next(reader, None)
        if (len(row_lines) > 1 or ahead is None) and not _strictly(row_lines, delimiter):
            closes = ahead is not None or _closes(row_lines, delimiter)
            if len(row_lines) > 1 or not closes:
                return Swallowed(first_line=before + 1, lines=number - before, closes=closes)
        before = number
    return None


def _strictly(lines: list[str], delimiter: str) -> bool:
    try:
        for _ in csv.reader(lines, delimiter=delimiter, strict=True):
            pass
    except csv.Error:
        return False
    return True


def _closes(lines: list[str], delimiter: str) -> bool:
    """Whether quotes that the last row of a file opens are closed in it, be it in the middle of a field."""
    try:
        # A row that ends inside of quotes takes what comes behind it.
        return len(list(csv.reader([*lines, "\n", "x"], delimiter=delimiter))) > 1
    except csv.Error:
        return False
