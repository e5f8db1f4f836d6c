"""`advise` and `run` see the same rows and classes, whatever the format, the files and what is parsed at once."""

from __future__ import annotations

import csv
import gzip
import io
import random
import re
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.columns import Columns
from orchestrator.data.documents import open_documents
from orchestrator.data.first_look import preview
from orchestrator.data.formats import delimited, json_rows, parquet
from orchestrator.data.labelled_rows import read_rows
from orchestrator.data.sampling import read
from orchestrator.data.sources import find_sources
from orchestrator.errors import DataError
from tests import tables

CELL = st.text(st.sampled_from("ab01.-e,;|\t\"'\r\n é日\\#\0"), min_size=1, max_size=12).filter(str.strip)
LABEL = st.sampled_from(["a", "b", "007", "7", "1e3", "True", "true", "NA", "null", " a", "x,y", 'q"'])


def seen_by_run(place: Path, delimiter: str | None = None) -> list[tuple[str, str]]:
    found = read_rows(find_sources(str(place), delimiter=delimiter), text_column="text", label_column="label")
    return [(text, found.names[number]) for text, number in zip(found.texts(), found.labels, strict=True)]


def seen_by_advise(place: Path, delimiter: str | None = None) -> list[tuple[str, str | None]]:
    sources = find_sources(str(place), delimiter=delimiter)
    assert set(preview(sources[0]).names) >= {"text", "label"}
    reading = read(sources, Columns(text="text", label="label"), seed=0)
    return [row for block in reading.blocks for row in zip(block.texts, block.labels, strict=True)]


@given(
    rows=st.lists(st.tuples(CELL, LABEL), min_size=1, max_size=8),
    name=st.sampled_from(sorted(tables.FORMATS)),
    files=st.integers(1, 3),
    at_once=st.sampled_from([None, 40, 7]),
)
@settings(max_examples=120, deadline=None)
def test_both_see_the_rows_that_were_written(
    rows: list[tuple[str, str]], name: str, files: int, at_once: int | None
) -> None:
    if not tables.suits(name, rows):
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(delimited, "BLOCK_BYTES", at_once or delimited.BLOCK_BYTES),
        mock.patch.object(json_rows, "CHUNK_BYTES", at_once or json_rows.CHUNK_BYTES),
        mock.patch.object(parquet, "ROWS_AT_A_TIME", at_once or parquet.ROWS_AT_A_TIME),
    ):
        place = tables.write(Path(folder), name, rows, files=min(files, len(rows)))
        assert seen_by_run(place) == rows
        assert seen_by_advise(place) == rows


@pytest.mark.parametrize("name", sorted(tables.FORMATS))
def test_chosen_texts_are_those_of_the_rows_with_these_numbers(tmp_path: Path, name: str) -> None:
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(50)]
    place = tables.write(tmp_path, name, rows, files=4)
    found = read_rows(find_sources(str(place)), text_column="text", label_column="label")
    numbers = np.array([0, 3, 11, 12, 13, 26, 37, 49])
    wanted = [f"text {number}" for number in numbers]
    chosen = found.texts().take(numbers)
    assert list(chosen) == wanted
    assert list(chosen.take(numbers[:0])) == []
    assert chosen.at(np.array([2, 2, 0])) == ["text 11", "text 11", "text 0"]
    documents = open_documents(find_sources(str(place)), text_column="text")
    assert list(documents.read(numbers)) == wanted


@pytest.mark.slow
def test_500_odd_tables_are_read_as_the_csv_module_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, refused, tried = random.Random(11), 0, 0
    while tried < 500:
        rows, delimiter = tables.odd_table(draw), draw.choice(",;|\t")
        if delimiter == "\t" and not tables.suits("rows.tsv", rows):
            continue
        tried += 1
        packed = draw.random() < 0.1
        file = tmp_path / (f"{tried}.{'tsv' if delimiter == chr(9) else 'csv'}" + (".gz" if packed else ""))
        content = tables.oddly_written(draw, rows, delimiter)
        file.write_bytes(gzip.compress(content) if packed else content)
        monkeypatch.setattr(delimited, "BLOCK_BYTES", draw.choice([1 << 18, 1 << 18, 512, 60]))
        lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
        header, *expected = [tuple(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        assert header == ("text", "label")
        try:
            found = seen_by_run(file, delimiter)
        except DataError as error:
            refused += 1
            with pytest.raises(DataError, match=re.escape(error.what)):
                seen_by_advise(file, delimiter)
            # Rows of unequal width, or one of several lines whose quotes do not close where a field ends.
            assert "does not close" in error.what or any(len(row) != 2 for row in expected)  # noqa: PT017
            continue
        assert found == expected, tried
        assert seen_by_advise(file, delimiter) == expected, tried
    assert refused < 100
