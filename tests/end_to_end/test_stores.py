"""One command whose data, models and runs lie in an S3 store, so that its machines need share nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import specs
from tests.end_to_end import runs
from tests.end_to_end.commands import Done, Place
from tests.s3 import BUCKET

pytestmark = pytest.mark.slow

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
STORE = f"s3://{BUCKET}"
STAGES = {
    "name": "chain",
    "model": {"config": "bert", "vocab_size": 300, "overrides": SMALL},
    "data": {"sequence_length": 32},
    "training": {"global_batch": 8, "learning_rate": 1e-3, "steps": 4},
    "resources": {"workers": 1},
    "checkpoint": {"storage": f"{STORE}/runs"},
    "stages": [
        {"name": "domain", "kind": "pretrain", "task": "masked-lm", "data": {"train": f"{STORE}/corpus"}},
        {
            "name": "classify",
            "kind": "finetune",
            "task": "text-classification",
            "data": {"train": f"{STORE}/rows/*.csv", "label_column": "label", "validation_fraction": 0.25},
        },
    ],
}


@pytest.fixture(scope="module")
def place(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a corpus and rows in the store, and nothing but the spec here."""
    place = Place(folder=tmp_path_factory.mktemp("stores"))
    rows = "".join(f"the model reads line {n} {'well' if n % 2 else 'badly'},{n % 2}\n" for n in range(64))
    s3.put_object(Bucket=BUCKET, Key="rows/all.csv", Body=f"text,label\n{rows}".encode())
    for file in specs.write_corpus(place.folder / "corpus").iterdir():
        s3.upload_file(str(file), BUCKET, f"corpus/{file.name}")
    place.spec.write_text(yaml.safe_dump(STAGES))
    return place


@pytest.fixture(scope="module")
def done(place: Place) -> Done:
    return place.run("run", str(place.spec), "--json")


def test_a_run_reads_its_data_from_the_store_and_keeps_its_checkpoints_there(done: Done) -> None:
    assert done.code == 0, done.err
    assert [stage["checkpoint"].partition("/runs/")[0] for stage in done.answer["stages"]] == [STORE, STORE]


def test_a_stage_begins_with_the_model_that_the_one_before_left_in_the_store(place: Place, done: Done) -> None:
    uri = f"sqlite:///{place.home / 'mlflow.db'}"
    domain, classify = (runs.mlflow_run(stage["mlflow_run_id"], uri=uri).data for stage in done.answer["stages"])
    folder = Path(domain.tags["orchestrator.model_path"]).parent.name
    assert domain.tags["orchestrator.model_uri"] == f"{STORE}/runs/{folder}/model"
    assert classify.params["model.base"] == f"{STORE}/runs/{folder}/model"


def test_a_model_of_the_store_is_measured_and_what_was_found_stays_there(s3: Any, place: Place, done: Done) -> None:
    model = f"runs:/{done.answer['stages'][1]['mlflow_run_id']}"
    data = ("--label-column", "label", f"checkpoint.storage={STORE}/runs", "name=measured")
    measured = place.run("evaluate", model, f"{STORE}/rows/*.csv", *data, "--json")
    assert measured.code == 0, measured.err
    assert sum(each["rows"] for each in measured.answer["evaluation"]["classes"]) == 64
    kept = s3.list_objects_v2(Bucket=BUCKET, Prefix="runs/measured-")["Contents"]
    names = {entry["Key"].partition("/outbox/")[0].rpartition("/")[2] for entry in kept}
    assert names >= {"evaluation.json", "outcome.json", "result.json"}


def test_another_machine_is_told_what_the_run_has_given(s3: Any, place: Place, done: Done, tmp_path: Path) -> None:
    """It has the spec, the store and an empty home; MLflow's store was the first machine's own."""
    elsewhere = Place(folder=tmp_path)
    told = elsewhere.run("plan", str(place.spec), "--json")
    assert told.code == 0, told.err
    assert told.answer["stages"][1]["steps"] == 4
