"""One training on Ray Train: attempts until it ends, each with the workers that there is room for.

The training itself goes on from its newest checkpoint (`worker.loop`). Here it is decided whether another attempt
follows, how large it is and when it begins (`retry`, `resize`), and kept what each was started for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

from orchestrator.checkpoints import catalog
from orchestrator.errors import CapacityError, Interrupted, OrchestratorError, StorageError
from orchestrator.planning.run_plan import ClusterShape, Kept, RunPlan
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.job import Outcome, TrainingJob
from orchestrator.runs.out_of_memory import smaller_micro_batch
from orchestrator.scheduling.attempt import AttemptEnd, Pause, Watcher, resources_of_worker, run_attempt
from orchestrator.scheduling.decisions.liveness import Straggler
from orchestrator.scheduling.decisions.resize import Timing, decide_leaving, decide_size
from orchestrator.scheduling.decisions.retry import Tally, decide_retry, kind_of
from orchestrator.scheduling.session import draining_nodes, free_shape, nodes_of_workers

_ROOM_EVERY_S = 1.0
"""How often the cluster is asked for room while a training waits for it."""
_LONGEST_CAUSE = 300
"""Characters of what is told about a failure on MLflow's tag of its attempt."""
_WITH_LESS_MEMORY = ", and fits sooner with more workers, deepspeed.zero_stage=3 or, on GPUs, deepspeed.offload=all"
_SETTLE_S = 5.0
"""What a lost worker group held is free again within this time (a guess; 1 to 2 s were seen on one machine)."""
_COUNTED = {"preemption": "preemptions", "resize": "resizes", "straggler": "moves"}
"""Kinds of pauses by the field of `Recovery` that counts them."""


class Planner(Protocol):
    """Plans a training for the room that there is, keeping what its earlier attempts have settled."""

    def __call__(self, room: ClusterShape, kept: Kept | None) -> RunPlan:
        """Raises CapacityError when there is not room enough."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a training has survived since this command began."""

    restarts: int = 0
    """Attempts after a failure."""
    lost_steps: int = 0
    """Steps that were done and had to be done again."""
    preemptions: int = 0
    """Attempts after a node was taken away with notice."""
    resizes: int = 0
    """Attempts to use room that had come."""
    moves: int = 0
    """Attempts to leave a node that held up the others."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended, and what it went through."""

    outcome: Outcome
    recovery: Recovery

    @property
    def restarts(self) -> int:
        """How often it was started again after a failure."""
        return self.recovery.restarts


def run_training(job: TrainingJob, watcher: Watcher, *, planner: Planner | None = None) -> TrainingResult:
    """Runs a training on the connected cluster until it ends.

    With a `planner` an attempt takes the size that there is room for, and waits for room when there is none; without
    one every attempt is of the size that the job was planned for.
    Raises what the workers raised when it is one of ours, TransientError when workers kept dying, CapacityError when
    there was no room for too long, ClusterError for any other failure of Ray or of a library.
    """
    return _Run(job, watcher, planner).to_its_end()


def attempt_in_words(plan: RunPlan, cause: str) -> str:
    """What an attempt is, as its tag on MLflow begins."""
    return f"{plan.workers} worker{'s' if plan.workers > 1 else ''}: {cause}"


def _ending(end: AttemptEnd) -> str:
    """How an attempt ended, in a few words."""
    at = "before its first step" if end.last_step is None else f"at step {end.last_step}"
    if end.error is not None:
        return f"ended {at}: {end.error.what}" + (f" ({end.error.got[:_LONGEST_CAUSE]})" if end.error.got else "")
    assert end.outcome is not None, "an attempt ends in an outcome or an error"
    why = end.outcome.status.replace("_", " ") if end.pause is None else end.pause.reason
    return f"ended at step {end.outcome.step}: {why}"


def given_up(error: OrchestratorError, *, reason: str, attempts: int, saved_step: int | None) -> OrchestratorError:
    """The last word: what happened, how often it was tried, what is kept, and the command that goes on."""
    kind = kind_of(error)
    if kind is None:
        return error
    kept = (
        "nothing was saved yet: the same command starts over"
        if saved_step is None
        else f"the checkpoint of step {saved_step} is kept: the same command goes on from there"
    )
    what = f"{error.what}; {reason} (attempt {attempts})"
    return type(error)(
        what, got=error.got, allowed=error.allowed, do=kept + (_WITH_LESS_MEMORY if kind == "memory" else "")
    )


class _Clock:
    """How long the newest attempt took to start, and how long it has trained."""

    def __init__(self) -> None:
        self._started_s = self._training_s = time.monotonic()

    def attempt_starts(self) -> None:
        """Its workers are being asked for."""
        self._started_s = time.monotonic()

    def training_starts(self) -> None:
        """Its first progress was heard of."""
        self._training_s = time.monotonic()

    @property
    def start_s(self) -> float:
        """Seconds from the one to the other."""
        return self._training_s - self._started_s

    @property
    def trained_s(self) -> float:
        """Seconds since its first progress."""
        return time.monotonic() - self._training_s


