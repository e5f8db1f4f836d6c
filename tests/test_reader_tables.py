from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.sources import find_sources
from orchestrator.data.tables import Table
from orchestrator.errors import DataError


def column(file: Path, name: str) -> list[str]:
    return [
        value for batch in Table(find_sources(str(file))[0]).batches([name]) for value in batch.columns[0].to_pylist()
    ]


def test_json_strings_stay_strings_and_numbers_stand_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"x": "2024-01-01"}\n{"x": 1.0}\n{"x": 1e3}\n{"x": true}\n{"x": null}\n{"y": 1}\n'
    )
    assert column(tmp_path / "a.jsonl", "x") == ["2024-01-01", "1.0", "1e3", "true", "", ""]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("null", "line 2 of .* is no JSON object"),
        ('{"x": NaN}', "has NaN in line 2"),
        ('{"x": [1]}', "does not hold text"),
        ('{"x": "a", "x": "b"}', "line 2 of .* the name 'x' twice"),
        ('{"x": "\\ud800"}', "half of a surrogate pair in line 2"),
    ],
)
def test_json_that_is_no_text_is_refused_with_its_line(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=what):
        column(tmp_path / "a.jsonl", "x")


def test_columns_that_nobody_asks_for_may_differ(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": "a", "m": {"a": 1}}\n{"x": "b", "m": [NaN]}\n')
    assert column(tmp_path / "a.jsonl", "x") == ["a", "b"]
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"x": ["a"]}), tmp_path / "shards/a.parquet")
    pq.write_table(pa.table({"e": [1], "x": [b"b"]}), tmp_path / "shards/b.parquet")
    assert column(tmp_path / "shards", "x") == ["a", "b"]


def test_bytes_in_parquet_are_their_text_or_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [b"a", b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="bytes that are no text") as caught:
        column(tmp_path / "a.parquet", "x")
    assert "row 2" in str(caught.value.got)


def test_the_file_that_was_named_is_read(tmp_path: Path) -> None:
    (tmp_path / "data1.csv").write_text("x,y\nwrong,1\n")
    (tmp_path / "data[1].csv").write_text("x,y\nright,1\n")
    assert column(tmp_path / "data[1].csv", "x") == ["right"]


def test_a_file_is_read_as_it_is_now_and_one_that_changes_between_passes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("x,y\nold,1\n")
    time = file.stat().st_mtime_ns
    table = Table(find_sources(str(file))[0])
    assert len(list(table.batches(["x"]))) == 1
    other = tmp_path / "b.csv"
    other.write_text("x,y\nnew,1\n")
    os.utime(other, ns=(time, time))
    other.replace(file)
    assert column(file, "x") == ["new"]
    with pytest.raises(DataError, match="has changed while it was read"):
        list(table.batches(["x"]))
