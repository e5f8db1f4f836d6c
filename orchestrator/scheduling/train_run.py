"""One training on Ray Train: attempts until it ends, with the newest checkpoint carried over by the loop itself."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError, RayTaskError

from orchestrator.errors import CapacityError, ClusterError, Interrupted, OrchestratorError, TransientError
from orchestrator.scheduling.board import DriverBoard, WorkerBoard
from orchestrator.scheduling.rendezvous import RendezvousConfig
from orchestrator.scheduling.retry import decide_retry
from orchestrator.scheduling.session import worker_runtime_environment
from orchestrator.scheduling.shipping import Parcel, pack, unpack
from orchestrator.scheduling.trainer import LeanTrainer
from orchestrator.training.job import Outcome, TrainingJob, WorkerContext

_POLL_S = 0.2
_ABANDON_S = 60.0
"""How long a training that was asked to stop may show no sign of life, saving aside, before it is given up."""
_PLACEMENT_TRIES = 5
"""Ray waits 60 s for room for the workers; after so many times the cluster is taken to be too small for good."""


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """What a driver wants to hear, and how it says stop. The defaults hear nothing and never stop."""

    on_progress: Callable[[Mapping[str, Any]], None] = lambda progress: None
    """Called with each new `Progress` as a mapping."""
    on_report: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None
    """Called with (step, metrics) after each evaluation."""
    on_retry: Callable[[str], None] = lambda reason: None
    """Called with one sentence when an attempt failed and another follows."""
    stop: threading.Event = threading.Event()  # noqa: RUF009  a default that nobody sets
    """Set to ask for a checkpoint and an end."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended, and how often it was started again."""

    outcome: Outcome
    restarts: int


def run_training(job: TrainingJob, watcher: Watcher) -> TrainingResult:
    """Runs a training on the connected cluster until it ends.

    Raises what the workers raised when it is one of ours, TransientError when workers kept dying, ClusterError for
    any other failure of Ray or of a library.
    """
    failures = 0
    while True:
        try:
            return TrainingResult(outcome=_attempt(job, watcher), restarts=failures)
        except OrchestratorError as error:
            failures += 1
            decision = decide_retry(error, failures=failures, max_failures=job.spec.resources.max_failures)
            if not decision.retry or watcher.stop.is_set():
                raise
            watcher.on_retry(f"{error.what}: {decision.reason}")


def _attempt(job: TrainingJob, watcher: Watcher) -> Outcome:
    board = DriverBoard(f"run-{uuid.uuid4().hex}")
    future: Future[Any] = Future()
    # A thread, because fit() blocks and would replace this process's signal handlers.
    threading.Thread(target=_fit, args=(job, board, future), name="ray-train", daemon=True).start()
    try:
        _watch(board, future, watcher)
        return _outcome(future)
    finally:
        if not future.done():
            board.ask_to_stop()  # whatever of the abandoned attempt still comes up ends after its first step
        future.add_done_callback(lambda _: board.clear() if ray.is_initialized() else None)


def _watch(board: DriverBoard, future: Future[Any], watcher: Watcher) -> None:
    last: Mapping[str, Any] | None = None
    reported, alive_at = 0, time.monotonic()
    while True:
        done = bool(wait_for([future], timeout=_POLL_S).done)
        progress = board.progress()
        if progress is not None and progress != last:
            watcher.on_progress(progress)
            last, alive_at = progress, time.monotonic()
        for step, metrics in board.reports(reported):
            reported += 1
            watcher.on_report(step, metrics)
        if done:
            return
        if not watcher.stop.is_set():
            alive_at = time.monotonic()
            continue
        if last is None:
            raise Interrupted("stopped while its workers were starting", do="the same command starts them again")
        board.ask_to_stop()
        if last["phase"] != "saving" and time.monotonic() - alive_at > _ABANDON_S:
            raise ClusterError(
                f"the run was asked to stop, gave no sign for {_ABANDON_S:.0f} s and was ended",
                do="the same command goes on from its newest checkpoint",
            )


def _fit(job: TrainingJob, board: DriverBoard, future: Future[Any]) -> None:
    plan = job.plan
    resources = {"CPU": float(plan.cpus_per_worker)}
    if plan.gpus_per_worker:
        resources["GPU"] = float(plan.gpus_per_worker)
    storage = job.run_folder / "ray" / uuid.uuid4().hex[:8]
    try:
        try:
            trainer = LeanTrainer(
                worker_main,
                train_loop_config={"job": job, "board": board.key, "parcel": pack(job.data.path)},
                backend_config=RendezvousConfig(),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=plan.workers, use_gpu=plan.gpus_per_worker > 0, resources_per_worker=resources
                ),
                run_config=ray.train.RunConfig(
                    name="attempt",
                    storage_path=str(storage),
                    # Every retry is decided in run_training, so that each is counted and said.
                    failure_config=ray.train.FailureConfig(
                        max_failures=0, max_preemption_failures=0, controller_failure_limit=_PLACEMENT_TRIES - 1
                    ),
                    worker_runtime_env=worker_runtime_environment(),
                ),
            )
            value = trainer.fit().return_value
        finally:
            _remove(storage)  # before whoever waits on the future looks into the run's folder
        future.set_result(value)
    except BaseException as error:
        future.set_exception(error)


