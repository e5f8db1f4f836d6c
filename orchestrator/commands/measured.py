"""What an evaluation found beyond its metrics, as lines for a person. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MOST_CLASSES, _MOST_COLUMNS = 20, 8
"""Of classes shown one by one, and of a confusion matrix: what a screen holds (a guess)."""
_LONGEST_NAME = 20


def measured_lines(found: Mapping[str, Any], *, file: str) -> Iterator[str]:
    """How much was measured, and of classes a table: precision, recall, F1 and rows of each, and for what it was taken.

    `found` is what `evaluation.json` holds, `file` where that is.
    """
    unit = "rows" if "rows" in found else "documents"
    blocks = "" if found["samples"] == found[unit] else f" in {found['samples']:,} blocks"
    yield f"measured on {found[unit]:,} {unit}{blocks}"
    classes, confusion = found["classes"], found["confusion"]
    if classes is None:
        return
    if len(classes) > _MOST_CLASSES:
        yield f"each of the {len(classes):,} classes: {file}"
        return
    names = [_short(each["name"]) for each in classes]
    shown = names if len(names) <= _MOST_COLUMNS else []
    width = max(len("class"), *map(len, names))
    yield _row("class", ["precision", "recall", "f1", "rows", *(f"as {name}" for name in shown)], width, shown)
    for name, each, taken in zip(names, classes, confusion, strict=True):
        figures = [f"{each[key]:.4f}" for key in ("precision", "recall", "f1")]
        yield _row(name, [*figures, f"{each['rows']:,}", *(f"{count:,}" for count in taken if shown)], width, shown)


def _row(name: str, cells: Sequence[str], width: int, shown: Sequence[str]) -> str:
    widths = (9, 6, 6, 6, *(max(6, len(f"as {column}")) for column in shown))
    aligned = (cell.rjust(columns) for cell, columns in zip(cells, widths, strict=True))
    return "  ".join((name.ljust(width), *aligned))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
