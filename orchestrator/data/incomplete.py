"""Rows of a labelled table without a text or a label: counted, and said with the remedy, by `advise` and `run`."""

from __future__ import annotations

import numpy as np

from orchestrator.errors import DataError

LEAVE_OUT = "data.incomplete_rows=leave-out"
"""What lets `run` train without them."""


class Gaps:
    """Told which rows of a table miss what, in order."""

    def __init__(self, location: str, text_column: str, label_column: str) -> None:
        self._location = location
        self._columns = (text_column, label_column)
        self._missing = [0, 0]
        self._first = [0, 0]
        self.rows = 0
        """Rows seen."""
        self.incomplete = 0
        """Those among them without a text or a label."""

    def count(self, no_text: np.ndarray, no_label: np.ndarray) -> None:
        """The next rows: which have no text, and which no label."""
        for index, missing in enumerate((no_text, no_label)):
            if found := int(np.count_nonzero(missing)):
                self._first[index] = self._first[index] or self.rows + int(np.argmax(missing)) + 1
                self._missing[index] += found
        self.incomplete += int(np.count_nonzero(no_text | no_label))
        self.rows += len(no_text)

    def said(self) -> str:
        """How many rows have nothing in which column, and the first of them."""
        return " and ".join(
            f"{count:,} of {self.rows:,} rows of {self._location} have nothing in column {column!r}, the first is row "
            f"{first:,}"
            for column, count, first in zip(self._columns, self._missing, self._first, strict=True)
            if count
        )

    def notes(self) -> list[str]:
        """A sentence where rows are left out."""
        return [f"{self.said()}: left out"] if self.incomplete else []

    def advice(self) -> list[str]:
        """The same before a run, which would refuse them."""
        do = f"`run` refuses them: fill or remove them, or train on the others with {LEAVE_OUT}, as --write-spec does"
        return [f"{self.said()}; {do}"] if self.incomplete else []

    def refusal(self) -> DataError:
        """The error where they may not be."""
        return DataError(
            self.said(),
            got=f"{self.incomplete:,} incomplete rows",
            do=f"fill or remove them, or train on the others alone with {LEAVE_OUT}",
        )