class _Run:
    """The attempts of one training."""

    def __init__(self, job: TrainingJob, watcher: Watcher, planner: Planner | None) -> None:
        self._job, self._watcher, self._planner = job, watcher, planner
        self._attempts = Attempts(job.run_folder, job.exchange())
        self._tally = Tally()
        self._recovery = Recovery()
        self._failed_at: int | None = None
        self._saved: int | None = None
        self._clock = _Clock()
        self._bad_nodes: tuple[str, ...] = ()
        """Of ranks that hung or held up the others; left out while there is room elsewhere."""
        self._notes: tuple[str, ...] = ()
        """What was changed to go on, for the user."""

    def to_its_end(self) -> TrainingResult:
        """Attempt after attempt."""
        cause = self._attempts.cause_of_start()
        plan = self._first_plan()
        number = self._attempts.newest()
        while True:
            self._attempts.keep(plan.kept)
            self._clock.attempt_starts()
            number = self._attempts.open(workers=plan.workers, cause=cause, after=number)
            self._watcher.on_attempt(number, attempt_in_words(plan, cause))
            end = self._attempt(plan, number)
            self._watcher.on_attempt(number, f"{attempt_in_words(plan, cause)}; {_ending(end)}")
            if end.outcome is not None and (end.pause is None or end.outcome.status != "interrupted"):
                outcome = replace(end.outcome, notes=(*self._notes, *end.outcome.notes))
                return TrainingResult(outcome=outcome, recovery=self._recovery)
            cause, plan = self._next(end, plan, number)
            self._watcher.on_retry(cause)

    def _attempt(self, plan: RunPlan, number: int) -> AttemptEnd:
        """One attempt, whose time counts from here."""
        started_s, held = self._attempts.started_s(number), self._attempts.held()
        try:
            return run_attempt(
                replace(self._job, plan=plan, attempt=number, started_s=started_s, held_before=held),
                replace(self._watcher, on_progress=self._counting_lost_steps()),
                partial(self._look_out, plan),
                without_nodes=self._bad_nodes,
            )
        finally:
            with suppress(StorageError):  # how the attempt ended is told, not this
                self._attempts.close(number)

    def _first_plan(self) -> RunPlan:
        """The plan of this command's first attempt: one that keeps what an earlier command's attempts have settled."""
        kept = self._attempts.kept()
        if kept is None or kept == self._job.plan.kept or self._planner is None:
            return self._job.plan
        return self._planner(free_shape(held={}), kept)

    # -- between two attempts ----------------------------------------------------------------------------------

    def _next(self, end: AttemptEnd, plan: RunPlan, number: int) -> tuple[str, RunPlan]:
        """Why there is another attempt, and its plan; raises what ended the run where there is none."""
        self._bad_nodes = (*self._bad_nodes, *(node for node in end.bad_nodes if node not in self._bad_nodes))
        if end.error is None:
            assert end.pause is not None, "an attempt is interrupted by its user or for a reason"
            self._count(_COUNTED[end.pause.kind])
            return end.pause.reason, self._with_room(plan, wanted=end.pause.workers)
        kind = kind_of(end.error)
        saved = self._saved_step()
        with suppress(StorageError):  # as far as it is known
            self._attempts.refresh()
        started_from = self._attempts.resumed_step(number)
        progressed = saved is not None and saved > (started_from or 0)
        decision = decide_retry(
            end.error,
            failures=0 if kind is None else self._tally.add(kind, progressed=progressed),
            max_failures=self._job.spec.resources.max_failures,
            can_split=smaller_micro_batch(plan) is not None,
        )
        if not decision.retry or self._watcher.stop.is_set():
            last_word = given_up(end.error, reason=decision.reason, attempts=number, saved_step=saved)
            raise last_word from end.error
        self._count("restarts")
        self._failed_at = end.last_step
        cause = f"{end.error.what}: {decision.reason}"
        if decision.smaller_steps:
            smaller = smaller_micro_batch(plan)
            assert smaller is not None, "it was decided on"
            self._notes = (*self._notes, smaller.reasons[-1])
            cause, plan = f"{cause}, {smaller.micro_batch} instead of {plan.micro_batch}", smaller
        return cause, self._with_room(plan)

    def _with_room(self, plan: RunPlan, *, wanted: int | None = None) -> RunPlan:
        """The plan for the next attempt, once there is room for it.

        What the last one held takes a while to be free: a smaller size than `wanted` is taken only after that.
        """
        if self._planner is None:
            return plan
        wanted = wanted or plan.workers
        timeout_s = self._job.spec.resources.capacity_timeout_s
        began_s = time.monotonic()
        said = False
        while True:
            waited_s = time.monotonic() - began_s
            try:
                found = self._planner(free_shape(held={}, without=self._bad_nodes), plan.kept)
                if found.workers >= wanted or waited_s > _SETTLE_S:
                    return found
            except CapacityError as error:
                if self._bad_nodes and waited_s > _SETTLE_S:
                    self._bad_nodes = self._bad_nodes[1:]  # better a node that hung once than none
                    continue
                if waited_s > timeout_s:
                    raise CapacityError(
                        f"there was no room for the workers for {timeout_s:.0f} s",
                        got=error.got,
                        allowed=error.allowed,
                        do="join nodes, or raise resources.capacity_timeout_s; the same command then goes on",
                    ) from error
                if waited_s > _SETTLE_S and not said:
                    said = True
                    self._watcher.on_retry(f"waiting for room, {timeout_s:.0f} s at most: {error.got}")
            if self._watcher.stop.is_set():
                raise Interrupted("stopped while it waited for room", do="the same command goes on")
            time.sleep(_ROOM_EVERY_S)

    # -- during one --------------------------------------------------------------------------------------------

    def _look_out(self, plan: RunPlan, progress: Mapping[str, Any], straggler: Straggler | None) -> Pause | None:
        if self._planner is None:
            return None
        places = nodes_of_workers()
        leaving = sorted(draining_nodes() & places.keys())
        if leaving:
            return Pause(kind="preemption", reason=f"node {leaving[0][:12]} is being taken away")
        if sum(places.values()) != plan.workers:  # a node is going: what becomes of the workers there will be seen
            return None
        own = resources_of_worker(plan)
        held = {node: {kind: amount * count for kind, amount in own.items()} for node, count in places.items()}
        pause = None if straggler is None else self._leaving(plan, progress, straggler, held)
        if pause is None and self._job.spec.resources.is_elastic:
            pause = self._growing(plan, progress, held)
        return pause

    def _leaving(
        self, plan: RunPlan, progress: Mapping[str, Any], straggler: Straggler, held: Mapping[str, Mapping[str, float]]
    ) -> Pause | None:
        node = straggler.place.node_id
        elsewhere = self._room(plan, held, without=(*self._bad_nodes, node))
        decision = decide_leaving(
            straggler.ratio, running=plan.workers, elsewhere=elsewhere, timing=self._timing(progress)
        )
        if not decision.act:
            return None
        reason = f"{straggler.reason}; {decision.reason}"
        return Pause(kind="straggler", reason=reason, workers=decision.workers, bad_nodes=(node,))

    def _growing(
        self, plan: RunPlan, progress: Mapping[str, Any], held: Mapping[str, Mapping[str, float]]
    ) -> Pause | None:
        room = self._room(plan, held, without=self._bad_nodes)
        if room <= plan.workers:
            return None
        decision = decide_size(plan.usable_workers, running=plan.workers, room=room, timing=self._timing(progress))
        return Pause(kind="resize", reason=decision.reason, workers=decision.workers) if decision.act else None

    def _room(self, plan: RunPlan, held: Mapping[str, Mapping[str, float]], *, without: tuple[str, ...]) -> int:
        """How many workers the training could have, with what it holds; 0 where that is too little."""
        assert self._planner is not None, "without one nothing is looked out for"
        try:
            return self._planner(free_shape(held=held, without=without), plan.kept).workers
        except CapacityError:
            return 0

    def _timing(self, progress: Mapping[str, Any]) -> Timing:
        steps_left = int(progress["steps"]) - int(progress["step"])
        return Timing(
            since_start_s=self._clock.trained_s,
            step_s=float(progress["eta_s"]) / steps_left if progress["eta_s"] and steps_left else None,
            restart_s=self._clock.start_s,
            steps_left=steps_left,
        )

    def _counting_lost_steps(self) -> Callable[[Mapping[str, Any]], None]:
        """Passes progress on; the first of an attempt says how many steps have to be done again."""
        first = True

        def heard(progress: Mapping[str, Any]) -> None:
            nonlocal first
            if first:
                self._clock.training_starts()
            if first and self._failed_at is not None:
                self._count("lost_steps", max(0, self._failed_at - int(progress["step"])))
                self._failed_at = None
            if first and self._recovery != Recovery():
                self._watcher.on_recovery(int(progress["step"]), asdict(self._recovery))
            first = False
            self._watcher.on_progress(progress)

        return heard

    def _count(self, what: str, number: int = 1) -> None:
        self._recovery = replace(self._recovery, **{what: getattr(self._recovery, what) + number})

    def _saved_step(self) -> int | None:
        """Of the newest checkpoint; as it was known last where the storage does not answer."""
        with suppress(OSError, StorageError):
            self._saved = max(catalog.steps(self._job.checkpoints, void=self._attempts.is_void), default=None)
        return self._saved
