"""A run's model measured on a real Ray cluster, by specs as `orchestrator evaluate` writes them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import locations
from orchestrator.architectures.families import model_config
from orchestrator.commands.evaluate import Options, evaluation, model_folder
from orchestrator.errors import Interrupted
from orchestrator.load_spec import parse_spec
from orchestrator.planning.base_fit import model_in
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.launch import launch
from orchestrator.scheduling.run_lifecycle import Listener, RunResult
from orchestrator.spec import ModelSpec
from orchestrator.tracking import store
from orchestrator.tracking.compare import collect
from orchestrator.tracking.finished_model import found_base, spec_behind
from tests.end_to_end import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_classification(tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def trained(ray_cluster: None, rows: Path) -> RunResult:
    changes = {"tracking__experiment": "measured", "training__learning_rate": 5e-3}
    return launch(runs.classification(rows, "to-be-measured", **changes), runs.listener())


def measured(model: str, data: Path, **options: Any) -> RunResult:
    folder = model_folder(found_base(model))
    block, chosen = model_in(folder), Options(model=model, data=str(data), **options)
    config = model_config(ModelSpec(**block))
    raw = evaluation(chosen, model=block, config=config, trained=spec_behind(Path(folder)))
    return launch(parse_spec(raw), runs.listener(), fresh=True)  # another number of workers is no other run


_ANY: dict[str, Any] = {"name": "any", "kind": "evaluate", "data": {"validation": "any"}}


def figures(result: RunResult) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if name.startswith("eval/") and "gap" not in name}


def test_a_runs_model_has_on_the_rows_that_it_held_out_the_figures_of_the_run(trained: RunResult, rows: Path) -> None:
    result = measured(f"runs:/{trained.mlflow_run_id}", rows / "rows.csv", split="held-out", workers=2)
    assert result.status == "finished"
    again = figures(result)
    assert again.pop("eval/weighted_f1") > 0
    assert again == pytest.approx(figures(trained), rel=1e-6)
    uri = locations.default_tracking_uri()
    assert result.mlflow_run_id is not None
    run = runs.mlflow_run(result.mlflow_run_id, uri=uri)
    tags = run.data.tags
    assert run.info.status == "FINISHED"
    assert (tags["orchestrator.kind"], tags["orchestrator.base_run_id"]) == ("evaluate", trained.mlflow_run_id)
    assert "orchestrator.model_path" not in tags
    before = runs.mlflow_run(str(trained.mlflow_run_id), uri=uri).data.tags
    assert tags["orchestrator.held_out_fingerprint"] == before["orchestrator.held_out_fingerprint"]
    kept = store.client(uri, create=False).download_artifacts(result.mlflow_run_id, "evaluation.json")
    assert json.loads(Path(kept).read_text()) == result.evaluation
    shown = {row.run_id: row for row in collect(uri, "measured")}
    assert shown[result.mlflow_run_id].quality == pytest.approx(result.metrics["eval/accuracy"])
    assert shown[result.mlflow_run_id].kind == "evaluate"


def test_three_workers_find_what_one_does_on_rows_that_they_cannot_share_evenly(
    trained: RunResult, rows: Path, tmp_path: Path
) -> None:
    lines = (rows / "rows.csv").read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join(lines[:54]) + "\n")  # 53 rows, 5 for each worker at a time
    one, three = (
        measured("runs:/measured/to-be-measured", tmp_path / "some.csv", workers=workers, batch=5) for workers in (1, 3)
    )
    assert one.evaluation is not None
    assert one.evaluation == three.evaluation
    assert sum(map(sum, one.evaluation["confusion"])) == one.evaluation["rows"] == 53
    assert figures(one) == pytest.approx(figures(three), rel=1e-6)


def test_a_measurement_that_is_stopped_says_so_and_begins_anew(trained: RunResult, rows: Path, tmp_path: Path) -> None:
    heading, *lines = (rows / "rows.csv").read_text().splitlines()
    (tmp_path / "many.csv").write_text("\n".join((heading, *lines * 400)) + "\n")
    values = {**_ANY, "name": "measured-in-part", "task": "text-classification", "resources": {"workers": 2}}
    values |= {"model": {"base": model_folder(str(trained.model_path))}}
    values |= {"data": {"validation": str(tmp_path / "many.csv"), "sequence_length": 16}}
    stop = threading.Event()

    def heard(progress: Mapping[str, Any]) -> None:
        if progress["step"]:
            stop.set()

    hears = Listener(watcher=Watcher(on_progress=heard, stop=stop), say=lambda text: None)
    with pytest.raises(Interrupted, match="stopped on the way") as error:
        launch(parse_spec({**values, "training": {"micro_batch": 1, "global_batch": 2}}), hears)
    assert "begins anew" in str(error.value.do)
