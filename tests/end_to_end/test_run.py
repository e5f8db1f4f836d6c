"""One training on a real Ray cluster: what it leaves, and what becomes of it when its processes are killed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import locations
from orchestrator.errors import TransientError
from orchestrator.runs.attempts import Attempts
from orchestrator.scheduling import launch as launching
from orchestrator.scheduling.launch import launch
from orchestrator.scheduling.run_lifecycle import RunResult
from orchestrator.tracking import store
from tests import specs
from tests.end_to_end import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ALL_STEPS = list(range(1, runs.STEPS + 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return specs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, ray_cluster: None) -> RunResult:
    """A run that nobody disturbed."""
    return launch(runs.pretraining(corpus, "undisturbed"), runs.listener())


def curve(result: RunResult, metric: str) -> dict[int, float]:
    assert result.mlflow_run_id is not None
    return runs.curve(result.mlflow_run_id, metric, uri=locations.default_tracking_uri())


def mlflow_run(result: RunResult) -> Any:
    return runs.mlflow_run(str(result.mlflow_run_id), uri=locations.default_tracking_uri())


def test_a_training_on_two_workers_ends_with_checkpoint_and_model(finished: RunResult) -> None:
    assert finished.status == "finished"
    assert finished.restarts == 0
    assert Path(str(finished.checkpoint)).name == f"step-{runs.STEPS:08d}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in Path(str(finished.model_path)).iterdir()
    }
    assert finished.metrics["eval/loss"] < curve(finished, "eval/loss")[40]


def test_a_run_costs_from_when_its_workers_were_asked_for(finished: RunResult) -> None:
    folder = Path(finished.run_folder) / "attempts"
    started_s = json.loads((folder / "0001.json").read_text())["started_s"]
    ended_s = json.loads((folder / "0001.ended.json").read_text())["ended_s"]
    first_s, whole_s = (
        3600 / 2 * cost for cost in (curve(finished, "cost/gpu_hours")[1], finished.metrics["cost/gpu_hours"])
    )
    assert 2 < first_s < whole_s <= ended_s - started_s, "two processes that load DeepSpeed, then a step"


@pytest.mark.parametrize("metric", runs.STEP_METRICS)
def test_every_step_is_in_mlflow_once(finished: RunResult, metric: str) -> None:
    assert list(curve(finished, metric)) == ALL_STEPS


@pytest.mark.parametrize("metric", ["eval/loss", "eval/perplexity"])
def test_every_evaluation_is_in_mlflow_once(finished: RunResult, metric: str) -> None:
    assert list(curve(finished, metric)) == [40, 80, 100]


def test_the_mlflow_run_says_what_was_run_on_what(finished: RunResult) -> None:
    run = mlflow_run(finished)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.params["plan.zero_stage"] == "2"
    tags = run.data.tags
    assert tags["orchestrator.data_fingerprint"]
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["orchestrator.restarts"] == "0"
    client = store.client(locations.default_tracking_uri(), create=False)
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"plan.json", "spec.yaml"}


def test_nothing_of_a_run_is_left_in_the_cluster_or_of_ray_in_its_folder(finished: RunResult) -> None:
    assert runs.leftovers() == {}
    assert sorted(path.name for path in Path(finished.run_folder).iterdir()) == [
        "attempts",
        "checkpoints",
        "identity.json",
        "mlflow.json",
        "model",
        "outbox",
        "outcome.json",
        "result.json",
    ]


def test_the_same_command_answers_the_same_at_once(finished: RunResult, corpus: Path) -> None:
    said: list[str] = []
    before = mlflow_run(finished).info.end_time
    again = launch(runs.pretraining(corpus, "undisturbed"), runs.listener(said=said))
    assert again == dataclasses.replace(finished)
    assert any("already finished" in line for line in said)
    assert mlflow_run(finished).info.end_time == before


def test_fresh_starts_anew_in_a_new_mlflow_run(corpus: Path) -> None:
    short = runs.pretraining(corpus, "twice", training__steps=2)
    first = launch(short, runs.listener())
    second = launch(short, runs.listener(), fresh=True)
    assert second.run_folder == first.run_folder
    assert second.mlflow_run_id != first.mlflow_run_id
    assert list(curve(second, "train/loss")) == [1, 2]


def test_a_killed_worker_costs_nothing_but_time(finished: RunResult, corpus: Path) -> None:
    killed: list[int] = []

    def kill_one(progress: Mapping[str, Any]) -> None:
        if not killed and 15 <= progress["step"] < runs.STEPS:
            worker = runs.processes_named("RayTrainWorker")[-1]
            killed.append(worker.pid)
            runs.kill(worker)

    said: list[str] = []
    result = launch(runs.pretraining(corpus, "one-death"), runs.listener(kill_one, said=said))
    assert killed
    assert result.status == "finished"
    assert result.restarts == 1
    assert sum("attempt 2 of 4" in line for line in said) == 1
    assert curve(result, "train/loss") == curve(finished, "train/loss")
    assert curve(result, "eval/loss") == curve(finished, "eval/loss")
    assert mlflow_run(result).data.tags["orchestrator.restarts"] == "1"
    held = Attempts(Path(result.run_folder)).held()
    assert 0.7 * held.device_seconds < 3600 * result.metrics["cost/gpu_hours"] <= held.device_seconds, "both starts"


def test_a_budget_holds_through_a_death_and_a_larger_one_goes_on(
    finished: RunResult, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    def kill_one(progress: Mapping[str, Any]) -> None:
        if not killed and progress["step"] >= 15:
            worker = runs.processes_named("RayTrainWorker")[-1]
            killed.append(worker.pid)
            runs.kill(worker)

    one = curve(finished, "cost/flops")[1]
    spec = runs.pretraining(corpus, "budget-death", budget=f"{50.5 * one:.6e}flops")
    result = launch(spec, runs.listener(kill_one))
    assert killed
    assert result.restarts == 1
    assert result.status == "stopped_by_budget"
    assert Path(str(result.checkpoint)).name == "step-00000050"
    assert list(curve(result, "eval/loss")) == [40, 50]
    assert mlflow_run(result).data.tags["orchestrator.stop_reason"] == "budget"
    with monkeypatch.context() as patch:
        patch.setattr(launching, "ray_session", lambda: pytest.fail("Ray was asked for"))
        assert launch(spec, runs.listener()) == result
        smaller = spec.model_copy(update={"budget": f"{10 * one:.6e}flops"})
        assert launch(smaller, runs.listener()) == result
    larger = launch(spec.model_copy(update={"budget": f"{200 * one:.6e}flops"}), runs.listener())
    assert larger.status == "finished"
    assert larger.mlflow_run_id == result.mlflow_run_id
    assert curve(larger, "train/loss") == curve(finished, "train/loss")
    assert "orchestrator.stop_reason" not in mlflow_run(larger).data.tags


def test_workers_that_die_every_time_end_the_run_with_the_reason(corpus: Path) -> None:
    def kill_all(progress: Mapping[str, Any]) -> None:
        for worker in runs.processes_named("RayTrainWorker"):
            runs.kill(worker)

    spec = runs.pretraining(corpus, "many-deaths", resources__max_failures=1, checkpoint__every_steps=None)
    with pytest.raises(TransientError, match=r"worker.* died") as caught:
        launch(spec, runs.listener(kill_all))
    assert caught.value.exit_code == 1
    folder = next((locations.home() / "runs").glob("many-deaths-*"))
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    run = runs.mlflow_run(run_id, uri=locations.default_tracking_uri())
    assert run.info.status == "FAILED"
    assert "died" in run.data.tags["orchestrator.error"]
    assert runs.leftovers() == {}


def test_a_killed_driver_is_followed_by_the_same_command(finished: RunResult, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    spec = runs.pretraining(corpus, "driver-death")
    file.write_text(
        yaml.safe_dump(spec.model_dump(mode="json", exclude={"deepspeed"}) | {"deepspeed": {"zero_stage": 2}})
    )
    command = [sys.executable, "-m", "orchestrator", "run", str(file), "--json"]
    with (tmp_path / "first.log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
    points = locations.home() / "runs"

    def has_reached_step_30() -> bool:
        assert driver.poll() is None, (tmp_path / "first.log").read_text()
        return any('"step": 30,' in f.read_text() for f in points.glob("driver-death-*/outbox/a*.jsonl"))

    runs.wait_until(has_reached_step_30, within_s=90)
    assert runs.end_of_driver(driver) == []
    run_id = json.loads(next(points.glob("driver-death-*/mlflow.json")).read_text())["run_id"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = RunResult(**json.loads(done.stdout))
    assert result.mlflow_run_id == run_id
    assert curve(result, "train/loss") == curve(finished, "train/loss")
    assert mlflow_run(result).info.status == "FINISHED"
