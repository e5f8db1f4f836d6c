from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.columns import Columns
from orchestrator.data.first_look import preview
from orchestrator.data.reading import Reading
from orchestrator.data.sampling import read
from orchestrator.data.sources import find_sources
from orchestrator.errors import DataError
from orchestrator.facts.dataset import describe
from orchestrator.ratio_estimates import ratio

ROWS = [{"text": f"row {number}, with a comma", "label": "odd" if number % 2 else "even"} for number in range(6)]
BOTH = Columns(text="text", label="label")
DOCUMENTS = Columns(text=None, label=None)


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["text", "label"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, str]], rows_of_group: int = 100) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=rows_of_group)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "rows.jsonl": as_jsonl,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.parquet": as_parquet,
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "rows.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
}


def many(count: int) -> list[dict[str, str]]:
    chance = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    return [
        {
            # Quotes, commas and line breaks inside of fields, as real reviews have them.
            "text": f'{number} "{" ".join(chance.choices(words, k=chance.randint(5, 40)))}",\n{words[number % 500]}, x',
            "label": chance.choice(["a", "b", "b"]),
        }
        for number in range(count)
    ]


def opened(path: Path, columns: Columns = BOTH, *, seed: int = 0, **limits: int) -> Reading:
    return read(find_sources(str(path)), columns, seed=seed, **limits)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](ROWS))
    (source,) = find_sources(str(tmp_path / name))
    assert preview(source).names == ("text", "label")
    assert list(preview(source).rows) == ROWS
    reading = opened(tmp_path / name)
    assert reading.share == 1
    assert [block.texts for block in reading.blocks] == [tuple(row["text"] for row in ROWS)]
    assert reading.blocks[0].labels == ("even", "odd") * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "rows.json"])
def test_parts_of_a_large_file_stand_for_the_whole(tmp_path: Path, name: str) -> None:
    rows = many(5_000)
    (tmp_path / name).write_bytes(as_parquet(rows, 20) if name == "rows.parquet" else FORMATS[name](rows))
    reading = opened(tmp_path / name, whole_bytes=100_000, block_bytes=1_000)
    assert 0 < reading.share < 0.99
    texts = {row["text"] for row in rows}
    read_texts = [text for block in reading.blocks for text in block.texts]
    known = [text for text in read_texts if text in texts]
    assert len(known) == len(set(known))
    assert len(read_texts) - len(known) <= len(reading.blocks)  # a field that a block cuts may look like a row
    facts = describe(reading)
    assert facts.examples.mid == pytest.approx(5_000, rel=0.1)
    assert {found.name for found in facts.classes} == {"a", "b"}
    assert facts.classes[0].share == pytest.approx(2 / 3, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_nine_of_ten_intervals_hold_the_number_of_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](many(10_000)))
    held = 0
    for seed in range(60):
        reading = opened(tmp_path / name, whole_bytes=100_000, block_bytes=2_000, seed=seed)
        found = ratio([(len(block.texts), block.extent) for block in reading.blocks], share=reading.share)
        interval = found.interval(reading.extent)
        held += interval.low <= 10_000 <= interval.high
    assert 50 <= held <= 59


def test_large_text_is_read_in_pieces_and_its_files_are_counted(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("some words of a book. " * 2_000)
    reading = opened(tmp_path, DOCUMENTS, whole_bytes=100_000, block_bytes=1_000)
    assert reading.share < 0.2
    facts = describe(reading)
    assert (facts.examples.low, facts.examples.high) == (20, 20)
    assert facts.text_bytes.mid == pytest.approx(20 * 44_000)
    assert facts.duplicates is None


def test_files_of_a_folder_are_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text(f"{name} has words")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    reading = opened(tmp_path, DOCUMENTS)
    assert [block.texts for block in reading.blocks] == [("a.txt has words",), ("b.md has words",), ("",)]
    assert reading.document_bytes == (15, 14, 0)


@pytest.mark.parametrize("whole_bytes", [1_000_000, 1_000])
def test_documents_that_are_no_utf8_are_refused_also_in_parts(tmp_path: Path, whole_bytes: int) -> None:
    (tmp_path / "latin.txt").write_bytes("für naïve Zuschauer. ".encode("latin-1") * 1_000)
    with pytest.raises(DataError, match="is not UTF-8"):
        opened(tmp_path, DOCUMENTS, whole_bytes=whole_bytes)
    (tmp_path / "latin.txt").write_bytes("für naïve Zuschauer. 日本".encode() * 1_000)
    opened(tmp_path, DOCUMENTS, whole_bytes=whole_bytes)


def test_missing_and_numeric_values_become_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": null, "label": 1}\n\n{"label": true}\n{"text": 7}\n')
    (block,) = opened(tmp_path / "rows.jsonl").blocks
    assert block.texts == ("", "", "7")
    assert block.labels == ("1", "true", None)


def test_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(as_csv(ROWS).decode().encode("utf-8-sig"))
    assert opened(tmp_path / "rows.csv").blocks[0].texts[0] == ROWS[0]["text"]


def test_fields_may_be_longer_than_the_usual_limit(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(as_csv([{"text": "word " * 60_000, "label": "a"}]))
    assert len(opened(tmp_path / "rows.csv").blocks[0].texts[0]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.csv", b"text,label\nfine,a\ncaf\xe9,b\n", "line 3 of .* is not UTF-8"),
        ("rows.csv", b"text,label\nfine,a\none,two,three\n", "line 3, has more fields"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 of .* is not valid JSON"),
        ("rows.jsonl", b'{"text": "fine"}\n\n17\n', "line 3 of .* is no JSON object"),
        ("rows.jsonl", b'{"text": ["a"]}\n', "does not hold text"),
        ("rows.jsonl", b'{"text": "a", "label": 0.5}\n', "no class column"),
        ("rows.csv.gz", b"not packed at all", "cannot be read"),
        ("rows.parquet", b"PAR1 but nothing else", "cannot be read as Parquet"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=what):
        opened(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_tables_without_rows_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds no rows|is empty"):
        preview(find_sources(str(tmp_path / name))[0])
    with pytest.raises(DataError, match="is empty"):
        opened(tmp_path / name)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="is not text"):
        opened(tmp_path / "model.bin", DOCUMENTS)


def test_large_file_with_one_array_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(many(2_000), indent=1))
    with pytest.raises(DataError, match="too large to read whole") as caught:
        opened(tmp_path / "rows.json", whole_bytes=10_000, block_bytes=1_000)
    assert "a line of its own" in str(caught.value.do)
