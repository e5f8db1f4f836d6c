"""What a driver does next with a training: a pure state machine. `run_training` carries out its instructions.

`next_action` takes what is known of a training and what has just happened, and gives what is known now and what to do.
It starts nothing, waits for nothing and reads no clock, so that every order of events can be tried without Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from orchestrator.errors import CapacityError, Interrupted, OrchestratorError
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.job import Outcome
from orchestrator.runs.out_of_memory import smaller_micro_batch
from orchestrator.scheduling.decisions.retry import Tally, decide_retry, kind_of
from orchestrator.spec_survival import ResourcesSpec

ROOM_EVERY_S = 1.0
"""How often the cluster is asked for room while a training waits for it."""
SETTLE_S = 5.0
"""What a lost worker group held is free again within this time (a guess; 1 to 2 s were seen on one machine)."""
_COUNTED = {"preemption": "preemptions", "resize": "resizes", "straggler": "moves"}
"""Kinds of pauses by the field of `Recovery` that counts them."""
_FIRST = "starting workers"
_WITH_LESS_MEMORY = ", and fits sooner with more workers, deepspeed.zero_stage=3 or, on GPUs, deepspeed.offload=all"


@dataclass(frozen=True, kw_only=True)
class Pause:
    """Why an attempt is asked to save and end, so that another can go on."""

    kind: Literal["resize", "preemption", "straggler"]
    reason: str
    workers: int | None = None
    """How many the next attempt should have; None where that depends on the room there will be."""
    bad_nodes: tuple[str, ...] = ()
    """Ray's ids of nodes that the next attempt should do without."""


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

    def with_one_more(self, what: str) -> Recovery:
        """The same with one of its counts raised."""
        return replace(self, **{what: getattr(self, what) + 1})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for all attempts of a training."""

    max_failures: int
    """Lost workers in a row without progress, at most."""
    capacity_timeout_s: float
    """How long it waits for room."""
    asks_for_room: bool
    """Whether an attempt takes the size that there is room for; else all are of the size that was planned."""

    @classmethod
    def of(cls, resources: ResourcesSpec, *, asks_for_room: bool = True) -> Rules:
        """The rules that a spec sets."""
        return cls(
            max_failures=resources.max_failures,
            capacity_timeout_s=resources.capacity_timeout_s,
            asks_for_room=asks_for_room,
        )


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What is known of a training between two events."""

    plan: RunPlan
    """Of the running attempt, or while there is none of the last one."""
    cause: str
    """Why the running or the next attempt is there."""
    recovery: Recovery = Recovery()
    tally: Tally = field(default_factory=Tally)
    failed_at: int | None = None
    """The newest step of a failed attempt, until it is known where the next one goes on."""
    bad_nodes: tuple[str, ...] = ()
    """Ray's ids of nodes whose ranks hung or held up the others; left out while there is room elsewhere."""
    notes: tuple[str, ...] = ()
    """What was changed to go on, for the user."""
    wanted: int = 0
    """Workers that the next attempt should have."""
    has_begun: bool = False
    """Whether there was an attempt since this command began; before the first there is nothing to recover from."""
    said: str = ""
    """Why the user was told last that it waits."""


# -- what happens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An attempt has ended: with an outcome or an error."""

    attempt: int
    outcome: Outcome | None = None
    error: OrchestratorError | None = None
    pause: Pause | None = None
    """Why it was asked to end, where it was not the user who asked."""
    bad_nodes: tuple[str, ...] = ()
    last_step: int | None = None
    """The newest step that the driver has heard of; None when there was none."""
    saved_step: int | None = None
    """Of the newest checkpoint."""
    resumed_step: int | None = None
    """Where the attempt had gone on from."""
    stop_requested: bool = False


@dataclass(frozen=True, kw_only=True)
class Room:
    """The cluster has been asked for room: a plan that fits it, or why none does."""

    waited_s: float
    """Since it was asked first, or since other trainings were served."""
    found: RunPlan | None = None
    short: CapacityError | None = None
    waits_for: str | None = None
    """Why it waits, where others want the cluster too or nodes were asked for."""
    others_turn: bool = False
    """Whether other trainings come first, or have what this one needs."""
    stop_requested: bool = False


@dataclass(frozen=True, kw_only=True)
class Began:
    """The first progress of an attempt has been heard of, at this step."""

    step: int


Event = Ended | Room | Began


# -- what to do ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Start:
    """Begin an attempt by the state's plan and cause."""


@dataclass(frozen=True, kw_only=True)
class AskForRoom:
    """Ask the cluster for room outside of the state's bad nodes."""

    pause_s: float
    """To wait before."""


@dataclass(frozen=True, kw_only=True)
class Tell:
    """Tell the user."""

    text: str


@dataclass(frozen=True, kw_only=True)
class LogRecovery:
    """Log the state's recovery."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The training has ended."""

    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """The training has failed: raise."""

    error: OrchestratorError
    cause: OrchestratorError | None = None


Instruction = Start | AskForRoom | Tell | LogRecovery | Finish | GiveUp
Next = tuple[RunState, tuple[Instruction, ...]]


def next_action(state: RunState, event: Event, rules: Rules) -> Next:
    """(what is known now, what to do in this order). After `Start` and `AskForRoom` the next event is awaited; after
    `Finish` and `GiveUp` there is none."""
    match event:
        case Ended():
            return _after_end(state, event, rules)
        case Room():
            return _after_look(state, event, rules)
        case Began():
            return _after_beginning(state, event)
        case _:
            assert_never(event)


