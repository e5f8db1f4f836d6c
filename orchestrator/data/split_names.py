"""Files found below one location -> those of the split that is asked for: the layout of data sets on the hub. Pure.

`train-*`, `validation-*` and `test-*` files, also as folders and below others, keep their splits, and what only
accompanies tables is no data. What is named a test split is used where it is named, and nowhere else.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from orchestrator.spec_data import SplitName

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_WORDS: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words that name a split, those of `datasets` (its `DEFAULT_PATTERNS_SPLIT_IN_FILENAME`)."""
_DOCUMENTS = (
    *("readme*", "licen[cs]e*", "copying*", "notice*", "citation*", "changelog*", "datasheet*"),
    *("*.md", "*.rst", "*.pdf", "*.html", "*.py", "*.yaml", "*.yml", "*.png", "*.jpg", "*.svg"),
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),
)
"""What accompanies tables, in lower case."""
_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of the files of a location is read."""

    files: tuple[Path, ...]
    """Empty where there is no file of the split that is asked for."""
    validation: tuple[Path, ...] = ()
    """The location's own validation split, where one to train on is asked for."""
    note: str | None = None
    """What was taken and what was left, where not all files are read; only the latter where none are."""


def choose_split(
    files: Sequence[Path], *, below: Path, tables: frozenset[Path], asked: SplitName, with_validation: bool
) -> Choice:
    """The files of a split, of those found below a folder; all where their names tell of no splits.

    Tables that name a split make a layout. Text does where most files name one and some of them train: a folder of
    source code has files like test_1.py. `with_validation` keeps the validation split beside that to train on.
    """
    beside = [file for file in files if _is_document(file.name)]
    documents = beside if tables - set(beside) else []
    data = [file for file in files if file not in set(documents)]
    by_split: dict[SplitName | None, list[Path]] = {}
    for file in data:
        by_split.setdefault(split_named(file.relative_to(below)), []).append(file)
    unnamed = by_split.pop(None, [])
    if not _is_layout(by_split.keys(), len(unnamed), len(data), of_tables=_are(by_split.values(), tables)):
        note = f"left out beside the tables: {', '.join(_shown(sorted(documents)))}" if documents else None
        if {"train", "test"} <= by_split.keys():
            note = (
                f"all {len(data)} files are read, {len(by_split['test'])} of them named like a test split, such as "
                f"{by_split['test'][0].name}: data.exclude leaves them out"
            )
        return Choice(files=tuple(data), note=note)
    # Files that name no split are what those that name one are set apart from.
    taken = by_split.get(asked) or ([] if "train" in by_split else unnamed)
    validation = by_split.get("validation", []) if asked == "train" and with_validation else []
    used = {*taken, *validation}
    left = [f"{split} ({_files(by_split[split])})" for split in SPLITS if set(by_split.get(split, [])) - used]
    left += _shown(sorted({*documents, *unnamed} - used))
    sentence = f"its {asked} split is read ({_files(taken)})"
    sentence += f", its validation split is held out ({_files(validation)})" if validation else ""
    sentence += f"; left out: {', '.join(left)}" if left else ""
    return Choice(files=tuple(taken), validation=tuple(validation), note=sentence if taken else ", ".join(left))


def split_named(file: PurePath, *, only: bool = False) -> SplitName | None:
    """The split that a path below a data set names: its outermost folder that names one does, else the file.

    A name with words of two splits names none; with `only`, neither does one with any other word.
    """
    for part in file.parts:
        words = re.findall(r"[a-z]+", part.lower())
        found = {_WORDS[word] for word in words if word in _WORDS}
        if len(found) == 1 and not (only and words[1:]):
            return found.pop()
    return None


def _is_layout(splits: Iterable[SplitName | None], unnamed: int, total: int, *, of_tables: bool) -> bool:
    found = set(splits)
    if of_tables:
        return bool(found - {"train"})
    return len(found) > 1 and "train" in found and 2 * unnamed < total


def _are(groups: Iterable[Sequence[Path]], tables: frozenset[Path]) -> bool:
    return all(file in tables for group in groups for file in group)


def _is_document(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _DOCUMENTS)


def _shown(files: Sequence[Path]) -> list[str]:
    more = len(files) - _NAMES_SHOWN
    return [*(file.name for file in files[:_NAMES_SHOWN]), *([f"{more} more"] if more > 0 else [])]


def _files(files: Sequence[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) != 1 else ''}"
