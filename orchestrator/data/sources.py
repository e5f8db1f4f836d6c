"""Locations of a spec -> the files and hub datasets they stand for; no content is read. For `training`, `advise`."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

from orchestrator import locations
from orchestrator.data.split_names import Choice, choose_split, split_named
from orchestrator.errors import DataError
from orchestrator.spec_data import DataFormat, SplitName

Reader = Literal["text", "json", "csv", "tsv", "parquet", "hub"]

READER_OF_ENDING: dict[str, Reader] = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".parquet": "parquet"}
READER_OF_ENDING |= dict.fromkeys((".jsonl", ".json", ".ndjson"), "json")
READERS_OF_FORMAT: dict[DataFormat, tuple[Reader, ...]]
READERS_OF_FORMAT = {"text": ("text",), "jsonl": ("json",), "csv": ("csv", "tsv"), "parquet": ("parquet",)}
_TO: dict[SplitName, str] = {"train": "train on", "validation": "validate on", "test": "test on"}
HUB_NAME = re.compile(r"^(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.\[\]:%+-]+))?$")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A location, found: files that one reader reads, or the name of a dataset on the hub."""

    location: str
    """As the spec says it, for messages."""
    reader: Reader
    files: tuple[Path, ...] = ()
    """Sorted; empty for the hub."""
    split: str = "train"
    """Split of a hub dataset that the location does not name."""
    delimiter: str | None = None
    """What separates the fields of delimited files; None where each file shows it."""
    searched: bool = False
    """True when a folder or glob found the files, so that binary ones among them are left out."""
    validation: tuple[Source, ...] = ()
    """The validation split that lies beside a split to train on, where the names of files tell them apart."""
    note: str | None = None
    """What of the location is read, and what is left out, where that is not all of it."""


def find_sources(
    given: str | tuple[str, ...],
    *,
    exclude: tuple[str, ...] = (),
    data_format: DataFormat = "auto",
    split: SplitName = "train",
    with_validation: bool = True,
    delimiter: str | None = None,
) -> tuple[Source, ...]:
    """The files or hub datasets that locations stand for, in a fixed order: those of a split, where names tell of some.

    `with_validation` finds the validation split beside the one to train on.
    Raises DataError when a location does not exist, matches nothing, has no files of the split, or mixes text with
    tables under `auto`.
    """
    names = (given,) if isinstance(given, str) else given
    found = [source for name in names for source in _find(name, exclude, data_format, split, with_validation)]
    return tuple(_with_delimiter(source, delimiter) for source in found)


def _with_delimiter(source: Source, delimiter: str | None) -> Source:
    held = tuple(_with_delimiter(beside, delimiter) for beside in source.validation)
    return replace(source, delimiter=delimiter, validation=held)


def _find(
    location: str,
    exclude: tuple[str, ...],
    data_format: DataFormat,
    split: SplitName,
    with_validation: bool,
) -> list[Source]:
    if data_format == "hub":
        return [Source(location=location, reader="hub", split=split)]
    path = Path(locations.resolve(location))
    if path.is_file():
        return [Source(location=location, reader=_reader(path, data_format), files=(path,))]
    if path.is_dir():
        pattern = path / "**" / "*"
    elif glob.has_magic(str(path)):
        pattern = path
    elif _names_hub(location, path):
        return [Source(location=location, reader="hub", split=split)]
    else:
        raise _missing(location, path)
    files = [file for file in _expand(pattern, exclude) if not path.is_dir() or _wanted(file, data_format)]
    if not files:
        raise DataError(
            f"{location} holds no file to read" if path.is_dir() else f"{location} matches no file",
            got=f"{path} read from {Path.cwd()}" if not path.is_absolute() else path,
            allowed="text, jsonl, json, csv, tsv, tab and parquet files; hidden ones are left out",
            do="check data.train and data.validation" + (f", and data.exclude {list(exclude)}" if exclude else ""),
        )
    choice = _of_split(location, path, files, data_format, split, with_validation)
    first, *others = _by_reader(location, choice.files, data_format)
    held = _by_reader(location, choice.validation, data_format) if choice.validation else []
    note = None if choice.note is None else f"{location}: {choice.note}"
    return [replace(first, validation=tuple(held), note=note), *others]


