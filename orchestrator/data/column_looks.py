"""What each column of a table looks like: text, classes, numbers, dates, identifiers. From first rows alone; pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "classes", "short text", "numbers", "fractions", "dates", "identifiers", "one value"]
Looked = Literal[Kind, "lists or objects", "empty"]

WORDY = 3
"""A value of more words is text; class names rarely have more. A guess."""
UNSPACED_CHARACTERS = 20
"""As long is text too where words are not set apart, as in Chinese and Japanese. A guess."""
LONGEST_CLASS_NAME = 80
"""Characters, of the mean value of a class column. A guess."""
ROWS_OF_A_CLASS = 3
"""Rows that a value has on average, at least, in a column that is taken for classes by its content alone. A guess."""
MOST_NUMBERED_CLASSES = 100
"""Whole numbers that are classes: without gaps from -1, 0 or 1 on, and no more than this. A guess."""
FEW_NUMBERS = 3
"""So few whole numbers are classes whatever they are, as 0, 2 and 4 in Sentiment140."""
_SHOWN_VALUES, _SHOWN_CHARACTERS = 4, 24

_DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}( .*)?|\d{1,2}:\d{2}(:\d{2}.*)?"
    r"|(mon|tue|wed|thu|fri|sat|sun)[a-z]*,? .*\d.*"
    r"|(.* )?(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?,? ?.*\d.*",
    re.IGNORECASE,
)
_YEAR = re.compile(r"(19|20)\d\d")
_WHOLE = re.compile(r"([+-]?\d+)(?:\.0*)?(?:e\+?(\d{1,2}))?", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf(inity)?", re.IGNORECASE)
_IDENTIFIER = re.compile(r"\S*[\d/@\\]\S*|\S{25,}")


@dataclass(frozen=True, kw_only=True)
class Look:
    """A column, seen through the first rows of its table."""

    name: str
    kind: Looked
    rows: int
    """Rows that have a value."""
    values: int
    """Distinct values among them; 0 where they are lists or objects."""
    commonest: tuple[str, ...]
    """A few values, the commonest first."""
    words: float
    """Words of the mean value."""
    characters: float
    """Characters of the mean value."""

    def __str__(self) -> str:
        """`Polarity (3 values: bad, fair, good)`."""
        return f"{self.name or repr(self.name)} ({self.described()})"

    def described(self) -> str:
        """What stands in it, in a few words."""
        if self.kind == "text":
            return f"text of about {max(1, round(self.words))} words"
        if self.kind == "one value":
            return f"always {self.commonest[0]}"
        if self.kind in ("classes", "numbers"):
            return f"{self.values} {'values' if self.kind == 'classes' else 'numbers'}: {self.listed()}"
        return self.kind

    def listed(self) -> str:
        """Its commonest values."""
        return ", ".join(self.commonest) + (", ..." if self.values > len(self.commonest) else "")


def look_at(name: str, values: Sequence[object]) -> Look:
    """What a column looks like; `values` are those of the first rows, None where there is none."""
    filled = [value for value in values if value is not None and value != ""]
    nested = any(isinstance(value, list | tuple | Mapping | bytes) for value in filled)
    texts = [] if nested else [_written(value).strip() for value in filled]
    counts = Counter(texts)
    size = max(1, len(texts))
    return Look(
        name=name,
        kind="lists or objects" if nested else _kind(texts, counts),
        rows=len(filled),
        values=len(counts),
        commonest=tuple(_short(value) for value, _ in sorted(counts.items(), key=_by_frequency)[:_SHOWN_VALUES]),
        words=sum(len(text.split()) for text in texts) / size,
        characters=sum(map(len, texts)) / size,
    )


def _written(value: object) -> str:
    """As readers give it: truth values as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _by_frequency(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _kind(texts: Sequence[str], counts: Counter[str]) -> Looked:
    if not texts or not any(texts):
        return "empty"
    if len(counts) == 1 and len(texts) > 1:
        return "one value"
    if all(_NUMBER.fullmatch(text) for text in counts):
        return _kind_of_numbers(texts, counts)
    if _most(_DATE, counts):
        return "dates"
    repeats = ROWS_OF_A_CLASS * len(counts) <= len(texts)
    if repeats and sum(map(len, counts)) <= LONGEST_CLASS_NAME * len(counts):
        return "classes"
    if 2 * sum(map(_is_wordy, texts)) > len(texts):
        return "text"
    if _most(_IDENTIFIER, counts):
        return "identifiers"
    return "short text"


def _kind_of_numbers(texts: Sequence[str], counts: Counter[str]) -> Looked:
    whole = [_WHOLE.fullmatch(text) for text in counts]
    numbers = {int(found[1][:40]) * 10 ** int(found[2] or 0) for found in whole if found is not None}
    if None in whole:
        return "fractions"
    if len(counts) > FEW_NUMBERS and all(_YEAR.fullmatch(text) for text in counts):
        return "dates"
    if ROWS_OF_A_CLASS * len(counts) > len(texts):
        return "identifiers" if len(counts) == len(texts) else "numbers"
    numbered = min(numbers) in (-1, 0, 1) and max(numbers) - min(numbers) < len(numbers) <= MOST_NUMBERED_CLASSES
    return "classes" if numbered or len(counts) <= FEW_NUMBERS else "numbers"


def _most(pattern: re.Pattern[str], counts: Counter[str]) -> bool:
    """Whether nine in ten distinct values match."""
    return 10 * sum(pattern.fullmatch(text) is not None for text in counts) >= 9 * len(counts)


def _is_wordy(text: str) -> bool:
    words = len(text.split())
    return words > WORDY or (len(text) >= UNSPACED_CHARACTERS * words and not text.isascii())
