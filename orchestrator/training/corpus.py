"""Locations of a spec -> documents or labelled rows. Called by `prepare`; nothing here knows about tokens.

`find_sources` reads no content, so that a cache can be looked up first. Text files are then read directly, one
file a document; JSON, CSV, Parquet and hub names go through `datasets`, whose tables stay memory-mapped on disk.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import glob
import gzip
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orchestrator import locations
from orchestrator.errors import DataError, StorageError
from orchestrator.spec import DataFormat

logger = logging.getLogger(__name__)

Reader = Literal["text", "json", "csv", "tsv", "parquet", "hub"]

READER_OF_ENDING: dict[str, Reader] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
READER_OF_ENDING |= dict.fromkeys((".jsonl", ".json", ".ndjson"), "json")
READERS_OF_FORMAT: dict[DataFormat, tuple[Reader, ...]]
READERS_OF_FORMAT = {"text": ("text",), "jsonl": ("json",), "csv": ("csv", "tsv"), "parquet": ("parquet",)}
_HUB_NAME = re.compile(r"^(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.\[\]:%+-]+))?$")
_HUB_TIMEOUT_S = 10.0  # A guess: long for a metadata request, short for a person who waits.
_ROWS_AT_A_TIME = 1000  # `datasets`' own default batch; a few MB of text.


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
    searched: bool = False
    """True when a folder or glob found the files, so that binary ones among them are left out."""


def find_sources(
    given: str | tuple[str, ...],
    *,
    exclude: tuple[str, ...] = (),
    data_format: DataFormat = "auto",
    split: str = "train",
) -> tuple[Source, ...]:
    """The files or hub datasets that locations stand for, in a fixed order.

    Raises DataError when a location does not exist, matches nothing, or mixes text with tables under `auto`.
    """
    names = (given,) if isinstance(given, str) else given
    return tuple(source for name in names for source in _find(name, exclude, data_format, split))


def _find(location: str, exclude: tuple[str, ...], data_format: DataFormat, split: str) -> list[Source]:
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
            allowed="text, jsonl, json, csv, tsv and parquet files; hidden ones are left out",
            do="check data.train and data.validation" + (f", and data.exclude {list(exclude)}" if exclude else ""),
        )
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
        raise _unreadable(Path(folder), error) from error
    for entry in entries:
        if excluded.match(entry.name) or (entry.name.startswith(".") and not head.startswith(".")):
            continue
        if head == "**":
            if entry.is_dir(follow_symlinks=False):  # A link back up would never end.
                yield from _matches(entry.path, parts, excluded)
        elif fnmatch.fnmatchcase(entry.name, head):
            if rest:
                yield from _matches(entry.path, rest, excluded)
            elif entry.is_file():
                yield entry.path


def _names_hub(location: str, path: Path) -> bool:
    """`owner/name` whose owner is no local folder, and whose ending is not that of a data file."""
    local = (
        len(path.parts) != 2
        or Path(path.parts[0]).exists()
        or path.suffix.lower() in {".txt", ".gz", *READER_OF_ENDING}
    )
    return _HUB_NAME.match(location) is not None and not local


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


class _TextFiles:
    """Documents that are files. `sizes` of packed files are those on disk."""

    def __init__(self, source: Source) -> None:
        # Git's test: a NUL in the first 8000 bytes.
        binary = {file for file in source.files if file.suffix != ".gz" and b"\0" in _read_bytes(file, 8000)}
        if binary and (not source.searched or len(binary) == len(source.files)):
            raise DataError(f"{min(binary)} is not text", got="a binary file", allowed="text, jsonl, csv or parquet")
        if binary:
            logger.warning("%s: left out %d binary files such as %s", source.location, len(binary), min(binary).name)
        self.files = [file for file in source.files if file not in binary]
        self.sizes = np.array([file.stat().st_size for file in self.files], dtype=np.int64)

    def read(self, chosen: np.ndarray) -> Iterator[str]:
        for index in chosen:
            yield _read_bytes(self.files[index]).decode("utf-8-sig", errors="replace")


class _TextColumn:
    """Documents that are rows of a table, memory-mapped by `datasets`."""

    def __init__(self, source: Source, text_column: str) -> None:
        import pyarrow.compute as pc

        self.column = _texts(load_table(source), text_column, source)
        self.sizes = pc.binary_length(self.column).to_numpy().astype(np.int64)

    def read(self, chosen: np.ndarray) -> Iterator[str]:
        for start in range(0, len(chosen), _ROWS_AT_A_TIME):
            yield from self.column.take(chosen[start : start + _ROWS_AT_A_TIME]).to_pylist()


class Documents:
    """The documents of all sources in one numbering, read only when asked for; empty ones are left out.

    `sizes` holds their UTF-8 bytes (text files that are packed: bytes on disk).
    """

    def __init__(self, parts: Sequence[_TextFiles | _TextColumn]) -> None:
        self._parts = parts
        sizes = [part.sizes for part in parts]
        owner = np.repeat(np.arange(len(parts)), [len(s) for s in sizes])
        inside = np.concatenate([np.arange(len(s)) for s in sizes])
        every = np.concatenate(sizes)
        self._owner, self._inside, self.sizes = owner[every > 0], inside[every > 0], every[every > 0]

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, chosen: np.ndarray) -> Iterator[str]:
        """Texts of the chosen documents, in ascending order of their numbers."""
        chosen = np.sort(chosen)
        for number, part in enumerate(self._parts):
            yield from part.read(self._inside[chosen[self._owner[chosen] == number]])


def open_documents(sources: Sequence[Source], *, text_column: str) -> Documents:
    """Documents for language modelling.

    Raises DataError when a file cannot be read or parsed, the column is not there, or nothing is in it.
    """
    documents = Documents([_TextFiles(s) if s.reader == "text" else _TextColumn(s, text_column) for s in sources])
    if not len(documents):
        names = ", ".join(dict.fromkeys(source.location for source in sources))
        raise DataError(
            f"{names} holds no text", got="only empty files or rows", do="check data.train and data.validation"
        )
    return documents


def read_rows(sources: Sequence[Source], *, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Texts and class names of all rows of a classification dataset, in order.

    Raises DataError when a column is not there, a text or label is missing, or the labels are no classes.
    """
    texts: list[str] = []
    labels: list[str] = []
    for source in sources:
        if source.reader == "text":
            raise DataError(
                f"{source.files[0]} is read as text, which carries no labels",
                allowed="jsonl, csv, tsv or parquet files, or a hub dataset",
                do=f"give files with the columns {text_column} and {label_column}, or set data.format",
            )
        table = load_table(source)
        found = _texts(table, text_column, source).to_pylist()
        blank = [index for index, text in enumerate(found) if not text.strip()]
        if blank:
            raise _incomplete(source, text_column, len(blank), len(found), first=blank[0])
        texts.extend(found)
        labels.extend(_labels(table, label_column, source))
    return texts, labels


