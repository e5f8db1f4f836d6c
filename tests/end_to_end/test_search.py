"""A search on a real Ray cluster: its trials in MLflow, how they are stopped, and what a death costs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import locations
from orchestrator.errors import ClusterError, Interrupted
from orchestrator.planning.hardware import local_cluster
from orchestrator.planning.plan import make_plan
from orchestrator.runs.budget_ledger import Ledger
from orchestrator.samples.data_look import look
from orchestrator.scheduling import launch as launching
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.launch import launch
from orchestrator.scheduling.run_lifecycle import Listener, RunResult
from orchestrator.scheduling.search.trial import ending_of
from orchestrator.spec import RunSpec
from orchestrator.tracking import store
from tests import specs
from tests.end_to_end import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

GRID = {
    "training.learning_rate": {"grid": [1e-4, 1.0, 3.0, 10.0]},
    "training.warmup_fraction": {"uniform": [0.0, 0.2]},
}
"""One that learns and three that diverge, in this order, because ASHA compares with what it has seen."""
FOUR_SEEDS = {"training.seed": {"grid": [0, 1, 2, 3]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_classification(tmp_path_factory.mktemp("reviews"))


def search(folder: Path, name: str, space: dict[str, Any], **changes: Any) -> RunSpec:
    block = {"space": space, "scheduler": "none", "metric": "eval/loss", **changes.pop("search", {})}
    return runs.classification(folder, name, search=block, **changes)


@pytest.fixture(scope="module")
def pruned(folder: Path, ray_cluster: None) -> RunResult:
    """Grid x random under ASHA, one trial at a time so that the order is sure."""
    asha = {"scheduler": "asha", "grace_steps": 2, "reduction_factor": 2, "max_concurrent": 1}
    return launch(search(folder, "asha", GRID, search=asha), runs.listener())


def children(result: RunResult) -> dict[str, Any]:
    """Name to nested MLflow run."""
    client = store.client(locations.default_tracking_uri(), create=False)
    parent = client.get_run(str(result.mlflow_run_id))
    found = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.mlflow_run_id}'")
    return {run.info.run_name: run for run in found}


def steps(run: Any, metric: str = "train/loss") -> list[int]:
    return list(runs.curve(run.info.run_id, metric, uri=locations.default_tracking_uri()))


def trial_actors() -> list[dict[str, Any]]:
    import ray

    return [actor for actor in ray._private.state.actors().values() if "trial_main" in actor["ActorClassName"]]


def test_every_trial_is_a_nested_run_that_says_how_it_ended(pruned: RunResult) -> None:
    trials = children(pruned)
    assert sorted(trials) == ["00", "01", "02", "03"]
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    reasons = Counter(run.data.tags.get("orchestrator.stop_reason", "came to its end") for run in trials.values())
    assert reasons["pruned"] >= 1
    assert reasons["came to its end"] >= 1
    assert sum(reasons.values()) == 4


def test_trials_with_unequal_evaluations_are_compared_at_the_same_steps(folder: Path) -> None:
    rates = {
        rate: {"training.eval_every_steps": {"grid": [every]}} for rate, every in ((3.0, 2), (1e-4, 5), (10.0, 1000))
    }
    space = {"training.learning_rate": {"grid": rates}}
    asha = {"scheduler": "asha", "reduction_factor": 2, "max_concurrent": 1}
    result = launch(search(folder, "unequal", space, search=asha), runs.listener())
    assert {name: steps(run, "eval/loss") for name, run in children(result).items()} == {
        "00": [2, 4, 6, 8],
        "01": [2, 4, 5, 8],
        "02": [2],
    }
    assert stop_reasons(result) == {"00": None, "01": None, "02": "pruned"}
    assert result.best is not None
    assert result.best["trial"] == "01"


def test_of_two_vocabularies_the_one_better_in_bits_per_byte_wins(tmp_path: Path) -> None:
    corpus = specs.write_corpus(tmp_path / "corpus")
    block = {"space": {"model.vocab_size": {"grid": [260, 3000]}}, "scheduler": "none"}
    changes = {"search": block, "training__steps": 3, "training__eval_every_steps": 2, "resources__workers": 1}
    result = launch(runs.pretraining(corpus, "vocabularies", **changes), runs.listener())
    figures = {name: run.data.metrics for name, run in children(result).items()}
    assert figures["00"]["eval/loss"] < figures["01"]["eval/loss"], "short tokens are easier to predict"
    assert figures["00"]["eval/bits_per_byte"] > figures["01"]["eval/bits_per_byte"]
    assert result.best is not None
    assert result.best["trial"] == "01"
    assert result.metrics["eval/bits_per_byte"] == figures["01"]["eval/bits_per_byte"]


def test_a_pruned_trial_is_really_stopped(pruned: RunResult) -> None:
    for run in children(pruned).values():
        logged = steps(run)
        if run.data.tags.get("orchestrator.stop_reason") == "pruned":
            assert logged == list(range(1, int(run.data.tags["orchestrator.stopped_at_step"]) + 1))
            assert len(logged) < 8
        else:
            assert logged == list(range(1, 9))


def test_only_models_are_left_of_the_weights_of_best_evaluations(pruned: RunResult) -> None:
    assert list(Path(pruned.run_folder).rglob("best")) == []


def test_the_parent_carries_the_best_trials_figures(pruned: RunResult) -> None:
    assert pruned.best is not None
    parent = store.client(locations.default_tracking_uri(), create=False).get_run(str(pruned.mlflow_run_id))
    best = children(pruned)[pruned.best["trial"]]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["eval/loss"] == best.data.metrics["eval/loss"] == pruned.metrics["eval/loss"]
    ended = [r for r in children(pruned).values() if "orchestrator.stop_reason" not in r.data.tags]
    assert best.data.metrics["eval/loss"] == min(run.data.metrics["eval/loss"] for run in ended)
    spent = sum(run.data.metrics["cost/flops"] for run in children(pruned).values())
    assert parent.data.metrics["cost/flops"] == pytest.approx(spent)


def test_the_best_model_loads(pruned: RunResult) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(str(pruned.model_path))
    AutoTokenizer.from_pretrained(str(pruned.model_path))
    assert model.config.num_labels == 2


def test_a_finished_search_answers_the_same_at_once(pruned: RunResult, folder: Path) -> None:
    said: list[str] = []
    asha = {"scheduler": "asha", "grace_steps": 2, "reduction_factor": 2, "max_concurrent": 1}
    assert launch(search(folder, "asha", GRID, search=asha), runs.listener(said=said)) == pruned
    assert any("already finished" in line for line in said)
    assert not any(line.startswith("trial") for line in said)


def test_trials_at_a_time_are_what_the_cluster_holds_and_reuse_its_processes(folder: Path) -> None:
    before = {actor["ActorID"] for actor in trial_actors()}
    said: list[str] = []
    space = {"training.seed": {"grid": list(range(6))}}
    launch(search(folder, "concurrent", space, resources__cpus_per_worker=2), runs.listener(said=said))
    running = most = 0
    for line in said:
        running += ("starts" in line) - ("finished at" in line)
        most = max(most, running)
    assert most == 2
    started = [actor for actor in trial_actors() if actor["ActorID"] not in before]
    assert len(started) < 6
    assert runs.leftovers() == {}


@pytest.fixture(scope="module")
def broken_base(folder: Path) -> str:
    """A base model with an activation that transformers lacks, which nobody sees before a trial builds it."""
    broken = folder / "broken"
    shutil.copytree(folder / "base", broken)
    config = broken / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "no-such-activation"}))
    return str(broken)


def test_a_failing_trial_does_not_end_the_others_and_is_tried_again(folder: Path, broken_base: str) -> None:
    space = {"training.seed": {"grid": [0, 1]}, "model.base": {"grid": [str(folder / "base"), broken_base]}}
    spec = search(folder, "one-fails", space)
    result = launch(spec, runs.listener())
    assert result.status == "finished"
    assert "2 of 4 trials failed" in result.notes[0]
    statuses = {name: run.info.status for name, run in children(result).items()}
    assert statuses == {"00": "FINISHED", "01": "FAILED", "02": "FINISHED", "03": "FAILED"}
    assert "cannot be loaded" in children(result)["01"].data.tags["orchestrator.error"]
    said: list[str] = []
    again = launch(spec, runs.listener(said=said))
    assert again.best == result.best
    assert sum("starts" in line for line in said) == 2


def test_a_search_whose_trials_all_fail_says_why(folder: Path, broken_base: str) -> None:
    spec = search(folder, "all-fail", {"training.seed": {"grid": [0, 1]}}, model__base=broken_base)
    with pytest.raises(ClusterError, match=r"no trial .* came to its end(.|\n)*cannot be loaded"):
        launch(spec, runs.listener())
    folder = next((locations.home() / "runs").glob("all-fail-*"))
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert runs.mlflow_run(run_id, uri=locations.default_tracking_uri()).info.status == "FAILED"


def test_a_trial_whose_process_dies_goes_on_in_another(folder: Path) -> None:
    killed: list[int] = []

    def hear(line: str) -> None:
        said.append(line)
        if "step 2:" in line and not killed:
            trial = runs.processes_named("ImplicitFunc")[-1]
            killed.append(trial.pid)
            runs.kill(trial)

    said: list[str] = []
    spec = search(folder, "a-death", {"training.seed": {"grid": [0]}}, training__steps=60)
    result = launch(spec, Listener(watcher=Watcher(), say=hear))
    assert killed
    assert any("goes on in another" in line for line in said)
    (run,) = children(result).values()
    assert run.info.status == "FINISHED"
    assert steps(run) == list(range(1, 61))
    attempts = {name: tag for name, tag in run.data.tags.items() if "attempt" in name}
    assert attempts == {
        "orchestrator.attempt.1": "1 worker: first start",
        "orchestrator.attempt.2": "1 worker: started again",
    }


def test_trials_of_two_workers_do_not_starve_each_other(folder: Path) -> None:
    asha = {"scheduler": "asha", "grace_steps": 2, "reduction_factor": 2}
    spec = search(folder, "nested", GRID, search=asha, resources__workers=2)
    result = launch(spec, runs.listener())
    trials = children(result)
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    for run in trials.values():
        if run.data.tags.get("orchestrator.stop_reason") != "pruned":
            assert steps(run) == list(range(1, 9))
    assert runs.leftovers() == {}


def test_a_search_that_is_stopped_goes_on_with_what_had_not_ended(folder: Path) -> None:
    watcher = Watcher(stop=threading.Event())
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if "finished at" in line:
            watcher.stop.set()

    space = {"training.seed": {"grid": [0, 1, 2]}}
    spec = search(folder, "stopped", space, search={"max_concurrent": 1})
    with pytest.raises(Interrupted):
        launch(spec, Listener(watcher=watcher, say=hear))
    base = next((locations.home() / "runs").glob("stopped-*"))
    run = runs.mlflow_run(
        json.loads((base / "mlflow.json").read_text())["run_id"], uri=locations.default_tracking_uri()
    )
    assert run.info.status == "KILLED"
    ended = [trial.name for trial in (base / "trials").iterdir() if ending_of(trial) is not None]
    assert 1 <= len(ended) < 3
    said.clear()
    result = launch(spec, runs.listener(said=said))
    assert sum("starts" in line for line in said) == 3 - len(ended)
    assert result.mlflow_run_id == run.info.run_id
    assert {trial.info.status for trial in children(result).values()} == {"FINISHED"}
    assert all(steps(trial) == list(range(1, 9)) for trial in children(result).values())


def test_a_search_stopped_at_a_rung_goes_on_to_decide_as_if_it_had_not_been(pruned: RunResult, folder: Path) -> None:
    watcher = Watcher(stop=threading.Event())

    def hear(line: str) -> None:
        if line.startswith("trial 01 step 2"):
            watcher.stop.set()

    asha = {"scheduler": "asha", "grace_steps": 2, "reduction_factor": 2, "max_concurrent": 1}
    spec = search(folder, "asha-stopped", GRID, search=asha)
    with pytest.raises(Interrupted):
        launch(spec, Listener(watcher=watcher, say=hear))
    result = launch(spec, runs.listener())
    assert stop_reasons(result) == stop_reasons(pruned)
    assert result.best is not None
    assert pruned.best is not None
    assert result.best["trial"] == pruned.best["trial"]
    assert at_rungs(result) == at_rungs(pruned)


def at_rungs(result: RunResult) -> dict[str, Any]:
    """What each trial had at each rung, and what was decided."""
    found: dict[str, Any] = json.loads((Path(result.run_folder) / "rungs.json").read_text())
    return found


def test_a_driver_killed_between_a_trials_end_and_its_closing_leaves_no_run_open(folder: Path) -> None:
    spec = search(folder, "half-closed", {"training.seed": {"grid": [0, 1]}}, training__steps=2)
    first = launch(spec, runs.listener())
    base, mlflow = Path(first.run_folder), store.client(locations.default_tracking_uri(), create=False)
    (base / "result.json").unlink()
    (base / "trials" / "00" / "outbox" / "confirmed.json").unlink()
    before = children(first)
    mlflow.update_run(before["00"].info.run_id, status="RUNNING")
    after = children(launch(spec, runs.listener()))
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert after["01"].info.end_time == before["01"].info.end_time


def test_a_killed_driver_is_followed_by_the_same_command_on_the_same_budget(folder: Path, tmp_path: Path) -> None:
    budget = of_steps(folder, 26.5)  # three trials of eight steps, and a part of a fourth
    spec = search(folder, "search-driver-death", FOUR_SEEDS, budget=budget, search={"max_concurrent": 1})
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude={"deepspeed"})))
    command = [sys.executable, "-m", "orchestrator", "run", str(file), "--json"]
    with (tmp_path / "first.log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)

    def one_has_ended() -> bool:
        assert driver.poll() is None, (tmp_path / "first.log").read_text()
        return any((locations.home() / "runs").glob("search-driver-death-*/trials/*/ending.json"))

    runs.wait_until(one_has_ended, within_s=90)
    assert runs.end_of_driver(driver) == []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "trial 00 starts" not in done.stderr
    assert "trial 03 starts" in done.stderr
    result = RunResult(**json.loads(done.stdout))
    trials = children(result)
    assert {run.info.status for run in trials.values()} == {"FINISHED"}
    (held_out,) = {run.data.tags["orchestrator.held_out_fingerprint"] for run in trials.values()}
    assert f"fingerprint {held_out}" in done.stderr, "the same rows for every seed of a training"
    assert all(steps(trials[name]) == list(range(1, 9)) for name in ("00", "01", "02"))
    assert result.status == "stopped_by_budget"
    assert stop_reasons(result) == {"00": None, "01": None, "02": None, "03": "budget"}
    assert spent(result, "cost/flops") <= float(budget.removesuffix("flops"))


# -- one budget for all trials -------------------------------------------------------------------------------------


def of_steps(folder: Path, steps: float) -> str:
    """A budget of so many steps: all batches here are equally wide."""
    spec = runs.classification(folder, "any")
    counts = look(spec, cache=locations.home() / "cache" / "data").counts
    one = make_plan(spec, local_cluster(), counts=counts).flops_per_step
    return f"{steps * one:.6e}flops"


def spent(result: RunResult, metric: str) -> float:
    return sum(run.data.metrics.get(metric, 0.0) for run in children(result).values())


def stop_reasons(result: RunResult) -> dict[str, str | None]:
    return {name: run.data.tags.get("orchestrator.stop_reason") for name, run in children(result).items()}


@pytest.fixture(scope="module")
def over_budget(folder: Path, ray_cluster: None) -> tuple[RunSpec, RunResult]:
    """Room for two trials and a part of a third; none for a fourth."""
    spec = search(folder, "one-budget", FOUR_SEEDS, budget=of_steps(folder, 19.5), search={"max_concurrent": 1})
    return spec, launch(spec, runs.listener())


def test_trials_spend_one_budget_and_what_is_left_undone_is_said(
    over_budget: tuple[RunSpec, RunResult], folder: Path
) -> None:
    _, result = over_budget
    assert result.status == "stopped_by_budget"
    assert stop_reasons(result) == {"00": None, "01": None, "02": "budget"}
    assert {run.info.status for run in children(result).values()} == {"FINISHED"}
    amount = float(of_steps(folder, 19.5).removesuffix("flops"))
    assert 0.85 * amount < spent(result, "cost/flops") <= amount
    (note,) = result.notes
    assert "1 of 4 trials stopped before their end (02 at step 3 of 8)" in note
    assert "1 of 4 trials not started (03)" in note


def test_a_trial_that_the_budget_stops_is_evaluated_and_leaves_checkpoint_and_model(
    over_budget: tuple[RunSpec, RunResult],
) -> None:
    from transformers import AutoModelForSequenceClassification

    trials = Path(over_budget[1].run_folder) / "trials"
    assert [path.name for path in (trials / "02" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (trials / "01" / "checkpoints").exists(), "one that came to its end needs only its model"
    AutoModelForSequenceClassification.from_pretrained(trials / "02" / "model")
    assert list(runs.curve(run_id_of(trials / "02"), "eval/loss", uri=locations.default_tracking_uri())) == [2, 3]


def run_id_of(folder: Path) -> str:
    return str(json.loads((folder / "mlflow.json").read_text())["run_id"])


def test_a_spent_budget_answers_the_same_at_once_and_a_larger_one_goes_on(
    over_budget: tuple[RunSpec, RunResult], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, result = over_budget
    with monkeypatch.context() as patch:
        patch.setattr(launching, "ray_session", lambda: pytest.fail("Ray was asked for"))
        assert launch(spec, runs.listener()) == result
        smaller = spec.model_copy(update={"budget": of_steps(folder, 3)})
        assert launch(smaller, runs.listener()) == result
    said: list[str] = []
    larger = launch(spec.model_copy(update={"budget": of_steps(folder, 100)}), runs.listener(said=said))
    assert larger.status == "finished"
    assert larger.mlflow_run_id == result.mlflow_run_id
    assert [line.split(":")[0] for line in said if "starts" in line] == ["trial 02 starts", "trial 03 starts"]
    assert stop_reasons(larger) == dict.fromkeys(["00", "01", "02", "03"])
    assert all(steps(run) == list(range(1, 9)) for run in children(larger).values())


def test_pruned_trials_give_back_what_they_did_not_need(pruned: RunResult, folder: Path) -> None:
    asha = {"scheduler": "asha", "grace_steps": 2, "reduction_factor": 2, "max_concurrent": 1}
    room = spent(pruned, "cost/flops") + float(of_steps(folder, 2).removesuffix("flops"))
    result = launch(search(folder, "asha-budget", GRID, search=asha, budget=f"{room:.6e}flops"), runs.listener())
    assert result.status == "finished"
    assert stop_reasons(result) == stop_reasons(pruned)


def test_trials_beside_each_other_keep_a_budget_of_device_hours(folder: Path) -> None:
    """Two at a time of one worker: forty seconds, with what their processes take to start."""
    allowed_s = 80.0
    spec = search(
        folder,
        "device-hours",
        {"training.seed": {"grid": [0, 1, 2]}},
        training__steps=100_000,
        training__eval_every_steps=100_000,
        budget=f"{allowed_s / 3600:.9f}gpu-hours",
        search={"max_concurrent": 2},
    )
    result = launch(spec, runs.listener())
    assert result.status == "stopped_by_budget"
    # What the first two give back as they close may be enough for the third to begin.
    started = re.match(r".*: ([23]) of 3 trials stopped", result.notes[0])
    assert started is not None, result.notes[0]
    assert (started[1] == "2") == ("1 of 3 trials not started (02)" in result.notes[0])
    assert all(len(steps(run)) > 1 for run in children(result).values())
    ledger = Ledger(Path(result.run_folder) / "ledger")
    entries = [entry for name in ("00", "01", "02") if (entry := ledger.entry(name)) is not None]
    assert not any(entry.running for entry in entries)
    assert 0.7 * allowed_s < sum(entry.spent.gpu_hours for entry in entries) * 3600 <= allowed_s