def _after_end(state: RunState, end: Ended, rules: Rules) -> Next:
    state = replace(state, has_begun=True)
    if end.outcome is not None and (end.pause is None or end.outcome.status != "interrupted"):
        return state, (Finish(outcome=replace(end.outcome, notes=(*state.notes, *end.outcome.notes))),)
    bad_nodes = tuple(dict.fromkeys((*state.bad_nodes, *end.bad_nodes)))  # several ranks of one node may have hung
    state = replace(state, bad_nodes=bad_nodes, wanted=state.plan.workers)
    if end.error is not None:
        return _after_failure(state, end, end.error, rules)
    assert end.pause is not None, "an attempt is interrupted by its user or for a reason"
    state = replace(
        state,
        recovery=state.recovery.with_one_more(_COUNTED[end.pause.kind]),
        cause=end.pause.reason,
        wanted=end.pause.workers or state.plan.workers,
    )
    return _another(state, rules)


def _after_failure(state: RunState, end: Ended, error: OrchestratorError, rules: Rules) -> Next:
    kind, smaller = kind_of(error), smaller_micro_batch(state.plan)
    progressed = end.saved_step is not None and end.saved_step > (end.resumed_step or 0)
    tally = state.tally if kind is None else state.tally.after(kind, progressed=progressed)
    decision = decide_retry(
        error,
        failures=0 if kind is None else tally.of(kind),
        max_failures=rules.max_failures,
        can_split=smaller is not None,
    )
    state = replace(state, tally=tally)
    if not decision.retry or end.stop_requested:
        last_word = given_up(error, reason=decision.reason, attempts=end.attempt, saved_step=end.saved_step)
        return state, (GiveUp(error=last_word, cause=error),)
    cause = f"{error.what}: {decision.reason}"
    if decision.smaller_steps:
        assert smaller is not None, "it was decided on"
        cause = f"{cause}, {smaller.micro_batch} instead of {state.plan.micro_batch}"
        state = replace(state, plan=smaller, notes=(*state.notes, smaller.reasons[-1]))
    recovery = state.recovery.with_one_more("restarts")
    return _another(replace(state, recovery=recovery, failed_at=end.last_step, cause=cause), rules)


def _another(state: RunState, rules: Rules) -> Next:
    """Another attempt, once there is room for it."""
    if not rules.asks_for_room:
        return state, (Tell(text=state.cause), Start())
    return replace(state, said=""), (AskForRoom(pause_s=0.0),)


def first_action(state: RunState, rules: Rules, *, shares_cluster: bool) -> Next:
    """What a command begins with: on a cluster that others use too, with a question for room."""
    state = replace(state, wanted=state.plan.workers)
    if shares_cluster and rules.asks_for_room:
        return state, (AskForRoom(pause_s=0.0),)
    return state, (Tell(text=_FIRST), Start()) if rules.asks_for_room else (Start(),)


def _after_look(state: RunState, room: Room, rules: Rules) -> Next:
    """What the last attempt held takes a while to be free: a smaller size than is wanted is taken only after that."""
    has_settled = room.waited_s > SETTLE_S
    told: tuple[Instruction, ...] = ()
    if room.found is not None and (room.found.workers >= state.wanted or has_settled):
        return replace(state, plan=room.found), (Tell(text=state.cause if state.has_begun else _FIRST), Start())
    if room.others_turn:
        state, told = _say(state, f"waiting for room: {room.waits_for}")
    elif room.short is not None:
        if state.bad_nodes and has_settled:  # better a node that hung once than none
            return replace(state, bad_nodes=state.bad_nodes[1:]), (AskForRoom(pause_s=0.0),)
        if room.waited_s > rules.capacity_timeout_s:
            return state, (GiveUp(error=_no_room(room, room.short, rules.capacity_timeout_s), cause=room.short),)
        if has_settled or not state.has_begun:
            why = room.waits_for or room.short.got
            state, told = _say(state, f"waiting for room, {rules.capacity_timeout_s:.0f} s at most: {why}")
    if room.stop_requested:
        stopped = Interrupted("stopped while it waited for room", do="the same command goes on")
        return state, (*told, GiveUp(error=stopped))
    return state, (*told, AskForRoom(pause_s=ROOM_EVERY_S))


def _say(state: RunState, text: str) -> Next:
    """Tells the user, unless that was the last thing said."""
    return (state, ()) if text == state.said else (replace(state, said=text), (Tell(text=text),))


def _after_beginning(state: RunState, began: Began) -> Next:
    if state.failed_at is not None:
        lost = max(0, state.failed_at - began.step)
        recovery = replace(state.recovery, lost_steps=state.recovery.lost_steps + lost)
        state = replace(state, recovery=recovery, failed_at=None)
    return state, () if state.recovery == Recovery() else (LogRecovery(step=began.step),)


def _no_room(room: Room, error: CapacityError, timeout_s: float) -> CapacityError:
    return CapacityError(
        f"there was no room for the workers for {timeout_s:.0f} s",
        got=room.waits_for or error.got,
        allowed=error.allowed,
        do="join nodes, or raise resources.capacity_timeout_s; the same command then goes on",
    )


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