def _texts(table: Any, name: str, source: Source) -> Any:
    """The text column as a pyarrow array of strings; numbers become their digits."""
    import pyarrow as pa

    column = _column(table, name, source, field="text_column")
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise DataError(
            f"column {name!r} of {source.location} does not hold text", got=column.type, do="set data.text_column"
        )
    if column.null_count:
        nulls = column.is_null().to_pylist()
        raise _incomplete(source, name, column.null_count, len(column), first=nulls.index(True))
    return column if str(column.type) in ("string", "large_string") else column.cast(pa.large_string())


def _labels(table: Any, name: str, source: Source) -> list[str]:
    import pyarrow as pa

    column = _column(table, name, source, field="label_column")
    values = column.to_pylist()
    feature = table.features[name]
    named = feature.names if hasattr(feature, "int2str") else None  # The hub's ClassLabel.
    absent = [index for index, value in enumerate(values) if value is None or (named is not None and value < 0)]
    if absent:
        raise _incomplete(source, name, len(absent), len(values), first=absent[0])
    if named is not None:
        return [named[value] for value in values]
    fractional = next((v for v in values if isinstance(v, float) and not v.is_integer()), None)
    if fractional is not None or pa.types.is_nested(column.type):
        raise DataError(
            f"column {name!r} of {source.location} is no class column",
            got=f"{column.type} values such as {fractional if fractional is not None else values[0]}",
            allowed="strings, whole numbers or booleans",
            do="set data.label_column to the column that holds the class, or turn these values into classes",
        )
    return [str(int(value)) if isinstance(value, float) else str(value) for value in values]


