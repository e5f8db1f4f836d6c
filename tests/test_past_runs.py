from __future__ import annotations

import socket
import uuid
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError, StorageError
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import DatasetCounts, RunPlan
from orchestrator.policy.corrections import History, corrections
from orchestrator.spec import RunSpec
from orchestrator.tracking.description import described
from orchestrator.tracking.past_runs import read_history
from orchestrator.worker.measurement import Pace, figures
from tests import specs
from tests.mlflow_runs import closed, log, new_store, opened
from tests.training_runs import CLUSTER

pytestmark = pytest.mark.slow

COUNTS = DatasetCounts(train_samples=900, train_tokens=28_800, validation_samples=100, vocab_size=512)
SPEC = specs.spec(specs.PRETRAIN, resources__workers=2)


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return new_store(tmp_path)


def planned(spec: RunSpec = SPEC) -> RunPlan:
    return make_plan(spec, CLUSTER, counts=COUNTS)


def run(
    uri: str,
    folder: Path,
    metrics: dict[str, float],
    *,
    status: str = "finished",
    experiment: str = "runs",
    diverged: bool = False,
    without: str | None = None,
    **tags: str,
) -> str:
    """A run with some figures in the store; its id."""
    run_folder = folder / uuid.uuid4().hex
    fingerprints = {"data_fingerprint": "abc", "tokenizer_fingerprint": "def"}
    what = described(SPEC, planned(), held_out=specs.HELD_OUT, run_folder=run_folder, **fingerprints)
    own = {**what.tags} | {f"orchestrator.{key}": tags[key] for key in tags}
    params = {key: value for key, value in what.params.items() if key != without}
    tracker = opened(
        uri, run_folder, experiment=experiment, name=SPEC.name, tags=own, params=params, artifacts=what.artifacts
    )
    log(tracker, run_folder, metrics, step=6)
    if diverged:
        log(tracker, run_folder, {"eval/loss": float("nan")}, step=7, attempt=2, resumed_from=6)
    if status != "running":
        return closed(tracker, status=status)
    run_id = tracker.ship().run_id
    assert run_id is not None
    return run_id


def measured(spec: RunSpec = SPEC, *, speed: float = 1.0) -> dict[str, float]:
    """What the loop logs at the end of a run whose steps went at `speed` times the predicted pace."""
    plan, pace = planned(spec), Pace()
    for _ in range(15):
        pace.add_step(seconds=1.0, tokens=plan.tokens_per_step)
    found = figures(plan, pace, counts=COUNTS, step=6, gpu_hours=0.01, peak_gib=0.75)
    found["measured/tokens_per_second"] = speed * found["predicted/tokens_per_second"]
    return found | {"eval/loss": 3.25, "train/tokens": 1536.0}


def finished(uri: str, folder: Path, *, experiment: str = "runs", **figures: Any) -> str:
    return run(uri, folder, measured(**figures), experiment=experiment)


def test_a_finished_run_comes_back_as_it_was_planned_and_measured(uri: str, tmp_path: Path) -> None:
    run_id = finished(uri, tmp_path, speed=0.5)
    (record,) = read_history(uri).records
    plan = planned()
    assert record.run_id == run_id
    assert (record.kind, record.method, record.task, record.name) == ("pretrain", "full", "causal-lm", "tiny")
    assert (record.device_name, record.workers, record.precision) == ("cpu", 2, plan.precision)
    assert (record.parameters, record.trainable_parameters) == (plan.parameters, plan.trainable_parameters)
    assert (record.tokens_per_step, record.flops_per_step) == (plan.tokens_per_step, plan.flops_per_step)
    assert (record.steps, record.measured_steps, record.sequence_length) == (6, 12, 32)
    assert record.measured_tokens_per_second == pytest.approx(0.5 * record.predicted_tokens_per_second)
    assert (record.predicted_peak_gib, record.measured_peak_gib) == (pytest.approx(plan.peak_gib.mid), 0.75)
    assert (record.train_samples, record.train_tokens, record.tokens_seen) == (900, 28_800, 1536)
    assert (record.base_model, record.data_source, record.data_fingerprint) == (None, "corpus", "abc")
    assert (record.eval_loss, record.eval_accuracy) == (3.25, None)


def test_runs_of_all_experiments_correct_the_throughput(uri: str, tmp_path: Path) -> None:
    for number in range(5):
        finished(uri, tmp_path, experiment=f"experiment-{number % 2}", speed=0.6)
    history = read_history(uri)
    assert (len(history.records), history.passed_over) == (5, 0)
    found = corrections(history.records).throughput("cpu", "fp32")
    assert found.runs == 5
    assert found.factor.mid == pytest.approx(0.6, rel=0.02)


def test_runs_on_rows_that_were_planned_at_the_cut_off_are_passed_over(uri: str, tmp_path: Path) -> None:
    """Their predicted pace was that of batches as wide as the cut-off: up to 13.7 times what they really had."""
    for without in (None, "plan.padded_tokens_per_step"):
        run(uri, tmp_path, measured(), task="text-classification", without=without)
        run(uri, tmp_path, measured(), task="causal-lm", without=without)
    history = read_history(uri)
    assert sorted(record.task for record in history.records) == ["causal-lm", "causal-lm", "text-classification"]
    assert history.passed_over == 1


def test_runs_without_a_figure_are_passed_over_and_counted(uri: str, tmp_path: Path) -> None:
    finished(uri, tmp_path)
    for key, value in (("measured/peak_gib", float("nan")), ("predicted/tokens_per_second", 0.0)):
        run(uri, tmp_path, measured() | {key: value})
    run(uri, tmp_path, {})
    history = read_history(uri)
    assert (len(history.records), history.passed_over) == (1, 3)


def test_a_last_evaluation_that_gave_no_number_is_no_result_to_learn_from(uri: str, tmp_path: Path) -> None:
    run(uri, tmp_path, measured(), diverged=True)
    (record,) = read_history(uri).records
    assert record.eval_loss is None


def test_runs_that_failed_or_still_run_or_only_repeat_a_trial_do_not_count(uri: str, tmp_path: Path) -> None:
    run(uri, tmp_path, measured(), status="running")
    run(uri, tmp_path, measured(), status="failed")
    run(uri, tmp_path, measured(), role="search")
    assert read_history(uri) == History(records=())


def test_runs_of_other_programs_do_not_count(uri: str, tmp_path: Path) -> None:
    closed(opened(uri, tmp_path / "theirs", params={"learning_rate": 0.1}))
    assert read_history(uri) == History(records=())


def test_a_store_that_is_not_there_is_refused_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no MLflow store"):
        read_history(f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("these are notes, not tables\n" * 100)
    with pytest.raises(StorageError, match="cannot be opened"):
        read_history(f"sqlite:///{tmp_path}/notes.db")


def test_a_server_that_is_not_there_is_refused() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(StorageError, match="does not answer"):
        read_history(f"http://127.0.0.1:{port}")


def test_a_folder_of_files_is_refused() -> None:
    with pytest.raises(SpecError, match="folder of files"):
        read_history("./mlruns")
