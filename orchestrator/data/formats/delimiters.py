"""The first rows of a delimited file -> what separates its fields. Pure."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import dataclass

NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""The candidates, with their names in messages."""
SAMPLE_ROWS = 200
"""Rows that have to agree with the header. A guess: enough for a comma in prose to show."""


@dataclass(frozen=True, kw_only=True)
class Delimiter:
    """What separates fields, and why it is taken to."""

    value: str
    reason: str
    rivals: tuple[str, ...] = ()
    """Others that fit as well where the usual one does not: then someone has to say which it is."""


def find_delimiter(sample: str, *, usual: str, cut: bool = False) -> Delimiter:
    """The usual delimiter of the file's ending where header and rows agree on it, else the only other one that fits.

    `sample` holds the file's first lines; `cut` says that there are more, so that its last row may not be whole. A
    delimiter fits when it parts the header into two names or more, and every row into as many fields; another than the
    usual one only where no name is empty and none twice.
    """
    if _fits(sample, usual, cut=cut):
        return Delimiter(value=usual, reason="header and rows agree on it")
    rivals = tuple(other for other in NAMES if other != usual and _fits(sample, other, cut=cut, strictly=True))
    if len(rivals) == 1:
        name = NAMES[rivals[0]]
        return Delimiter(value=rivals[0], reason=f"header and rows agree on {name}, and not on {NAMES[usual]}")
    return Delimiter(value=usual, reason="header and rows agree on no other", rivals=rivals)


def _fits(sample: str, delimiter: str, *, cut: bool, strictly: bool = False) -> bool:
    # Tab-separated files quote or do not; others hold line breaks in quotes.
    ways: tuple[bool, ...] = (False, True) if delimiter == "\t" else (True,)
    for quoted in ways:
        rows = _rows(sample, delimiter, quoted=quoted)
        if cut and len(rows) <= SAMPLE_ROWS:
            rows = rows[:-1]
        if len(rows[:1]) and len(rows[0]) > 1 and all(len(fields) == len(rows[0]) for fields in rows):
            return not strictly or (all(rows[0]) and len(set(rows[0])) == len(rows[0]))
    return False


def _rows(sample: str, delimiter: str, *, quoted: bool) -> list[list[str]]:
    lines = io.StringIO(sample, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    try:
        return list(itertools.islice((fields for fields in reader if fields), SAMPLE_ROWS + 1))
    except csv.Error:
        return []
