"""What can be said of class names before anything is trained on them. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation

from orchestrator.data.columns import FIELDS, MAX_CLASSES, Asking
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
    plain = {" ".join(label.split()) for label in group}
    if len({"".join(label.split()) for label in group}) == 1:
        return "differ by white space only"
    if len({label.casefold() for label in plain}) == 1:
        spaced = any(label not in plain for label in group)
        return "differ by case and white space only" if spaced else "differ by case only"
    return "look the same" if _number(group[0].strip()) is None else "are the same number"


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


def refuse_no_classes(counts: Mapping[str, int], *, column: str, location: str, asking: Asking = FIELDS) -> None:
    """Raises DataError when labels are too few or too many to be classes; `counts` holds the rows of each."""
    if 2 <= len(counts) <= MAX_CLASSES:
        return
    what = "is no class column" if counts else "holds no class"
    raise DataError(
        f"column {column!r} of {location} {'holds one class only' if len(counts) == 1 else what}",
        got=f"{len(counts)} distinct value{'s' * (len(counts) != 1)} in {sum(counts.values())} rows"
        + (f", such as {min(counts)!r}" if counts else ""),
        allowed=f"2 to {MAX_CLASSES} classes",
        do=f"name the column that holds the class with {asking.of_label()}, or set {asking.task.format('causal-lm')} "
        "for raw text",
    )


def refuse_single_rows(counts: Mapping[str, int], *, column: str, asking: Asking = FIELDS) -> None:
    """Raises DataError when a class has one row, where some of its rows are to be held out of those trained on."""
    lonely = [label for label, rows in counts.items() if rows < 2]
    if lonely:
        raise DataError(
            "a class with one row cannot be in both the training and the held-out data",
            got=f"label {', '.join(lonely[:5])}"
            + (f" and {len(lonely) - 5} more" if lonely[5:] else "")
            + f" of column {column!r}",
            do="add rows, remove these, give data.validation, or name the class with "
            f"{asking.of_label()} if this is no class column",
        )
