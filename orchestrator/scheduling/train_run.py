"""One training on Ray Train: attempts until it ends, with the newest checkpoint carried over by the loop itself."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.errors import CapacityError, ClusterError, OrchestratorError, TransientError
from orchestrator.scheduling.board import DriverBoard, WorkerBoard
from orchestrator.scheduling.rendezvous import RendezvousConfig
from orchestrator.scheduling.retry import decide_retry
from orchestrator.scheduling.session import worker_runtime_environment
from orchestrator.scheduling.shipping import Parcel, pack, unpack
from orchestrator.training.job import Outcome, TrainingJob, WorkerContext

_POLL_S = 0.2
_ABANDON_S = 60.0
"""How long a requested stop may take before the attempt is given up."""


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
        board.clear()


def _watch(board: DriverBoard, future: Future[Any], watcher: Watcher) -> None:
    last, reported, asked_at = None, 0, None
    while True:
        done = bool(wait_for([future], timeout=_POLL_S).done)
        progress = board.progress()
        if progress is not None and progress != last:
            watcher.on_progress(progress)
            last = progress
        for step, metrics in board.reports(reported):
            reported += 1
            watcher.on_report(step, metrics)
        if done:
            return
        if watcher.stop.is_set() and asked_at is None:
            asked_at = time.monotonic()
            board.ask_to_stop()
        if asked_at is not None and time.monotonic() - asked_at > _ABANDON_S:
            raise ClusterError(
                f"the run did not stop within {_ABANDON_S:.0f} s and was ended",
                do="the same command goes on from its newest checkpoint",
            )


def _fit(job: TrainingJob, board: DriverBoard, future: Future[Any]) -> None:
    plan = job.plan
    resources = {"CPU": float(plan.cpus_per_worker)}
    if plan.gpus_per_worker:
        resources["GPU"] = float(plan.gpus_per_worker)
    try:
        trainer = DataParallelTrainer(
            worker_main,
            train_loop_config={"job": job, "board": board._key, "parcel": pack(job.data.path)},
            backend_config=RendezvousConfig(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.workers, use_gpu=plan.gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name="attempt",
                storage_path=str(job.run_folder / "ray" / uuid.uuid4().hex[:8]),
                failure_config=ray.train.FailureConfig(max_failures=0),
                worker_runtime_env=worker_runtime_environment(),
            ),
        )
        future.set_result(trainer.fit().return_value)
    except BaseException as error:
        future.set_exception(error)


def worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; the outcome of rank 0 is the run's."""
    from orchestrator.training.loop import train

    job: TrainingJob = config["job"]
    parcel: Parcel | None = config["parcel"]
    if parcel is not None:
        unpack(parcel)
    place = ray.train.get_context()
    rank = place.get_world_rank()
    board = WorkerBoard(config["board"]) if rank == 0 else None
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
    except (ray.train.ControllerError, RayError) as error:
        text = " ".join(str(error).split())
        kind = CapacityError if "resources" in text and "timeout" in text.lower() else TransientError
        raise kind("Ray could not run the workers", got=text[:400], do="`ray status` shows what is free") from error
    return Outcome(**{**value, "notes": tuple(value["notes"])})


def translate(failures: Mapping[int, BaseException]) -> OrchestratorError:
    """The one error that explains a failed worker group, given each rank's.

    One of ours comes first; then a dead worker, whose peers fail with broken connections; then a foreign error, which
    is named with its rank and last line.
    """
    causes = {rank: getattr(error, "_base_exc", error) for rank, error in failures.items()}
    for cause in causes.values():
        if isinstance(cause, OrchestratorError):
            return cause
    lost = [rank for rank, cause in causes.items() if not _came_from_training(failures[rank])]
    broken = [rank for rank, cause in causes.items() if _is_broken_connection(cause)]
    if lost or (broken and len(broken) == len(causes)):
        ranks = ", ".join(map(str, sorted(lost or broken)))
        return TransientError(
            f"worker{'s' if len(lost or broken) > 1 else ''} of rank {ranks} died",
            got=" ".join(str(next(iter(causes.values()))).split())[:300],
            do="the same command goes on from the newest checkpoint",
        )
    rank, cause = next((r, c) for r, c in causes.items() if r not in broken)
    last_lines = getattr(failures[rank], "_traceback_str", str(cause)).strip().splitlines()
    return ClusterError(
        f"training failed on rank {rank} with {type(cause).__name__}",
        got=" ".join(str(cause).split())[:400] or "no message",
        do=f"this is none of the mistakes the project knows; the end of the traceback: {' | '.join(last_lines[-4:-1])}",
    )


def _came_from_training(error: BaseException) -> bool:
    """Whether the worker's own code raised; a worker that died is reported by Ray instead."""
    return hasattr(error, "_base_exc")


def _is_broken_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError | ConnectionError) and any(
        sign in text
        for sign in ("connection closed by peer", "connection reset", "broken pipe", "nccl", "timed out waiting")
    )
