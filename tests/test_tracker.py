from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError, StorageError
from orchestrator.spec import RunSpec
from orchestrator.tracking import store
from orchestrator.tracking.tracker import (
    MetricLog,
    MlflowTracker,
    NoTracker,
    RunHandle,
    find_outboxes,
    flatten,
    flush_outbox,
    open_run,
    run_tags,
)

LOAD_NOTHING_HEAVY = """
import sys
import orchestrator.tracking.tracker, orchestrator.tracking.store, orchestrator.tracking.outbox
import orchestrator.tracking.compare, orchestrator.tracking.plots, orchestrator.tracking.report
print([name for name in ("mlflow", "torch", "ray", "matplotlib", "numpy", "rich") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables: making them takes seconds, so each test gets a copy."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    store.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def get_run(handle: RunHandle) -> Any:
    return store.client(handle.uri).get_run(handle.run_id)


def curve(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in store.client(handle.uri).get_metric_history(handle.run_id, key)]


# Without a store


def test_importing_tracking_loads_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD_NOTHING_HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flatten_dots_names_writes_lists_as_json_and_leaves_none_out() -> None:
    nested = {"a": {"b": {"c": 1e-4}, "d": None}, "e": ["x", 2], "f": "text", "g": True}
    assert flatten(nested) == {"a.b.c": "0.0001", "e": '["x", 2]', "f": "text", "g": "true"}


def test_run_tags_say_what_the_run_is() -> None:
    spec = RunSpec.model_validate(
        {
            "name": "tiny",
            "kind": "pretrain",
            "model": {"config": "gpt2"},
            "data": {"train": "x.txt"},
            "training": {"steps": 1, "global_batch": 1, "learning_rate": 1e-3},
        }
    )
    tags = run_tags(spec, data_fingerprint="abc")
    assert tags["orchestrator.kind"] == "pretrain"
    assert tags["orchestrator.quality_metric"] == "eval/loss"
    assert tags["orchestrator.spec_fingerprint"] == spec.fingerprint()
    assert tags["orchestrator.data_fingerprint"] == "abc"
    assert "orchestrator.role" not in tags


def test_without_tracking_metrics_stay_in_the_runs_folder(tmp_path: Path) -> None:
    tracker = NoTracker()
    tracker.log_spec_and_plan("name: x", {})
    metrics = MetricLog(tracker.handle, tmp_path)
    metrics.log(1, {"train/loss": 2.0})
    assert metrics.close() == 0
    tracker.close_run("finished")
    (file,) = tmp_path.rglob("metrics.jsonl")
    assert '"train/loss"' in file.read_text()
    assert find_outboxes(tmp_path) == []


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_a_file_store_is_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(SpecError, match=r"folder of files[\s\S]*sqlite:///"):
        store.check_store(uri)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_store_in_memory_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="needs a file"):
        store.check_store(uri)


def test_an_unknown_kind_of_store_is_refused_without_showing_its_password() -> None:
    with pytest.raises(SpecError) as caught:
        store.check_store("redis://me:secret@host/0")
    assert "secret" not in str(caught.value)
    assert "postgresql" in str(caught.value)


def test_a_server_that_is_not_there_is_refused_quickly() -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"does not answer[\s\S]*tracking.uri"):
        store.check_store(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 6


def test_a_database_that_is_not_there_is_refused_without_showing_its_password() -> None:
    with pytest.raises(StorageError, match="database") as caught:
        store.check_store(f"postgresql://me:secret@127.0.0.1:{free_port()}/mlflow")
    assert "secret" not in str(caught.value)


def test_a_sqlite_store_in_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        store.check_store(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(StorageError, match="it is a folder"):
        store.check_store(f"sqlite:///{tmp_path}")


def test_a_relative_sqlite_path_becomes_absolute_and_keeps_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.absolute("sqlite:///a.db?timeout=5") == f"sqlite:///{tmp_path}/a.db?timeout=5"
    assert store.absolute("http://host:5000") == "http://host:5000"


# With a SQLite store


@pytest.mark.slow
def test_a_run_is_opened_described_and_closed(uri: str) -> None:
    tracker = open_run(uri, "exp", "tiny", tags={"orchestrator.kind": "pretrain"}, params={"seed": 0})
    tracker.log_spec_and_plan("name: tiny\ntraining: {learning_rate: 0.001}\n", {"workers": 2, "deepspeed": {"a": 1}})
    tracker.close_run("failed", error="out of memory", tags={"orchestrator.stop_reason": "budget"})
    run = get_run(tracker.handle)
    assert run.info.status == "FAILED"
    assert run.info.run_name == "tiny"
    assert run.data.params == {"seed": "0", "name": "tiny", "training.learning_rate": "0.001", "plan.workers": "2"}
    assert run.data.tags["orchestrator.error"] == "out of memory"
    assert run.data.tags["orchestrator.kind"] == "pretrain"
    artifacts = {item.path for item in store.client(uri).list_artifacts(run.info.run_id)}
    assert artifacts == {"spec.yaml", "plan.json"}


@pytest.mark.slow
def test_artifacts_go_below_the_home_folder_and_nothing_to_the_working_directory(uri: str, tmp_path: Path) -> None:
    tracker = open_run(uri, "exp", "tiny")
    tracker.log_spec_and_plan("name: tiny\n", {})
    assert list((tmp_path / "home" / "artifacts").rglob("spec.yaml"))
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
def test_a_run_opened_again_is_running_and_keeps_its_parameters(uri: str) -> None:
    first = open_run(uri, "exp", "tiny", params={"workers": 4, "seed": 0})
    first.close_run("failed", error="node died")
    again = open_run(uri, "exp", "tiny", run_id=first.handle.run_id, params={"workers": 2, "precision": "bf16"})
    assert again.handle == first.handle
    run = get_run(again.handle)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"workers": "4", "seed": "0", "precision": "bf16"}
    assert "orchestrator.error" not in run.data.tags


@pytest.mark.slow
def test_a_run_id_that_the_store_does_not_know_is_refused(uri: str) -> None:
    with pytest.raises(SpecError, match="is not in the MLflow store"):
        open_run(uri, "exp", "tiny", run_id="0" * 32)


@pytest.mark.slow
def test_a_deleted_experiment_is_refused_with_the_way_back(uri: str) -> None:
    tracker = open_run(uri, "exp", "tiny")
    store.client(uri).delete_experiment(tracker.handle.experiment_id)
    with pytest.raises(SpecError, match=r"was deleted[\s\S]*mlflow experiments restore -x"):
        open_run(uri, "exp", "tiny")


@pytest.mark.slow
def test_long_values_and_many_parameters_fit_mlflows_limits(uri: str) -> None:
    tracker = open_run(uri, "exp", "tiny", params={f"p{n}": n for n in range(250)} | {"long": "x" * 9000})
    tracker.close_run("failed", error="e" * 20_000)
    run = get_run(tracker.handle)
    assert len(run.data.params) == 251
    assert len(run.data.params["long"]) == 6000
    assert len(run.data.tags["orchestrator.error"]) == 8000


@pytest.mark.slow
def test_a_handle_goes_to_a_worker_by_pickle(uri: str) -> None:
    handle = open_run(uri, "exp", "tiny").handle
    assert pickle.loads(pickle.dumps(handle)) == handle


@pytest.mark.slow
def test_the_revision_is_tagged_inside_a_checkout_only(uri: str, tmp_path: Path) -> None:
    commit = "mlflow.source.git.commit"
    assert commit not in get_run(open_run(uri, "exp", "outside").handle).data.tags
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    tags = get_run(open_run(uri, "exp", "inside").handle).data.tags
    assert len(tags[commit]) == 40
    assert tags["orchestrator.git_dirty"] == "true"  # the store itself lies there, untracked


@pytest.mark.slow
def test_a_search_shows_its_best_trial_and_the_cost_of_all(uri: str, tmp_path: Path) -> None:
    search = open_run(uri, "exp", "search", params={"seed": 0, "learning_rate": "searched"})
    trials = []
    for number, accuracy in enumerate((0.7, 0.9)):
        trial = open_run(
            uri,
            "exp",
            f"trial-{number}",
            parent_run_id=search.handle.run_id,
            params={"seed": 0, "learning_rate": 10.0**-number},
        )
        metrics = MetricLog(trial.handle, tmp_path / f"trial-{number}")
        metrics.log(40, {"eval/accuracy": accuracy, "cost/usd": 1.5})
        assert metrics.close() == 0
        trials.append(trial)
    search.copy_best(trials[1].handle.run_id)
    run = get_run(search.handle)
    assert run.data.metrics == {"eval/accuracy": 0.9, "cost/usd": 3.0}
    assert run.data.params["learning_rate"] == "searched"
    assert run.data.params["best.learning_rate"] == "0.1"
    assert "best.seed" not in run.data.params
    assert run.data.tags["orchestrator.best_run_id"] == trials[1].handle.run_id


@pytest.mark.slow
def test_a_resumed_run_has_each_step_once(uri: str, tmp_path: Path) -> None:
    tracker = open_run(uri, "exp", "tiny")
    for steps in (range(1, 38), range(31, 61)):
        metrics = MetricLog(tracker.handle, tmp_path)
        for step in steps:
            metrics.log(step, {"train/loss": 1 / step})
        assert metrics.close() == 0
    assert curve(tracker.handle, "train/loss") == [(step, 1 / step) for step in range(1, 61)]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_tagged_and_not_drawn(uri: str, tmp_path: Path) -> None:
    tracker = open_run(uri, "exp", "tiny")
    metrics = MetricLog(tracker.handle, tmp_path)
    for step, loss in enumerate((2.0, float("inf"), float("nan")), start=1):
        metrics.log(step, {"train/loss": loss})
    metrics.close()
    assert curve(tracker.handle, "train/loss") == [(1, 2.0)]
    assert get_run(tracker.handle).data.tags["orchestrator.non_finite"] == "train/loss is inf at step 2"


@pytest.mark.slow
def test_a_worker_that_does_not_reach_the_sqlite_store_starts_no_second_one(tmp_path: Path) -> None:
    elsewhere = tmp_path / "drivers-disk" / "mlflow.db"
    handle = RunHandle(run_id="0" * 32, experiment_id="1", uri=f"sqlite:///{elsewhere}")
    metrics = MetricLog(handle, tmp_path / "run")
    metrics.log(1, {"train/loss": 2.0})
    assert metrics.close(timeout_s=10) == 1
    assert not elsewhere.exists()


@pytest.mark.slow
def test_the_driver_sends_what_a_worker_could_not(uri: str, tmp_path: Path) -> None:
    tracker = open_run(uri, "exp", "tiny")
    metrics = MetricLog(tracker.handle, tmp_path / "run")
    metrics.log(1, {"train/loss": 2.0})
    metrics.close(timeout_s=0)
    (outbox,) = find_outboxes(tmp_path / "run")
    (outbox / "shipped.json").unlink(missing_ok=True)  # as if nothing had been confirmed
    assert flush_outbox(outbox) == 1
    assert flush_outbox(outbox) == 0
    assert curve(tracker.handle, "train/loss") == [(1, 2.0)]


@pytest.mark.slow
def test_an_experiment_that_another_process_creates_first_is_found(uri: str) -> None:
    client = store.client(uri)

    class LateClient:
        """Another process creates the experiment right after this one has looked for it."""

        def get_experiment_by_name(self, name: str) -> Any:
            found = client.get_experiment_by_name(name)
            if found is None:
                client.create_experiment(name)
            return found

        def create_experiment(self, name: str, **options: Any) -> str:
            return str(client.create_experiment(name, **options))

    assert store.experiment_id(LateClient(), uri, "new") == client.get_experiment_by_name("new").experiment_id


CREATE_AT_ONCE = """
import sys, time
from orchestrator.tracking.tracker import open_run
import mlflow
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
print(open_run(sys.argv[1], "shared", "tiny").handle.experiment_id)
"""


@pytest.mark.slow
def test_processes_that_start_at_once_share_a_fresh_store_and_experiment_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path))
    command = [sys.executable, "-c", CREATE_AT_ONCE, f"sqlite:///{tmp_path}/new/mlflow.db", str(time.time() + 8)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [error for _, error in results] == ["", "", ""]
    assert len({output for output, _ in results}) == 1


# With a server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real MLflow server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = ["--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        places = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        places += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options, *places],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,  # the server and its worker are killed together
            )
        deadline = time.monotonic() + 90
        while not self.answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(empty_store: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    server = Server(tmp_path)
    yield server
    server.kill()


KILLED_TRAINING = """
import json, sys, time
from pathlib import Path
from orchestrator.tracking.tracker import MetricLog, RunHandle
metrics = MetricLog(RunHandle(**json.loads(sys.argv[1])), Path(sys.argv[2]))
for step in range(int(sys.argv[3]), 100_000):
    metrics.log(step, {"train/loss": 1 / step, "train/tokens": 8.0 * step})
    print(step, flush=True)
    time.sleep(0.02)
