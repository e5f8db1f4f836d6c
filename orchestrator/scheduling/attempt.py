"""One attempt at a training on Ray Train: started, watched, asked to end early where there is a reason to.

Comes in: a job and who watches it. Goes out: an `AttemptEnd`; deciding what follows is `run_training`'s.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train

from orchestrator.errors import (
    ClusterError,
    HangError,
    Interrupted,
    MemoryExhaustedError,
    OrchestratorError,
    TransientError,
)
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.heartbeat import Heartbeat
from orchestrator.runs.job import Outcome, TrainingJob, WorkerContext
from orchestrator.scheduling.autoscaler import selector_without
from orchestrator.scheduling.capacity import resources_of_worker
from orchestrator.scheduling.control_channel import DriverChannel, WorkerChannel
from orchestrator.scheduling.data_shipping import Parcel, pack, unpack
from orchestrator.scheduling.decisions.liveness import Hang, Straggler, find_hang, find_straggler
from orchestrator.scheduling.decisions.next_action import Pause
from orchestrator.scheduling.failures import explain, find_starved, raised_by_worker
from orchestrator.scheduling.rendezvous import LeanTrainer, RendezvousConfig
from orchestrator.scheduling.session import worker_runtime_environment
from orchestrator.scheduling.stacks import answer_stack_signal, end_ranks, keep_stacks

_POLL_S = 0.2
_LOOK_S = 2.0
"""How often the cluster is looked at for reasons to end an attempt early; a look takes some milliseconds."""
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
    """Called with one sentence when an attempt has ended before its time and another follows."""
    on_attempt: Callable[[int, str], None] = lambda number, cause: None
    """Called with the number of each attempt as it starts, and why there is one."""
    on_recovery: Callable[[int, Mapping[str, float]], None] = lambda step, totals: None
    """Called with (step, totals of `Recovery` so far) once an attempt goes on after an earlier one."""
    stop: threading.Event = threading.Event()  # noqa: RUF009  a default that nobody sets
    """Set to ask for a checkpoint and an end."""


Lookout = Callable[[Mapping[str, Any], Straggler | None], Pause | None]
"""Given the newest progress and who holds up the others, says whether there is a reason to pause; called every few
seconds during steps."""


@dataclass(frozen=True, kw_only=True)
class AttemptEnd:
    """How an attempt ended: with an outcome or an error."""

    outcome: Outcome | None = None
    error: OrchestratorError | None = None
    pause: Pause | None = None
    """Why it was asked to end, where it was not the user who asked."""
    bad_nodes: tuple[str, ...] = ()
    """Ray's ids of the nodes of ranks that hung or held up the others."""
    last_step: int | None = None
    """The newest step that the driver has heard of; None when there was none."""


def run_attempt(
    job: TrainingJob, watcher: Watcher, lookout: Lookout, *, without_nodes: Sequence[str] = ()
) -> AttemptEnd:
    """Runs a job's workers until they end, the user stops them, a pause is called for or they hang.

    `without_nodes` are Ray's ids of nodes that get no worker.

    Raises Interrupted when the user stopped it before its first step, ClusterError when it did not react to that.
    """
    channel = DriverChannel(f"run-{uuid.uuid4().hex}")
    future: Future[Any] = Future()
    # A thread, because fit() blocks and would replace this process's signal handlers.
    threading.Thread(target=_fit, args=(job, channel, future, without_nodes), name="ray-train", daemon=True).start()
    watch = _Watch(job, channel, future, watcher, lookout)
    try:
        watch.until_the_end()
        return _end(future, watch)
    finally:
        if not future.done():
            channel.ask_to_stop()  # whatever of the abandoned attempt still comes up ends after its first step
        future.add_done_callback(lambda _: _clear(channel))


