"""The first rows of a delimited file -> what separates its fields. Pure."""

from __future__ import annotations

import csv
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


def find_delimiter(sample: str, *, usual: str) -> Delimiter:
    """The usual delimiter of the file's ending where header and rows agree on it, else the only other one that fits.

    `sample` holds whole rows from the file's begin. A delimiter fits when it parts the header into two names or more,
    none empty and none twice, and every row into as many fields.
    """
    if _fits(sample, usual):
        return Delimiter(value=usual, reason="header and rows agree on it")
    rivals = tuple(other for other in NAMES if other != usual and _fits(sample, other, strictly=True))
    if len(rivals) == 1:
        name = NAMES[rivals[0]]
        return Delimiter(value=rivals[0], reason=f"header and rows agree on {name}, and not on {NAMES[usual]}")
    return Delimiter(value=usual, reason="header and rows agree on no other", rivals=rivals)


def _fits(sample: str, delimiter: str, *, strictly: bool = False) -> bool:
    # Tabs first without quotes: a stray one would join lines. Other files hold line breaks in quotes.
    lines, quoting = sample.splitlines(keepends=True), csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    try:
        rows = list(itertools.islice((fields for fields in reader if fields), SAMPLE_ROWS + 1))
    except csv.Error:
        return False
    if not rows or len(rows[0]) < 2 or any(len(fields) != len(rows[0]) for fields in rows):
        return False
    return not strictly or (all(rows[0]) and len(set(rows[0])) == len(rows[0]))
