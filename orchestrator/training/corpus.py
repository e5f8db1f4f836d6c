"""Sources -> documents or labelled rows. Called by `prepare`; nothing here knows about tokens.

Text files are read directly, one file a document; JSON, CSV, Parquet and hub names go through `datasets`, whose
tables stay memory-mapped on disk.
"""

from __future__ import annotations

import difflib
import gzip
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.hub import load_table
from orchestrator.data.sources import Source, unreadable
from orchestrator.errors import DataError

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 1000  # `datasets`' own default batch; a few MB of text.


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
        raise unreadable(file, error) from error
