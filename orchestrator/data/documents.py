"""Sources -> documents for language modelling. Called by `splits`; nothing here knows about tokens.

A text file is a document, and so is a row of a table. Only their sizes are in memory: texts are read when asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from orchestrator.data.formats.raw_bytes import check_utf8, is_binary, read_text
from orchestrator.data.sources import Source
from orchestrator.data.tables import Table
from orchestrator.data.texts import byte_lengths, chosen_texts, is_blank
from orchestrator.errors import DataError

_SMALL = 1_000_000  # Bytes of a document that may be all white space; a larger one is taken to hold text.
logger = logging.getLogger(__name__)


class _TextFiles:
    """Documents that are files. `sizes` of packed files are those on disk."""

    def __init__(self, source: Source) -> None:
        binary = {file for file in source.files if is_binary(file)}
        if binary and (not source.searched or len(binary) == len(source.files)):
            raise DataError(f"{min(binary)} is not text", got="a binary file", allowed="text, jsonl, csv or parquet")
        if binary:
            logger.warning("%s: left out %d binary files such as %s", source.location, len(binary), min(binary).name)
        self.files = [file for file in source.files if file not in binary]
        for file in self.files:
            check_utf8(file)
        self.sizes = np.array([file.stat().st_size for file in self.files], dtype=np.int64)
        self.notes: list[str] = []

    def read(self, chosen: np.ndarray) -> Iterator[str]:
        for index in chosen:
            yield read_text(self.files[index])


class _TextColumn:
    """Documents that are rows of a table; blank ones have the size 0. Every reading goes over the files anew."""

    def __init__(self, source: Source, text_column: str) -> None:
        self._table, self._column, self._location = Table(source), text_column, source.location
        sizes: list[np.ndarray] = []
        for batch in self._table.batches([text_column], fields=["text_column"]):
            texts = batch.columns[0]
            sizes.append(np.where(is_blank(texts), 0, byte_lengths(texts)))
        self.sizes = np.concatenate([np.empty(0, dtype=np.int64), *sizes])

    def read(self, chosen: np.ndarray) -> Iterator[str]:
        yield from chosen_texts(self._table, self._column, chosen)

    @property
    def notes(self) -> list[str]:
        """What was found on the way, and how many rows hold no text."""
        blank = len(self.sizes) - np.count_nonzero(self.sizes)
        if not blank:
            return self._table.notes
        first = int(np.flatnonzero(self.sizes == 0)[0]) + 1
        return [
            *self._table.notes,
            f"{blank:,} of {len(self.sizes):,} rows of {self._location} have nothing in column {self._column!r} and "
            f"are left out; the first is row {first:,}",
        ]


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
        self.notes = tuple(note for part in parts for note in part.notes)
        """What a reader of the files may not expect, a sentence each."""
        self._owner, self._inside, self.sizes = owner[every > 0], inside[every > 0], every[every > 0]

    def __len__(self) -> int:
        return len(self.sizes)

    def are_blank(self) -> bool:
        """Whether there is nothing but white space in them; looks no further than the first that is not blank."""
        small = np.flatnonzero(self.sizes <= _SMALL)
        if len(small) < len(self.sizes):
            return False
        return all(not text or text.isspace() for text in self.read(small))

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
    if not len(documents) or documents.are_blank():
        names = ", ".join(dict.fromkeys(source.location for source in sources))
        raise DataError(
            f"{names} holds no text{' but white space' if len(documents) else ''}",
            got="only empty or blank files or rows",
            do="check data.train and data.validation",
        )
    return documents
