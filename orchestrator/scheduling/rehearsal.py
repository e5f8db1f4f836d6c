"""The first steps of a training, undisturbed or with a real death in them; `verify-resume` compares the two.

The plan is that of the whole training, so that learning rate and data are too; the loop stops after a given step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import ClusterError, Interrupted, StorageError
from orchestrator.runs.job import TrainingJob
from orchestrator.scheduling.run_lifecycle import Listener, Prepared
from orchestrator.scheduling.run_training import run_training

STEPS_LOST = 2
"""Taken after the checkpoint and before the death: the resumed training takes them again."""
_SAVING_DEADLINE_S = 1800.0
"""Longest that the death waits for the checkpoint before it: as long as the saver waits for its ranks (a guess)."""
_POLL_S = 0.05
_WORKER = "RayTrainWorker"
"""The class of Ray Train's worker actors (Ray 2.60)."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What to rehearse."""

    prepared: Prepared
    steps: int
    """The last one; at least `STEPS_LOST` after the middle."""
    folder: Path
    """Each training gets a run folder in it; every node sees it."""

    @property
    def middle(self) -> int:
        """The step of the checkpoint before the death."""
        return self.steps // 2


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What one training left."""

    run_folder: Path
    restarts: int
    killed: str | None
    """The process that died; None when none did."""

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.run_folder / "checkpoints" / f"step-{step:08d}"


def rehearse(rehearsal: Rehearsal, listener: Listener, *, name: str, with_death: bool = False) -> Rehearsed:
    """Trains up to the last step, with checkpoints in the middle and at the end.

    `with_death` kills a worker `STEPS_LOST` steps after the first checkpoint; retries then go on as in any run.
    Raises Interrupted when asked to stop, and what `run_training` raises.
    """
    job = _job(rehearsal, name, hold_after_step=rehearsal.middle + STEPS_LOST if with_death else None)
    watcher = listener.watcher
    death = _Death(job, checkpoint_step=rehearsal.middle, stop=watcher.stop.is_set) if with_death else None

    def watch(progress: Mapping[str, Any]) -> None:
        watcher.on_progress(_shortened(progress, steps=rehearsal.steps))
        if death is not None:
            death.hear(progress)

    result = run_training(job, replace(watcher, on_progress=watch))
    if result.outcome.step < rehearsal.steps:
        raise Interrupted("stopped before anything could be compared", do="the same command starts over")
    killed = None if death is None else death.killed
    return Rehearsed(run_folder=job.run_folder, restarts=result.restarts, killed=killed)


def _shortened(progress: Mapping[str, Any], *, steps: int) -> Mapping[str, Any]:
    """A progress on the way to another last step."""
    left, planned = steps - progress["step"], progress["steps"] - progress["step"]
    return {**progress, "steps": steps, "eta_s": progress["eta_s"] * left / max(1, planned)}


def _job(rehearsal: Rehearsal, name: str, *, hold_after_step: int | None) -> TrainingJob:
    """The spec's training without what would end it early, resize it, or show it to others."""
    spec, plan = rehearsal.prepared.spec, rehearsal.prepared.plan
    changes = {
        "budget": None,
        "training": spec.training.model_copy(update={"stop": None}),
        "tracking": spec.tracking.model_copy(update={"enabled": False}),
        "checkpoint": spec.checkpoint.model_copy(
            update={"every_steps": rehearsal.middle, "keep": rehearsal.steps, "storage": None}
        ),
        "resources": spec.resources.model_copy(
            update={"workers": plan.workers, "max_failures": max(1, spec.resources.max_failures)}
        ),
    }
    run_folder = rehearsal.folder / name
    run_folder.mkdir()
    return TrainingJob(
        spec=spec.model_copy(update=changes),
        plan=plan,
        data=rehearsal.prepared.data,
        run_folder=run_folder,
        stop_after_step=rehearsal.steps,
        hold_after_step=hold_after_step,
    )


class _Death:
    """Hears a training's progress and kills one of its workers, once it is held and its checkpoint is complete."""

    def __init__(self, job: TrainingJob, *, checkpoint_step: int, stop: Callable[[], bool]) -> None:
        self._job, self._stop = job, stop
        self._checkpoint = job.run_folder / "checkpoints" / f"step-{checkpoint_step:08d}"
        self.killed: str | None = None
        job.hold_file.touch()

    def hear(self, progress: Mapping[str, Any]) -> None:
        """Called on the driver with every new progress."""
        if self.killed is not None or progress["step"] != self._job.hold_after_step:
            return
        deadline = time.monotonic() + _SAVING_DEADLINE_S
        while not self._checkpoint.is_dir() and not self._stop():
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the checkpoint was not complete after {_SAVING_DEADLINE_S:.0f} s", got=self._checkpoint
                )
            time.sleep(_POLL_S)
        if not self._stop():
            self.killed = kill_a_worker()
        self._job.hold_file.unlink()


def kill_a_worker() -> str:
    """SIGKILL to the worker of this driver with the highest process id, on whatever node it is; says which it was.

    Raises ClusterError when there is none.
    """
    here = ray.get_runtime_context()
    own = [actor for actor in actors(actor_state_name="ALIVE").values() if actor["JobID"] == here.get_job_id()]
    workers = [actor for actor in own if actor["ActorClassName"] == _WORKER]
    if not workers:
        raise ClusterError("there is no worker process to kill", got=f"{len(own)} actors of this driver")
    victim = max(workers, key=lambda actor: actor["Pid"])
    node, pid = victim["Address"]["NodeID"], victim["Pid"]
    if node == here.get_node_id():
        _kill(pid)
    else:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.get(ray.remote(num_cpus=0)(_kill).options(scheduling_strategy=there).remote(pid))
    return f"process {pid} on {victim['Address']['IPAddress']}"


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