class _Watch:
    """What the driver does while an attempt runs."""

    def __init__(
        self, job: TrainingJob, channel: DriverChannel, future: Future[Any], watcher: Watcher, lookout: Lookout
    ) -> None:
        self._job, self._channel, self._future, self._watcher, self._lookout = job, channel, future, watcher, lookout
        self.hang: Hang | None = None
        self._stacks = ""
        self._straggler: Straggler | None = None
        self._named: set[int] = set()
        """Ranks that the user was told of."""
        self.last: Mapping[str, Any] | None = None
        self.pause: Pause | None = None
        self._reported = 0
        self._alive_s = self._looked_s = time.monotonic()

    def until_the_end(self) -> None:
        while True:
            done = bool(wait_for([self._future], timeout=_POLL_S).done)
            self._listen()
            if done:
                return
            self._check_health()
            if self._watcher.stop.is_set():
                self._press()
            elif self.pause is not None:
                self._channel.ask_to_stop()  # one that does not listen ends as a hang, or with its node
            else:
                self._alive_s = time.monotonic()
                self._look_out()

    def _listen(self) -> None:
        progress = self._channel.progress()
        if progress is not None and progress != self.last:
            self._watcher.on_progress(progress)
            self.last, self._alive_s = progress, time.monotonic()
        for step, metrics in self._channel.reports(self._reported):
            self._reported += 1
            self._watcher.on_report(step, metrics)

    def _look_out(self) -> None:
        now_s = time.monotonic()
        if self.last is None or now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        self.pause = self._lookout(self.last, self._straggler)
        if self.pause is not None and self.pause.kind == "straggler" and self._straggler is not None:
            reason = self.pause.reason
            keep_stacks(self._job.run_folder / "stacks", [self._straggler.place], kind="straggler", reason=reason)

    def _check_health(self) -> None:
        """Ends a worker group that hangs, stacks first; names a rank that everyone waits for."""
        if self.hang is not None:
            return
        world_size, timeout = self._job.plan.workers, self._job.spec.resources.hang_timeout_s
        seen = self._channel.heartbeats(world_size)
        self.hang = find_hang(seen, world_size=world_size, timeout_s=None if timeout == "auto" else timeout)
        if self.hang is not None:
            places = [each.place for each in seen.values()]
            self._watcher.on_retry(f"the workers hang: {self.hang.reason}")
            self._stacks = keep_stacks(self._job.run_folder / "stacks", places, reason=self.hang.reason)
            end_ranks(places)
            return
        self._straggler = find_straggler(seen)
        if self._straggler is not None and self._straggler.place.rank not in self._named:
            self._named.add(self._straggler.place.rank)
            self._watcher.on_retry(self._straggler.reason)

    def explained(self, error: OrchestratorError) -> OrchestratorError:
        """A hang, where the workers were ended for one; want of memory, where a kernel ended one for it."""
        if self.hang is not None and isinstance(error, TransientError | ClusterError):
            return HangError("the workers hang", got=self.hang.reason, do=self._stacks)
        starved = find_starved(self._channel.last_seen()) if type(error) is TransientError else ()
        if starved:
            got = f"the kernel's out-of-memory killer ended a process on {', '.join(starved)}; {error.what}"
            return MemoryExhaustedError("a worker's machine ran out of memory", got=got)
        return error

    def _press(self) -> None:
        """Asks the workers to save and end, and gives them up when they show no sign of it."""
        if self.last is None:
            raise Interrupted("stopped while its workers were starting", do="the same command starts them again")
        self._channel.ask_to_stop()
        if self.last["phase"] != "saving" and time.monotonic() - self._alive_s > _ABANDON_S:
            raise ClusterError(
                f"the run was asked to stop, gave no sign for {_ABANDON_S:.0f} s and was ended",
                do="the same command goes on from its newest checkpoint",
            )


def _clear(channel: DriverChannel) -> None:
    """Where Ray is going down, its store goes with it."""
    if ray.is_initialized():
        with contextlib.suppress(Exception):
            channel.clear()


def _end(future: Future[Any], watch: _Watch) -> AttemptEnd:
    last_step = None if watch.last is None else int(watch.last["step"])
    try:
        value = future.result()
    except Exception as error:
        places = () if watch.hang is None else watch.hang.culprits
        return AttemptEnd(
            error=watch.explained(explain(error)),
            pause=watch.pause,
            last_step=last_step,
            bad_nodes=tuple(sorted({place.node_id for place in places})),
        )
    left = () if watch.pause is None else watch.pause.bad_nodes
    return AttemptEnd(outcome=Outcome.from_dict(value), pause=watch.pause, bad_nodes=left, last_step=last_step)


def _fit(job: TrainingJob, channel: DriverChannel, future: Future[Any], without_nodes: Sequence[str]) -> None:
    plan = job.plan
    storage = job.run_folder / "ray" / uuid.uuid4().hex[:8]
    try:
        try:
            trainer = LeanTrainer(
                worker_main,
                train_loop_config={"job": job, "channel": channel.key, "parcels": pack(job.data.folders)},
                backend_config=RendezvousConfig(),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=plan.workers,
                    use_gpu=plan.gpus_per_worker > 0,
                    resources_per_worker=resources_of_worker(plan),
                    label_selector=selector_without(without_nodes) or None,
                ),
                run_config=ray.train.RunConfig(
                    name="attempt",
                    storage_path=str(storage),
                    # Every retry is decided in train_run, so that each is counted and said.
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


def worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs; the outcome of rank 0 is the run's. Raises one of ours, or WorkerError."""
    try:
        return _train_one_rank(config["job"], config["channel"], config["parcels"])
    except BaseException as error:
        raised = raised_by_worker(error)
        if raised is error:
            raise
        raise raised from error


def _train_one_rank(job: TrainingJob, board_key: str, parcels: Sequence[Parcel]) -> dict[str, Any]:
    job.renew()
    Attempts(job.run_folder, job.exchange()).check_seen(job.attempt)
    from orchestrator.worker.work import carry_out

    for parcel in parcels:
        unpack(parcel)
    place = ray.train.get_context()
    rank, world_size = place.get_world_rank(), place.get_world_size()
    answer_stack_signal()
    heartbeat = Heartbeat()
    channel = WorkerChannel(board_key, heartbeat=heartbeat, rank=rank, world_size=world_size)
    # Progress, reports and the wish to stop are rank 0's.
    seams: dict[str, Any] = {
        "report": channel.report,
        "progress": channel.post,
        "stop_requested": channel.stop_requested,
    }
    context = WorkerContext(
        rank=rank,
        world_size=world_size,
        local_rank=place.get_local_rank(),
        nodes=math.ceil(world_size / place.get_local_world_size()),
        heartbeat=heartbeat,
        **(seams if rank == 0 else {}),
    )
    try:
        return carry_out(job, context).to_dict()
    finally:
        channel.close()