def _column(table: Any, name: str, source: Source, *, field: str) -> Any:
    if name in table.column_names:
        if type(table.features[name]).__name__ == "Json":  # What `datasets` makes of it.
            raise DataError(f"column {name!r} of {source.location} mixes types", do="write all its values as strings")
        return table.data.column(name)
    near = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.4) or table.column_names[:1]
    raise DataError(
        f"{source.location} has no column {name!r}",
        got=f"data.{field}={name}",
        allowed=", ".join(table.column_names),
        do=f"set data.{field}={near[0]}" if near else None,
    )


def _incomplete(source: Source, column: str, count: int, total: int, *, first: int) -> DataError:
    return DataError(
        f"{count} of {total} rows of {source.location} have nothing in column {column!r}",
        got=f"the first is row {first + 1}",
        do="fill or remove these rows",
    )


def _read_bytes(file: Path, limit: int = -1) -> bytes:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return stream.read(limit)
    except (OSError, EOFError) as error:
        raise _unreadable(file, error) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path} cannot be read", got=getattr(error, "strerror", None) or str(error))


def load_table(source: Source) -> Any:
    """A `datasets.Dataset` of a hub dataset, or of all files of a source."""
    if source.reader == "hub":
        match = _HUB_NAME.match(source.location)
        if match is None:
            raise DataError("this names no hub dataset", got=source.location, allowed="owner/name:config@split")
        return _load(match["name"], name=match["config"], split=match["split"] or source.split)
    if empty := [file for file in source.files if not file.stat().st_size]:
        raise DataError(f"{empty[0]} is empty", got="0 bytes", do="remove it, or leave it out with data.exclude")
    # Only an empty cell is missing: pandas would also take the words "None", "NA" and "null" for that.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if source.reader in ("csv", "tsv") else {}
    if source.reader == "tsv":
        options["sep"] = "\t"
    builder = "csv" if source.reader == "tsv" else source.reader
    try:
        return _load(builder, data_files=[str(file) for file in source.files], split="train", **options)
    except DataError:
        for file in source.files if len(source.files) > 1 else ():  # The reader does not say which one it was.
            try:
                _load(builder, data_files=[str(file)], split="train", **options)
            except DataError as error:
                raise DataError(f"{file} cannot be read", got=error.got) from error.__cause__
        raise


def _load(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`, silent, with its failures as DataError or StorageError."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # The reason is in the error raised below.
    cache = locations.home() / "cache" / "datasets"
    files: list[str] = options.get("data_files", [])
    try:
        if not files:
            _ask_hub(path)
        return datasets.load_dataset(path, cache_dir=str(cache), **options)
    except Exception as error:  # Its readers raise ValueError, OSError, and pyarrow's, pandas' and their own kinds.
        reason = error.__cause__ or error
        if getattr(reason, "errno", None) == errno.ENOSPC:
            raise StorageError(f"no space left in {cache}", do="free some, or set ORCHESTRATOR_HOME") from error
        got = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
        if files:
            raise DataError(f"{', '.join(files[:3])} cannot be read", got=got) from error
        raise DataError(
            f"{path} is neither a local path nor a dataset that can be reached and read on the hub",
            got=got,
            do="check path, name and connection; HF_HUB_OFFLINE=1 uses what was downloaded before",
        ) from error


def _ask_hub(name: str) -> None:
    """Fails in seconds without a connection, where `datasets` tries for half a minute."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
