"""Which column of a table holds the text, and which the class: as the user says, else by name and content. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import DataError
from orchestrator.policy.question import Task

TEXT_NAMES = (
    *("text", "content", "document", "review", "review_text", "sentence", "body", "comment", "tweet", "message"),
    *("article", "abstract", "utterance", "snippet", "query", "question", "code", "description"),
)
"""Usual names of a text column, the most telling first. The order is a guess."""
LABEL_NAMES = (
    *("label", "labels", "class", "target", "category", "sentiment", "intent", "topic", "label_text", "rating"),
    *("stars", "y"),
)
"""Usual names of a class column, the most telling first. The order is a guess."""
MOST_CLASSES = 1_000
"""A column with more values is no class column: ImageNet's 1,000 are the most in common use."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns to read. `text` is None where files are documents."""

    text: str | None
    label: str | None
    assumed: tuple[str, ...] = ()
    """What was guessed, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The first rows of a table."""

    location: str
    names: tuple[str, ...]
    """Columns; empty where files are documents."""
    rows: tuple[Mapping[str, object], ...]


def choose_columns(
    preview: Preview, *, text_column: str | None = None, label_column: str | None = None, task: Task | None = None
) -> Columns:
    """The text and class columns of a table.

    A class column is looked for unless the task is language modelling, and required for classification. Raises
    DataError when a column that was given is not there, or none can be told to be the one.
    """
    if not preview.names:
        return _documents(preview, label_column, task)
    assumed: list[str] = []
    for name, option in ((text_column, "--text-column"), (label_column, "--label-column")):
        if name is not None and name not in preview.names:
            raise _absent(preview, name, option)
    if label_column is None and task not in ("causal-lm", "masked-lm"):
        label_column = _guess_label(preview, text_column)
        if label_column is not None:
            assumed.append(f"column {label_column!r} holds the class: no --label-column was given")
    if text_column is None:
        text_column = _guess_text(preview, label_column)
        assumed.append(f"column {text_column!r} holds the text: no --text-column was given")
    if label_column is None and task == "text-classification":
        raise DataError(
            f"{preview.location} has no column that is plainly the class",
            got=", ".join(preview.names),
            allowed=f"a column named {', '.join(LABEL_NAMES[:6])} or the like with at least two values",
            do="name the column with --label-column, or set --task causal-lm for raw text",
        )
    return Columns(text=text_column, label=label_column, assumed=tuple(assumed))


def _documents(preview: Preview, label_column: str | None, task: Task | None) -> Columns:
    if label_column is not None or task == "text-classification":
        raise DataError(
            f"{preview.location} is read as text, which carries no labels",
            got=f"--label-column {label_column}" if label_column is not None else f"--task {task}",
            allowed="jsonl, csv, tsv or parquet files, or a hub dataset",
            do="give a table with a text and a class column, or set --task causal-lm",
        )
    return Columns(text=None, label=None)


def _guess_label(preview: Preview, text_column: str | None) -> str | None:
    """The first usually named column whose values can be classes."""
    for name in _named(preview, LABEL_NAMES):
        values = [row.get(name) for row in preview.rows]
        if name != text_column and all(_is_class(value) for value in values):
            return name
    return None


def _is_class(value: object) -> bool:
    """A string, a whole number, a truth value, or nothing; CSV gives numbers as strings."""
    if isinstance(value, str):
        head, dot, tail = value.strip().rpartition(".")
        return not (dot and head.lstrip("-").isdigit() and tail.strip("0").isdigit())
    return value is None or isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _guess_text(preview: Preview, label_column: str | None) -> str:
    """The usually named column, else the only one that reads like text."""
    for name in _named(preview, TEXT_NAMES):
        if name != label_column and any(isinstance(row.get(name), str) for row in preview.rows):
            return name
    wordy = [name for name in preview.names if name != label_column and _is_wordy(preview, name)]
    if len(wordy) == 1:
        return wordy[0]
    raise DataError(
        f"{preview.location} has no column that is plainly the text",
        got=", ".join(preview.names),
        allowed=f"a column named {', '.join(TEXT_NAMES[:6])} or the like, or a single column of words",
        do=f"name the column with --text-column{f' (such as {wordy[0]})' if wordy else ''}",
    )


def _is_wordy(preview: Preview, name: str) -> bool:
    """Whether most values of a column are strings of several words."""
    values = [row.get(name) for row in preview.rows]
    return 2 * sum(isinstance(value, str) and len(value.split()) > 2 for value in values) > len(values)


def _named(preview: Preview, usual: Sequence[str]) -> list[str]:
    """Columns with a usual name in any case, in the order of `usual`."""
    found = [name for name in preview.names if name.strip().lower() in usual]
    return sorted(found, key=lambda name: usual.index(name.strip().lower()))


def _absent(preview: Preview, name: str, option: str) -> DataError:
    near = difflib.get_close_matches(name, preview.names, n=1, cutoff=0.4)
    return DataError(
        f"{preview.location} has no column {name!r}",
        got=f"{option} {name}",
        allowed=", ".join(preview.names),
        do=f"did you mean {option} {near[0]}?" if near else "name one of these",
    )


def class_name(value: object, *, column: str, location: str) -> str | None:
    """A row's class as text, None where the row has none.

    Raises DataError for what is no class: a fraction, a list, an object.
    """
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int)):  # a truth value is an int, and prints as True
        return str(value)
    raise DataError(
        f"column {column!r} of {location} is no class column",
        got=f"a {type(value).__name__}: {str(value)[:60]}",
        allowed="strings, whole numbers or booleans",
        do="name another column with --label-column, or set --task causal-lm for raw text",
    )
