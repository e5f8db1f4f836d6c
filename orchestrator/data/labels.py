"""What can be said of class names before anything is trained on them. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation

from orchestrator.errors import DataError

MOST_NOTES = 5
"""Groups of labels that look alike named one by one; of more, their number."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_FRACTION = re.compile(r"[+-]?\d*\.\d*[1-9]\d*(?:[eE][+-]?\d+)?")


def similar_labels(counts: Mapping[str, int]) -> tuple[str, ...]:
    """A sentence about each group of labels that may be meant as one class: they stay as many as they are.

    `counts` holds the rows of each label. Labels look alike when they differ only by case, by white space or by the
    form of their characters, or are the same number.
    """
    groups: dict[object, list[str]] = {}
    for label in sorted(counts):
        groups.setdefault(_look(label), []).append(label)
    alike = [group for group in groups.values() if len(group) > 1]
    notes = [_sentence(group, counts) for group in alike[:MOST_NOTES]]
    if len(alike) > MOST_NOTES:
        notes.append(f"and {len(alike) - MOST_NOTES} further groups of labels look alike")
    return tuple(notes)


def _look(label: str) -> object:
    text = " ".join(unicodedata.normalize("NFKC", label).split()).casefold()
    number = _number(text)
    return text if number is None else number


def _number(text: str) -> Decimal | None:
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _sentence(group: list[str], counts: Mapping[str, int]) -> str:
    shown = [f"{label!r} ({counts[label]:,} rows)" for label in group[:4]] + (["..."] if len(group) > 4 else [])
    return (
        f"labels {', '.join(shown)} are {len(group)} classes that {_difference(group)}: "
        "write them alike if they are meant as one"
    )


def _difference(group: list[str]) -> str:
    if len({"".join(label.split()) for label in group}) == 1:
        return "differ by white space only"
    if len({" ".join(label.split()).casefold() for label in group}) == 1:
        return (
            "differ by case only"
            if len({" ".join(label.split()) for label in group}) == len(group)
            else ("differ by case and white space only")
        )
    if _number(group[0].strip()) is not None:
        return "are the same number"
    return "look the same"


def refuse_fractions(labels: Iterable[str], *, column: str, location: str) -> None:
    """Raises DataError when a label is a number with a fraction: a score to be predicted is no class."""
    fraction = next((label for label in sorted(labels) if _FRACTION.fullmatch(label.strip())), None)
    if fraction is not None:
        raise DataError(
            f"column {column!r} of {location} is no class column",
            got=f"numbers with a fraction, such as {fraction}",
            allowed="names, whole numbers or truth values",
            do="name the column that holds the class, or turn these values into classes, such as low and high",
        )