def _remove(storage: Path) -> None:
    """Ray's own notes on an attempt: checkpoints and metrics are kept elsewhere."""
    shutil.rmtree(storage, ignore_errors=True)
    with contextlib.suppress(OSError):  # another attempt's are still there
        storage.parent.rmdir()


class WorkerError(Exception):
    """What a worker raised that is none of ours, as text: Ray drops the traceback, and not every exception pickles."""

    def __init__(self, kind: str, text: str, last_lines: str, is_broken_connection: bool) -> None:
        super().__init__(kind, text, last_lines, is_broken_connection)  # all of them, so that it pickles
        self.kind, self.text, self.last_lines = kind, text, last_lines
        self.is_broken_connection = is_broken_connection

    @classmethod
    def of(cls, error: BaseException) -> WorkerError:
        """The text of an error that was just caught."""
        text = " ".join(str(error).split())
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        last_lines = " | ".join(f"{frame.filename}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames)
        broken = isinstance(error, RuntimeError | ConnectionError) and any(sign in text.lower() for sign in _BROKEN)
        return cls(type(error).__name__, text, last_lines, broken)


_BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "nccl", "timed out waiting")
"""What gloo, NCCL and the rendezvous say when a peer is gone."""


def worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; the outcome of rank 0 is the run's. Raises one of ours, or WorkerError."""
    try:
        return _train_one_rank(config["job"], config["board"], config["parcel"])
    except OrchestratorError:
        raise
    except BaseException as error:
        raise WorkerError.of(error) from error


def _train_one_rank(job: TrainingJob, board_key: str, parcel: Parcel | None) -> dict[str, Any]:
    from orchestrator.training.loop import train

    if parcel is not None:
        unpack(parcel)
    place = ray.train.get_context()
    rank = place.get_world_rank()
    board = WorkerBoard(board_key) if rank == 0 else None
    seams: dict[str, Any] = {}
    if board is not None:
        seams = {"report": board.report, "progress": board.post, "stop_requested": board.stop_requested}
    context = WorkerContext(rank=rank, world_size=place.get_world_size(), local_rank=place.get_local_rank(), **seams)
    try:
        return train(job, context).to_dict()
    finally:
        if board is not None:
            board.close()


def _outcome(future: Future[Any]) -> Outcome:
    try:
        value = future.result()
    except OrchestratorError:
        raise
    except ray.train.WorkerGroupError as error:
        raise translate(error.worker_failures) from error
    except (ray.train.TrainingFailedError, RayError) as error:
        raise _never_trained(getattr(error, "controller_failure", error)) from error
    return Outcome(**{**value, "notes": tuple(value["notes"])})


def _never_trained(cause: BaseException) -> OrchestratorError:
    """What kept Ray Train from running the workers at all."""
    got = " ".join(str(cause).split())[-400:]
    if "worker group startup timed out" in str(cause):
        return CapacityError("there is no room for the workers", got=got, do="`ray status` shows what is free")
    if isinstance(cause, RayTaskError):
        return ClusterError(
            "the workers could not start", got=got, do="check that every node has this project and its dependencies"
        )
    return TransientError("Ray could not run the workers", got=got, do="the same command starts them again")


def translate(failures: Mapping[int, BaseException]) -> OrchestratorError:
    """The one error that explains a failed worker group, given each rank's.

    One of ours comes first; then a dead worker, whose peers fail with broken connections; then a foreign error, which
    is named with its rank and last lines. What is neither ours nor a `WorkerError` is Ray speaking for a dead worker.
    """
    for error in failures.values():
        if isinstance(error, OrchestratorError):
            return error
    raised = {rank: error for rank, error in failures.items() if isinstance(error, WorkerError)}
    foreign = {rank: error for rank, error in raised.items() if not error.is_broken_connection}
    dead = sorted(failures.keys() - raised.keys())
    if dead or not foreign:
        ranks = dead or sorted(failures)
        return TransientError(
            f"worker{'s' if len(ranks) > 1 else ''} of rank {', '.join(map(str, ranks))} died",
            got=_last_words(failures[ranks[0]]),
            do="the same command goes on from the newest checkpoint",
        )
    rank, cause = min(foreign.items())
    return ClusterError(
        f"training failed on rank {rank} with {cause.kind}",
        got=cause.text[:400] or "no message",
        do=f"this is none of the mistakes the project knows; it was raised at {cause.last_lines}",
    )


def _last_words(error: BaseException) -> str:
    """What Ray or the worker knows of a death, without Ray's preamble of ids."""
    text = " ".join((error.text if isinstance(error, WorkerError) else str(error)).split())
    return (text.partition("Worker exit detail: ")[2] or text)[:300]
