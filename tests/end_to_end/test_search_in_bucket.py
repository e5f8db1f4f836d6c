"""A search that is kept in a bucket, by commands on machines of their own: each has another home, the first is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import locations
from orchestrator.planning.hardware import local_cluster
from orchestrator.planning.plan import make_plan
from orchestrator.runs.budget_ledger import open_ledger
from orchestrator.samples.data_look import look
from orchestrator.scheduling.run_lifecycle import RunResult
from orchestrator.tracking import store
from tests.end_to_end import runs
from tests.end_to_end.commands import Place
from tests.s3 import BUCKET

pytestmark = pytest.mark.slow

ROOM = 26.5
"""Steps that the budget has room for: three trials of eight, and a part of a fourth."""


@pytest.fixture
def place(s3: Any, tmp_path: Path) -> Any:
    """A machine by its name: an empty home, and the same spec, data and MLflow as the others."""
    uri, data = f"sqlite:///{tmp_path / 'mlflow.db'}", runs.write_classification(tmp_path / "data")
    changes: dict[str, Any] = {
        "search": {
            "space": {"training.seed": {"grid": [0, 1, 2, 3]}},
            "scheduler": "none",
            "metric": "eval/loss",
            "max_concurrent": 1,
        },
        "checkpoint__storage": f"s3://{BUCKET}/{tmp_path.name}",
        "tracking__uri": uri,
    }
    plain = runs.classification(data, "in-a-bucket", **changes)
    counts = look(plain, cache=locations.home() / "cache" / "data").counts
    budget = f"{ROOM * make_plan(plain, local_cluster(), counts=counts).flops_per_step:.6e}flops"
    spec = plain.model_copy(update={"budget": budget})

    def machine(name: str) -> Place:
        found = Place(folder=tmp_path / name, environment={key: os.environ[key] for key in os.environ if "AWS" in key})
        found.folder.mkdir()
        found.spec.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude={"deepspeed"})))
        return found

    return machine


def children(result: RunResult, uri: str) -> dict[str, Any]:
    client = store.client(uri, create=False)
    parent = client.get_run(str(result.mlflow_run_id))
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.mlflow_run_id}'")
    assert len({run.info.run_name for run in found}) == len(found), "no trial has two runs"
    return {run.info.run_name: run for run in found}


def test_a_search_whose_driver_dies_goes_on_from_an_empty_machine_on_the_same_budget(
    place: Any, tmp_path: Path
) -> None:
    uri, first, second, third = f"sqlite:///{tmp_path / 'mlflow.db'}", *map(place, ("one", "two", "three"))
    with first.start("run", str(first.spec), "--json") as running:
        running.wait_for("trial 01 step 4")
        assert runs.end_of_driver(running.process) == []
    shutil.rmtree(first.home)

    done = second.run("run", str(second.spec), "--json")
    assert done.code == 0, done.err
    assert "trial 00 starts" not in done.err
    assert "trial 01 starts" in done.err
    result = RunResult(**{**done.answer, "notes": tuple(done.answer["notes"])})
    trials = children(result, uri)
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    curves = {name: list(runs.curve(run.info.run_id, "train/loss", uri=uri)) for name, run in trials.items()}
    assert curves == {**{name: list(range(1, 9)) for name in ("00", "01", "02")}, "03": [1, 2]}
    evaluated = {name: list(runs.curve(run.info.run_id, "eval/loss", uri=uri)) for name, run in trials.items()}
    assert evaluated == {**{name: [2, 4, 6, 8] for name in ("00", "01", "02")}, "03": [2]}
    reasons = {name: run.data.tags.get("orchestrator.stop_reason") for name, run in trials.items()}
    assert reasons == {"00": None, "01": None, "02": None, "03": "budget"}
    assert trials["01"].data.tags["orchestrator.attempt.2"] == "1 worker: started again"
    budget = float(yaml.safe_load(second.spec.read_text())["budget"].removesuffix("flops"))
    assert 0.85 * budget < sum(run.data.metrics["cost/flops"] for run in trials.values()) <= budget
    folder = Path(result.run_folder)
    ledger = open_ledger(folder / "ledger", f"s3://{BUCKET}/{tmp_path.name}/{folder.name}")
    entries = [ledger.entry(name) for name in trials]
    assert not any(entry is None or entry.running for entry in entries)
    assert not (folder / "ledger").exists()
    assert (Path(str(result.model_path)) / "model.safetensors").is_file()

    again = third.run("run", str(third.spec), "--json")
    assert again.code == 0, again.err
    assert "trial" not in again.err.replace("trials", "")
    told = {key: value for key, value in again.answer.items() if "path" not in key and "folder" not in key}
    for key in ("status", "metrics", "mlflow_run_id", "notes"):
        assert told[key] == done.answer[key]
    assert again.answer["best"]["mlflow_run_id"] == trials[again.answer["best"]["trial"]].info.run_id
    assert (Path(again.answer["model_path"]) / "model.safetensors").is_file()
    assert Path(again.answer["model_path"]).is_relative_to(third.home)
