"""One training on Ray Train: attempts until it ends, each with the workers that there is room for.

The training itself goes on from its newest checkpoint (`worker.loop`). Whether another attempt follows, how large it is
and when it begins is decided by `next_action`, `resize` and `retry`; here it is done, and what each attempt was started
for is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, assert_never

from orchestrator.checkpoints import catalog
from orchestrator.errors import CapacityError, StorageError
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.job import Outcome, TrainingJob
from orchestrator.scheduling.attempt import AttemptEnd, Watcher, run_attempt
from orchestrator.scheduling.autoscaler import added_up
from orchestrator.scheduling.capacity import Capacity, Planner, RoomSeeker, resources_of_worker
from orchestrator.scheduling.decisions.liveness import Straggler
from orchestrator.scheduling.decisions.next_action import (
    AskForRoom,
    Began,
    Ended,
    Event,
    Finish,
    GiveUp,
    Instruction,
    LogRecovery,
    Pause,
    Recovery,
    Rules,
    RunState,
    Start,
    Tell,
    first_action,
    next_action,
)
from orchestrator.scheduling.decisions.resize import Timing, decide_growth, decide_leaving
from orchestrator.scheduling.session import (
    can_grow,
    draining_nodes,
    free_shape,
    live_shape,
    nodes_of_workers,
)

_LONGEST_CAUSE = 300
"""Characters of what is told about a failure on MLflow's tag of its attempt."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a training ended, and what it went through."""

    outcome: Outcome
    recovery: Recovery

    @property
    def restarts(self) -> int:
        """How often it was started again after a failure."""
        return self.recovery.restarts