def _of_split(
    location: str,
    path: Path,
    files: list[Path],
    data_format: DataFormat,
    split: SplitName,
    with_validation: bool,
) -> Choice:
    """The files of the split that is asked for, else of the one that the location itself names, such as test-*."""
    tables = frozenset(file for file in files if _reader(file, data_format) != "text")
    parts = path.parts
    magic = len(parts) if path.is_dir() else next(n for n, part in enumerate(parts) if glob.has_magic(part))
    below = Path(*parts[:magic])
    choose = functools.partial(choose_split, files, below=below, tables=tables, with_validation=with_validation)
    choice = choose(asked=split)
    # A folder called test is meant as such; one called test_results is not.
    named = split_named(PurePath(*parts[magic:]) if parts[magic:] else PurePath(path.name), only=not parts[magic:])
    if not choice.files and named is not None:
        choice = choose(asked=named)
    if not choice.files:
        field = "data.train" if split == "train" else "data.validation"
        pattern = f"{path if path.is_dir() else below}/{'test' if 'test' in str(choice.note) else 'train'}*"
        raise DataError(
            f"{location} holds no split to {_TO[split]}",
            got=choice.note,
            do=f"name the files that are meant in {field}, such as {pattern}"
            + ("" if split == "train" else ", or the split in data.validation_split"),
        )
    return choice


def _by_reader(location: str, files: Sequence[Path], data_format: DataFormat) -> list[Source]:
    by_reader: dict[Reader, list[Path]] = {}
    for file in files:
        by_reader.setdefault(_reader(file, data_format), []).append(file)
    if "text" in by_reader and len(by_reader) > 1:
        counts = ", ".join(f"{len(members)} {reader}" for reader, members in by_reader.items())
        raise DataError(
            f"{location} mixes text files with tables",
            got=f"{counts}; {by_reader['text'][0].name} would be read as text",
            allowed="text files, or jsonl, csv and parquet files",
            do="narrow it with a glob such as **/*.jsonl, or set data.format",
        )
    return [Source(location=location, reader=r, files=tuple(f), searched=True) for r, f in by_reader.items()]


def _reader(file: Path, data_format: DataFormat) -> Reader:
    ending = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    by_ending = READER_OF_ENDING.get(ending.lower(), "text")
    if data_format == "auto":
        return by_ending
    allowed = READERS_OF_FORMAT[data_format]
    return by_ending if by_ending in allowed else allowed[0]


def _wanted(file: Path, data_format: DataFormat) -> bool:
    """Whether a folder's file has an ending of the format that the spec names; text may end in anything."""
    return data_format in ("auto", "text") or _reader(file, "auto") in READERS_OF_FORMAT[data_format]


def _expand(pattern: Path, exclude: tuple[str, ...]) -> list[Path]:
    """Files that match a glob, sorted. Excluded folders are not entered: `glob` spends seconds in site-packages."""
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    excluded = re.compile("|".join(map(fnmatch.translate, exclude)) or "(?!)")
    found = _matches(os.path.join(*parts[:fixed]) if fixed else ".", parts[fixed:], excluded)
    return sorted({Path(name) for name in found})


def _matches(folder: str, parts: tuple[str, ...], excluded: re.Pattern[str]) -> Iterator[str]:
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from _matches(folder, rest or ("*",), excluded)
    try:
        entries = list(os.scandir(folder))
    except NotADirectoryError:
        return
    except OSError as error:
        raise unreadable(Path(folder), error) from error
    for entry in entries:
        if excluded.match(entry.name) or (entry.name.startswith(".") and not head.startswith(".")):
            continue
        if head == "**":
            if entry.is_dir(follow_symlinks=False):  # A link back up would never end.
                yield from _matches(entry.path, parts, excluded)
        elif fnmatch.fnmatchcase(entry.name, head):
            if rest:
                yield from _matches(entry.path, rest, excluded)
            elif _is_file(entry):
                yield entry.path


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:  # a link to where this user may not look
        raise unreadable(Path(entry.path), error) from error


def _names_hub(location: str, path: Path) -> bool:
    """`owner/name` whose owner is no local folder, and whose ending is not that of a data file."""
    local = (
        len(path.parts) != 2
        or Path(path.parts[0]).exists()
        or path.suffix.lower() in {".txt", ".gz", *READER_OF_ENDING}
    )
    return HUB_NAME.match(location) is not None and not local


def _missing(location: str, path: Path) -> DataError:
    """The error for a path that is not there: names the first missing part and what stands beside it."""
    gone = path
    while not gone.parent.exists():
        gone = gone.parent
    siblings = sorted(entry.name for entry in gone.parent.iterdir()) if gone.parent.is_dir() else []
    near = difflib.get_close_matches(gone.name, siblings, n=1, cutoff=0.5)
    return DataError(
        f"{location} does not exist",
        got=f"{gone.name!r} is not in {gone.parent.absolute()}",
        allowed="a file, folder or glob, package:// or sysconfig://, or a hub name such as owner/name:config@split",
        do=f"did you mean {gone.parent / near[0]}?" if near else "check the path; a relative one starts in this folder",
    )


def unreadable(path: Path, error: BaseException) -> DataError:
    """The error for a file or folder that the system, or its packing, does not let read."""
    return DataError(f"{path} cannot be read", got=getattr(error, "strerror", None) or str(error))