"""


@pytest.mark.slow
def test_server_and_training_killed_in_mid_run_every_point_is_there_once(server: Server, tmp_path: Path) -> None:
    tracker = open_run(server.uri, "exp", "tiny")
    tracker.log_spec_and_plan("name: tiny\n", {"workers": 1})
    handle = tracker.handle
    as_json = f'{{"run_id": "{handle.run_id}", "experiment_id": "{handle.experiment_id}", "uri": "{handle.uri}"}}'
    last_step = 0
    for server_dies_at, training_dies_at, resume_at in ((400, 500, 1), (10_000, 700, 450)):
        command = [sys.executable, "-c", KILLED_TRAINING, as_json, str(tmp_path / "run"), str(resume_at)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout is not None
            for line in training.stdout:
                last_step = int(line)
                if last_step == server_dies_at:
                    server.kill()
                if last_step == training_dies_at:
                    training.send_signal(signal.SIGKILL)
                    break
        if not server.answers():
            server.start()
    for folder in find_outboxes(tmp_path / "run"):
        flush_outbox(folder)
    points = curve(handle, "train/loss")
    assert len(points) >= last_step
    assert points == [(step, 1 / step) for step in range(1, len(points) + 1)]
    MlflowTracker(handle).close_run("finished")
    assert get_run(handle).info.status == "FINISHED"