def run_training(
    job: TrainingJob, watcher: Watcher, *, planner: Planner | None = None, capacity: Capacity | None = None
) -> TrainingResult:
    """Runs a training on the connected cluster until it ends.

    With a `planner` an attempt takes the size that there is room for, and waits for room when there is none; without
    one every attempt is of the size that the job was planned for. `capacity` is its claim on a cluster that others use
    too: the first attempt waits as well, and nodes are asked for.
    Raises what the workers raised when it is one of ours, TransientError when workers kept dying, CapacityError when
    there was no room for too long, ClusterError for any other failure of Ray or of a library.
    """
    return _Run(job, watcher, planner, capacity).to_its_end()


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
    """The attempts of one training: what `next_action` decides, done."""

    def __init__(self, job: TrainingJob, watcher: Watcher, planner: Planner | None, capacity: Capacity | None) -> None:
        self._job, self._watcher, self._planner, self._capacity = job, watcher, planner, capacity
        self._rules = Rules.of(job.spec.resources, asks_for_room=planner is not None)
        self._attempts = Attempts(job.run_folder, job.exchange())
        self._state = RunState(plan=job.plan, cause="")
        self._saved: int | None = None
        self._clock = _Clock()
        self._seeker = RoomSeeker(planner, capacity, stop=watcher.stop)

    def to_its_end(self) -> TrainingResult:
        """Attempt after attempt."""
        cause = self._attempts.cause_of_start()
        self._state = RunState(plan=self._first_plan(), cause=cause)
        number = self._attempts.newest()
        shares = self._capacity is not None
        self._state, instructions = first_action(self._state, self._rules, shares_cluster=shares)
        while True:
            event: Event | None = None
            for instruction in instructions:
                match instruction:
                    case Start():
                        number, event = self._attempt(after=number)
                    case AskForRoom():
                        event = self._seeker.look(self._state, pause_s=instruction.pause_s)
                    case Finish():
                        return TrainingResult(outcome=instruction.outcome, recovery=self._state.recovery)
                    case _:
                        self._tell(instruction)
            assert event is not None, "a training that has not ended waits for an event"
            instructions = self._decide(event)

    def _decide(self, event: Event) -> tuple[Instruction, ...]:
        self._state, instructions = next_action(self._state, event, self._rules)
        return instructions

    def _tell(self, instruction: Tell | LogRecovery | GiveUp) -> None:
        match instruction:
            case Tell():
                self._watcher.on_retry(instruction.text)
            case LogRecovery():
                self._watcher.on_recovery(instruction.step, asdict(self._state.recovery))
            case GiveUp():
                raise instruction.error from instruction.cause
            case _:
                assert_never(instruction)

    def _attempt(self, *, after: int) -> tuple[int, Ended]:
        """One attempt, whose time counts from here: (its number, how it ended)."""
        plan, cause = self._state.plan, self._state.cause
        self._seeker.found()
        if self._capacity is not None:
            self._capacity.start(plan, without=self._state.bad_nodes)
        self._attempts.keep(plan.kept)
        self._clock.attempt_starts()
        number = self._attempts.open(workers=plan.workers, cause=cause, after=after)
        self._watcher.on_attempt(number, attempt_in_words(plan, cause))
        started_s, held = self._attempts.started_s(number), self._attempts.held()
        try:
            end = run_attempt(
                replace(self._job, plan=plan, attempt=number, started_s=started_s, held_before=held),
                replace(self._watcher, on_progress=self._hearing_of_the_beginning()),
                partial(self._look_out, plan),
                without_nodes=self._state.bad_nodes,
            )
        finally:
            with suppress(StorageError):  # how the attempt ended is told, not this
                self._attempts.close(number)
        self._watcher.on_attempt(number, f"{attempt_in_words(plan, cause)}; {_ending(end)}")
        return number, self._ended(end, number)

    def _ended(self, end: AttemptEnd, number: int) -> Ended:
        """What is to be known of an attempt that has ended."""
        ended = Ended(
            attempt=number,
            outcome=end.outcome,
            error=end.error,
            pause=end.pause,
            bad_nodes=end.bad_nodes,
            last_step=end.last_step,
            stop_requested=self._watcher.stop.is_set(),
        )
        if end.error is None:
            return ended
        saved = self._saved_step()
        with suppress(StorageError):  # as far as it is known
            self._attempts.refresh()
        return replace(ended, saved_step=saved, resumed_step=self._attempts.resumed_step(number))

    def _first_plan(self) -> RunPlan:
        """The plan of this command's first attempt: one that keeps what an earlier command's attempts have settled."""
        kept = self._attempts.kept()
        if kept is None or kept == self._job.plan.kept or self._planner is None:
            return self._job.plan
        return self._planner(free_shape(held={}) if self._capacity is None else live_shape(), kept)

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
        elsewhere = self._room(plan, held, without=(*self._state.bad_nodes, node))
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
        claim, without = self._capacity, self._state.bad_nodes
        asked = {} if claim is None else claim.held()
        growth = decide_growth(
            plan.usable_workers,
            running=plan.workers,
            room=self._room(plan, added_up(held, asked), without=without),
            timing=self._timing(progress),
            can_ask=claim is not None and can_grow(),
            others_wait=claim is not None and claim.others_wait(),
        )
        if growth.size.act:
            return Pause(kind="resize", reason=growth.size.reason, workers=growth.size.workers)
        if claim is not None:
            claim.ask(plan, growth.ask_for, without=without)
        return None

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

    def _hearing_of_the_beginning(self) -> Callable[[Mapping[str, Any]], None]:
        """Passes progress on; the first of an attempt says where it begins."""
        first = True

        def heard(progress: Mapping[str, Any]) -> None:
            nonlocal first
            if first:
                first = False
                self._clock.training_starts()
                if self._capacity is not None:
                    self._capacity.started()
                for instruction in self._decide(Began(step=int(progress["step"]))):
                    assert isinstance(instruction, LogRecovery), "nothing else follows from a beginning"
                    self._tell(instruction)
            self._watcher.on_progress(progress)

        return heard

    def _saved_step(self) -> int | None:
        """Of the newest checkpoint; as it was known last where the storage does not answer."""
        with suppress(OSError, StorageError):
            self._saved = max(catalog.steps(self._job.checkpoints, void=self._attempts.is_void), default=None)
        return self._saved
