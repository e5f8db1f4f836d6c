"""Memory that really runs out in a worker: the kernel grants it no more, or Ray's memory monitor ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import locations
from orchestrator.scheduling.launch import launch
from orchestrator.scheduling.run_lifecycle import RunResult
from orchestrator.spec import RunSpec
from tests import specs
from tests.end_to_end import runs
from tests.training_runs import NO_DROPOUT

pytestmark = pytest.mark.slow

MICRO_BATCH, LENGTH = 64, 512
"""What a step of one worker keeps for its backward pass takes 0.6 GiB, half of it 0.3 GiB (measured)."""
SHORT_BYTES = 150 << 20
"""Less than a whole micro-batch needs, and more than half of one does."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return specs.write_corpus(tmp_path_factory.mktemp("corpus"), documents=500)


def training(corpus: Path, name: str, **changes: Any) -> RunSpec:
    """Two steps on two workers with nothing random in them, so that micro-batches of any size give the same."""
    usual = {
        "model__overrides": NO_DROPOUT,
        "data__sequence_length": LENGTH,
        "training__steps": 2,
        "training__global_batch": 2 * MICRO_BATCH,
        "training__micro_batch": MICRO_BATCH,
        "training__eval_every_steps": None,
        "checkpoint__every_steps": None,
    }
    return runs.pretraining(corpus, name, **(usual | changes))


@contextmanager
def for_each_worker(act: Callable[[psutil.Process], None]) -> Iterator[None]:
    """Does something to every worker process again and again while it lives."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):  # a worker imports for seconds before its first step
            for worker in runs.processes_named("RayTrainWorker"):
                try:
                    act(worker)
                except (psutil.Error, FileNotFoundError, ProcessLookupError):  # it ended while being looked at
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def losses(result: RunResult) -> list[float]:
    curve = runs.curve(str(result.mlflow_run_id), "train/loss", uri=locations.default_tracking_uri())
    assert list(curve) == [1, 2]
    return list(curve.values())


@pytest.fixture(scope="module")
def unlimited(corpus: Path, ray_cluster: None) -> tuple[list[float], int]:
    """The losses of a run that has all the memory it wants, and the most bytes that a worker of it had mapped."""
    most = [0]

    def look(worker: psutil.Process) -> None:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        most.append(max(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmPeak")))

    with for_each_worker(look):
        result = launch(training(corpus, "unlimited"), runs.listener())
    assert result.restarts == 0
    return losses(result), max(most)


@pytest.mark.parametrize(("stage", "starved"), [(0, "both"), (2, "one"), (3, "both")])
def test_a_step_that_does_not_fit_is_taken_in_halves_with_the_same_losses(
    corpus: Path, unlimited: tuple[list[float], int], stage: int, starved: str
) -> None:
    expected, most = unlimited
    limited: list[int] = []

    def limit(worker: psutil.Process) -> None:
        if worker.pid not in limited and (starved == "both" or not limited):
            worker.rlimit(psutil.RLIMIT_AS, (most - SHORT_BYTES, most - SHORT_BYTES))
            limited.append(worker.pid)

    said: list[str] = []
    with for_each_worker(limit):
        spec = training(corpus, f"starved-{starved}-{stage}", deepspeed__zero_stage=stage)
        result = launch(spec, runs.listener(said=said))
    assert limited
    assert (result.status, result.restarts) == ("finished", 1)
    assert losses(result) == pytest.approx(expected, abs=1e-5)
    why = "a step needs more memory than its worker has: again with half the micro-batch, 32 instead of 64"
    assert said.count(why) == 1
    (note,) = (note for note in result.notes if "memory" in note)
    assert "micro_batch: 32 instead of 64, since memory ran out" in note
    assert "2 x 32 x 2 = 128 as before" in note
    tags = runs.mlflow_run(str(result.mlflow_run_id), uri=locations.default_tracking_uri()).data.tags
    assert tags["orchestrator.attempt.2"] == f"2 workers: {why}; ended at step 2: finished"
    assert "DefaultCPUAllocator: can't allocate memory" in tags["orchestrator.attempt.1"]


# -- the kernel's out-of-memory killer -------------------------------------------------------------------------------

_GROUPS = Path("/sys/fs/cgroup")
_STARVED_BYTES = 400 << 20
"""Python with torch and DeepSpeed takes 500 MiB."""


@pytest.fixture
def small_room() -> Iterator[Path]:
    """A control group whose processes get little memory together; left out where none can be made."""
    of_version_1 = (_GROUPS / "memory").is_dir()
    group = (_GROUPS / "memory" if of_version_1 else _GROUPS) / f"orchestrator-{os.getpid()}"
    limit = "memory.limit_in_bytes" if of_version_1 else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(_STARVED_BYTES))
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here: {error}")
    yield group
    group.rmdir()


def test_a_worker_that_the_kernel_ends_for_want_of_memory_comes_back_with_half_the_micro_batch(
    corpus: Path, small_room: Path, unlimited: tuple[list[float], int]
) -> None:
    put: list[int] = []

    def confine(worker: psutil.Process) -> None:
        if not put:
            (small_room / "cgroup.procs").write_text(str(worker.pid))
            put.append(worker.pid)

    said: list[str] = []
    with for_each_worker(confine):
        result = launch(training(corpus, "kernel"), runs.listener(said=said))
    assert put
    assert (result.status, result.restarts) == ("finished", 1)
    assert losses(result) == pytest.approx(unlimited[0], abs=1e-5)
    why = "a worker's machine ran out of memory: again with half the micro-batch, 32 instead of 64"
    assert said.count(why) == 1
    tags = runs.mlflow_run(str(result.mlflow_run_id), uri=locations.default_tracking_uri()).data.tags
    assert "the kernel's out-of-memory killer ended a process on" in tags["orchestrator.attempt.1"]


# -- Ray's memory monitor --------------------------------------------------------------------------------------------

_GROW = """
import json, sys, time
import ray.train
from orchestrator.scheduling.failures import explain
from orchestrator.scheduling.session import ray_session
from orchestrator.scheduling.rendezvous import LeanTrainer

def train(config):
    held = []
    while ray.train.get_context().get_world_rank() == 1 and len(held) < 60:
        held.append(b"x" * (100 << 20))
        time.sleep(0.02)
    time.sleep(300)

with ray_session():
    trainer = LeanTrainer(
        train,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(name="grow", storage_path=sys.argv[1]),
    )
    try:
        trainer.fit()
    except Exception as error:
        told = explain(error)
        print(json.dumps({"kind": type(told).__name__, "what": told.what, "got": told.got}))
"""


def test_a_worker_that_rays_memory_monitor_ends_is_known_to_have_run_out_of_memory(tmp_path: Path) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + (3 << 30)) / memory.total
    done = subprocess.run(
        [sys.executable, "-c", _GROW, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        # Looked at more often, Ray ends the other worker too, before the first one's memory is given back.
        env={**os.environ, "RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "250"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["kind"], told["what"]) == ("MemoryExhaustedError", "worker of rank 1 ran out of memory and died")
    assert told["got"].startswith("Memory on the node")
