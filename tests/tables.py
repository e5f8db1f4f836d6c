"""Labelled tables written in every format that is read, for tests that read them back."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Table = Sequence[tuple[str, str]]
"""Text and label of each row."""


def delimited(
    rows: Table, *, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL, end: str = "\r\n", mark: bool = False
) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([("text", "label"), *rows])
    return buffer.getvalue().encode("utf-8-sig" if mark else "utf-8")


def unquoted(rows: Table, *, end: str = "\n") -> bytes:
    """Tab-separated, as most such files are: no quoting at all."""
    return "".join(f"{text}\t{label}{end}" for text, label in [("text", "label"), *rows]).encode()


def json_lines(rows: Table) -> bytes:
    return "".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in rows).encode()


def json_array(rows: Table) -> bytes:
    return json.dumps(
        [{"text": t, "label": label, "n": [1]} for t, label in rows], indent=1, ensure_ascii=False
    ).encode()


def parquet(rows: Table, *, rows_of_group: int = 3) -> bytes:
    buffer = io.BytesIO()
    columns = {"label": [label for _, label in rows], "text": [text for text, _ in rows]}
    table = pa.table(columns, schema=pa.schema([("label", pa.string()), ("text", pa.string())]))
    pq.write_table(table, buffer, row_group_size=rows_of_group)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Table], bytes]] = {
    "rows.csv": delimited,
    "all-quoted.csv": lambda rows: delimited(rows, quoting=csv.QUOTE_ALL, end="\n"),
    "mac.csv": lambda rows: delimited(rows, quoting=csv.QUOTE_ALL, end="\r"),
    "marked.csv": lambda rows: delimited(rows, mark=True),
    "semicolons.csv": lambda rows: delimited(rows, delimiter=";"),
    "bars.csv": lambda rows: delimited(rows, delimiter="|", quoting=csv.QUOTE_NONNUMERIC, end="\n"),
    "tabs.csv": lambda rows: delimited(rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "quoted.tsv": lambda rows: delimited(rows, delimiter="\t"),
    "plain.tab": unquoted,
    "rows.jsonl": json_lines,
    "rows.json": json_array,
    "rows.parquet": parquet,
    "rows.csv.gz": lambda rows: gzip.compress(delimited(rows)),
    "rows.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
}


def suits(name: str, rows: Table) -> bool:
    """Whether a format can hold these rows at all, or without saying two things."""
    cells = [cell for row in rows for cell in row]
    if name == "plain.tab":  # No tab and no line break in a field, and no quotes all around one.
        return not any(set(cell) & set("\t\r\n") or cell.startswith('"') for cell in cells)
    # In quotes both together look like rows that were not quoted.
    return ("tab" not in name and "tsv" not in name) or not any(
        "\t" in cell and set(cell) & set("\r\n") for cell in cells
    )


def write(folder: Path, name: str, rows: Table, *, files: int = 1) -> Path:
    """The rows in one file or several of one format; where they lie."""
    if files == 1:
        (folder / name).write_bytes(FORMATS[name](rows))
        return folder / name
    place = folder / f"{name}-parts"
    place.mkdir()
    edges = [len(rows) * number // files for number in range(files + 1)]
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        if last > first:
            (place / f"{number}-{name}").write_bytes(FORMATS[name](rows[first:last]))
    return place


def odd_table(draw: random.Random) -> list[tuple[str, str]]:
    """Rows with what trips readers: quotes, delimiters, line ends, other scripts, numbers, dates, words for nothing."""
    pieces = [
        *("word", "two words", '"', '""', "'", ",", ";", "|", "\t", "\n", "\r\n", "\r", "\\", "\\n", "#", " ", "\0"),
        *("é", "日本語", "🙂", "\u2028", "\xa0", "\ufeff", "ﬁ", "e\u0301", "א"),
        *("007", "1.0", "1e5", "-0", "NaN", "null", "None", "NA", "true", "2024-01-01", "0x1f", "1,234.5", "<b>"),
    ]
    labels = draw.choice(
        [
            *(["a", "b"], ["007", "7", "07"], ["1e3", "2E5"], ["True", "true"], ["1", "2"], ["NA", "null", "None"]),
            *([" a", "a ", "a"], ["yes, sir", "no; sir"], ["2024-01-01", "2024-01-02"], ['"quoted"', "it's", "日本"]),
        ]
    )
    rows = []
    for _ in range(draw.randint(1, 40)):
        text = "".join(draw.choices(pieces, k=draw.choice([1, 1, 2, 3, 8, 30])))
        rows.append((text if text.strip() else f"{text}x", draw.choice(labels)))
    return rows


def oddly_written(draw: random.Random, rows: Table, delimiter: str) -> bytes:
    """The rows as some program may have written them: by the csv module, or with quotes where they need not be."""
    if draw.random() < 0.5:
        quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        end = draw.choice(["\r\n", "\n", "\r"] if quoting == csv.QUOTE_ALL else ["\r\n", "\n"])
        return delimited(rows, delimiter=delimiter, quoting=quoting, end=end, mark=draw.random() < 0.2)
    ways = draw.choice([("quoted",), ("bare", "quoted"), ("bare", "quoted", "tail")])

    def cell(value: str) -> str:
        way, quoted = draw.choice(ways), '"' + value.replace('"', '""') + '"'
        if set(value) & {delimiter, "\r", "\n"} or value.startswith('"') or way == "quoted" or not value:
            return quoted
        # Tab-separated files with such quotes quote nothing.
        return f"{quoted}tail" if way == "tail" and delimiter != "\t" else value

    end = draw.choice(["\n", "\r\n", "\r"])
    lines = [delimiter.join(["text", "label"]), *(f"{cell(t)}{delimiter}{cell(label)}" for t, label in rows)]
    blank = [""] * draw.choice([0, 0, 1, 3])
    return (end.join([*lines, *blank]) + draw.choice(["", end])).encode()
