from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from orchestrator.data.columns import choose_columns
from orchestrator.data.first_look import FIRST_ROWS, preview
from orchestrator.data.sampling import read
from orchestrator.data.sources import find_sources
from orchestrator.errors import DataError

ROWS = [{"text": f"some words, {number}", "label": "ab"[number >= 3000]} for number in range(4000)]


def write(folder: Path, ending: str, rows: list[dict[str, str]]) -> Path:
    file = folder / f"data.{ending}"
    if ending == "parquet":
        pd.DataFrame(rows).to_parquet(file)
    elif ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        stream = io.StringIO()
        csv.writer(stream, delimiter="\t" if ending == "tsv" else ",").writerows([rows[0], *(r.values() for r in rows)])
        file.write_text(stream.getvalue())
    return file


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_from_further_on_are_looked_at_once(tmp_path: Path, ending: str) -> None:
    (source,) = find_sources(str(write(tmp_path, ending, ROWS)))
    rows = preview(source).rows
    assert list(rows[:FIRST_ROWS]) == ROWS[:FIRST_ROWS]
    assert {row["label"] for row in rows} == {"a", "b"}
    assert all(row in ROWS for row in rows)
    assert max(Counter(str(row["text"]) for row in rows).values()) == 1


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("count", [1, FIRST_ROWS, FIRST_ROWS + 20])
def test_rows_of_a_small_file_are_not_looked_at_twice(tmp_path: Path, ending: str, count: int) -> None:
    (source,) = find_sources(str(write(tmp_path, ending, ROWS[:count])))
    rows = preview(source).rows
    assert len({row["text"] for row in rows}) == len(rows) <= count


def test_what_cannot_be_read_further_on_is_left_to_those_who_read_it_all(tmp_path: Path) -> None:
    file = write(tmp_path, "jsonl", ROWS)
    with file.open("ab") as stream:
        stream.write(b"no json\n" * 9000)
    (source,) = find_sources(str(file))
    assert len(preview(source).rows) >= FIRST_ROWS


@pytest.mark.parametrize("content", ["{}", "[{}, {}]", "{}\n{}\n"])
def test_rows_without_a_column_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    (source,) = find_sources(str(tmp_path / "data.json"))
    with pytest.raises(DataError, match="holds no columns"):
        preview(source)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("whole_bytes", [10**9, 1], ids=["read whole", "read in parts"])
def test_a_file_that_lacks_a_column_of_the_first_one_is_named(tmp_path: Path, ending: str, whole_bytes: int) -> None:
    write(tmp_path, ending, ROWS).rename(tmp_path / f"a.{ending}")
    others = [{"body": row["text"], "queue": row["label"]} for row in ROWS]
    write(tmp_path, ending, others).rename(tmp_path / f"b.{ending}")
    (source,) = find_sources(str(tmp_path))
    look = preview(source)
    assert look.names == ("text", "label")
    columns = choose_columns(look)
    with pytest.raises(DataError, match=rf"b\.{ending} has no column 'text'"):
        read([source], columns, whole_bytes=whole_bytes, seed=0)
