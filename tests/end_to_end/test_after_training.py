"""The model that a training or a search leaves is measured once on `data.test`, on a real Ray cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.scheduling.launch import launch
from orchestrator.scheduling.run_lifecycle import RunResult
from orchestrator.spec import RunSpec
from orchestrator.tracking import store
from tests.end_to_end import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_classification(tmp_path_factory.mktemp("tested"))
    header, *lines = (folder / "rows.csv").read_text().splitlines()
    (folder / "test.csv").write_text("\n".join([header, *lines[:37]]) + "\n")
    return folder


def training(rows: Path, name: str = "to-be-tested", **changes: Any) -> RunSpec:
    values = {"data__test": str(rows / "test.csv"), "tracking__experiment": "tested", "training__learning_rate": 5e-3}
    return runs.classification(rows, name, **{**values, **changes})


@pytest.fixture(scope="module")
def tested(ray_cluster: None, rows: Path) -> RunResult:
    return launch(training(rows), runs.listener())


def of_the_test(result: RunResult) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if name.startswith("test/")}


def test_the_figures_are_those_of_the_model_that_is_left(tested: RunResult, rows: Path) -> None:
    import csv

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert tested.model_path is not None
    model = AutoModelForSequenceClassification.from_pretrained(tested.model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tested.model_path)
    with (rows / "test.csv").open() as stream:
        asked = list(csv.DictReader(stream))
    right = 0
    for row in asked:
        with torch.no_grad():
            found = model(**tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")).logits
        right += model.config.id2label[int(found.argmax())] == row["label"]
    assert tested.status == "finished"
    assert of_the_test(tested)["test/accuracy"] == pytest.approx(right / len(asked))
    assert tested.evaluation is not None
    assert tested.evaluation["rows"] == 37


def test_they_are_the_trainings_own_in_mlflow_beside_a_file_with_every_class(tested: RunResult) -> None:
    uri = locations.default_tracking_uri()
    run = runs.mlflow_run(str(tested.mlflow_run_id), uri=uri)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/accuracy"] == of_the_test(tested)["test/accuracy"]
    kept = store.client(uri, create=False).download_artifacts(str(tested.mlflow_run_id), "test.json")
    assert json.loads(Path(kept).read_text()) == tested.evaluation


def test_the_same_command_answers_at_once_and_another_test_set_alone_is_measured_anew(
    tested: RunResult, rows: Path
) -> None:
    no_ray = replace(runs.listener(), connected=lambda: pytest.fail("Ray was started"))
    again = launch(training(rows), no_ray)
    assert again.metrics == tested.metrics
    header, *lines = (rows / "rows.csv").read_text().splitlines()
    (rows / "more.csv").write_text("\n".join([header, *lines[20:43]]) + "\n")
    said: list[str] = []
    other = launch(training(rows, data__test=str(rows / "more.csv")), runs.listener(said=said))
    assert other.evaluation is not None
    assert other.evaluation["rows"] == 23
    assert other.run_folder == tested.run_folder, "the training is the same"
    assert any("already finished" in line for line in said)


def test_of_a_search_the_best_trials_model_is_measured(ray_cluster: None, rows: Path) -> None:
    search = {"space": {"training.learning_rate": {"grid": [1e-5, 5e-3]}}, "scheduler": "none"}
    found = launch(training(rows, name="search-to-be-tested", search=search), runs.listener())
    assert found.best is not None
    assert found.evaluation is not None
    assert found.evaluation["rows"] == 37
    assert found.model_path == str(Path(found.best["run_folder"]) / "model")
    uri = locations.default_tracking_uri()
    kept = runs.mlflow_run(str(found.mlflow_run_id), uri=uri).data.metrics
    assert kept["test/accuracy"] == of_the_test(found)["test/accuracy"]
