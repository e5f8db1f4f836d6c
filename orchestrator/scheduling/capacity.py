"""Room for a training's workers: looked for on the nodes that are up, in the driver's turn, and asked for where there
is too little.

Whether to go on waiting is `next_action`'s to say; here is what it is told.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import CapacityError
from orchestrator.planning.growth import pinned
from orchestrator.planning.run_plan import ClusterShape, Kept, RunPlan
from orchestrator.scheduling import autoscaler
from orchestrator.scheduling.decisions.next_action import (
    AskForRoom,
    GiveUp,
    Room,
    Rules,
    RunState,
    Start,
    Tell,
    first_action,
    next_action,
)
from orchestrator.scheduling.decisions.queueing import Turn, turn_of
from orchestrator.scheduling.queue import Place
from orchestrator.scheduling.session import can_grow, free_shape, limits, live_shape


class Planner(Protocol):
    """Plans a training for the room that there is, keeping what its earlier attempts have settled."""

    def __call__(self, room: ClusterShape, kept: Kept | None) -> RunPlan:
        """Raises CapacityError when there is not room enough."""
        ...


def resources_of_worker(plan: RunPlan) -> dict[str, float]:
    """What Ray sets aside for each worker."""
    resources = {"CPU": float(plan.cpus_per_worker)}
    return resources | {"GPU": float(plan.gpus_per_worker)} if plan.gpus_per_worker else resources


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why a training waits."""

    text: str
    others_turn: bool
    """Whether other trainings come first, or have what it needs."""


class Capacity:
    """A driver's claim on the cluster, from its first question for room to its end."""

    def __init__(self, name: str) -> None:
        self._place = Place(name)
        self._request = autoscaler.Request()
        self._turn: Turn | None = None

    def room(self, plan: RunPlan, *, without: Collection[str] = ()) -> ClusterShape:
        """What a training with workers like the plan's may have now. Raises CapacityError while others come first."""
        self._turn = self._find_turn(plan)
        if not self._turn.may_ask:
            self._request.close()
            raise CapacityError("other trainings come first", got=self._turn.in_words())
        return free_shape(held=self._request.held(), without=without)

    def lacks(self, plan: RunPlan, short: CapacityError, *, without: Collection[str] = ()) -> Why:
        """Why a training waits that found too little room; where it is its turn, the fewest workers that it can do
        with are asked for."""
        assert self._turn is not None, "room was looked for"
        if self._turn.waits_for_others:
            return Why(text=self._turn.in_words(), others_turn=True)
        self.ask(plan, min(plan.usable_workers), without=without)
        return Why(text="; ".join(filter(None, (short.got or short.what, autoscaler.doing()))), others_turn=False)

    def ask(self, plan: RunPlan, workers: int, *, without: Collection[str] = ()) -> None:
        """Asks for nodes for so many workers beside those there are; none lets go of what was asked for."""
        if workers:
            kind = pinned(limits(), plan.device_name) if plan.gpus_per_worker else {}
            self._request.ask([resources_of_worker(plan) | kind] * workers, without=without)
        else:
            self._request.close()

    def held(self) -> dict[str, dict[str, float]]:
        """What was asked for and has come, by Ray's node id."""
        return self._request.held()

    def others_wait(self) -> bool:
        """Whether another training waits for what this one would grow into."""
        return self._place.others_wait()

    def start(self, plan: RunPlan, *, times: int = 1, without: Collection[str] = ()) -> None:
        """There is room: what was asked for is let go, for the workers of so many trainings to take."""
        if can_grow():
            self.ask(plan, plan.workers * times, without=without)
            self._request.renew()
        else:
            self._request.close()
        self._place.take(*_amounts(plan, plan.workers * times), state="starting")

    def started(self) -> None:
        """The workers are there."""
        self._place.has_workers()

    def close(self) -> None:
        """The training has ended."""
        self._request.close()
        self._place.leave()

    def _find_turn(self, plan: RunPlan) -> Turn:
        me = self._place.take(*_amounts(plan, min(plan.usable_workers)))
        shapes = live_shape().reachable
        most = {"CPU": max(one.cpus for one in shapes), "GPU": max(one.gpus for one in shapes)}
        return turn_of(me, self._place.others(), at_most=most)


def _amounts(plan: RunPlan, workers: int) -> tuple[float, float]:
    """(CPU cores, GPUs) of so many workers."""
    own = resources_of_worker(plan)
    return own["CPU"] * workers, own.get("GPU", 0.0) * workers


@contextmanager
def capacity_for(name: str) -> Iterator[Capacity | None]:
    """A claim for the training of that name, given back at the end; None on a private Ray, where nobody else trains."""
    if not os.environ.get("RAY_ADDRESS"):
        yield None
        return
    capacity = Capacity(name)
    try:
        yield capacity
    finally:
        capacity.close()


class RoomSeeker:
    """Looks for room for a training, again and again, and knows how long it has."""

    def __init__(self, planner: Planner | None, capacity: Capacity | None, *, stop: threading.Event) -> None:
        self._planner, self._capacity, self._stop = planner, capacity, stop
        self._since_s: float | None = None

    def found(self) -> None:
        """The next look begins a wait of its own."""
        self._since_s = None

    def look(self, state: RunState, *, pause_s: float) -> Room:
        """What there is now, after a pause."""
        assert self._planner is not None, "without one every attempt is of the size that was planned"
        if pause_s:
            time.sleep(pause_s)
        if self._since_s is None:
            self._since_s = time.monotonic()
        plan, without, claim = state.plan, state.bad_nodes, self._capacity
        found, short, why = None, None, None
        try:
            room = free_shape(held={}, without=without) if claim is None else claim.room(plan, without=without)
            found = self._planner(room, plan.kept)
        except CapacityError as error:
            short = error
            why = None if claim is None else claim.lacks(plan, error, without=without)
        if why is not None and why.others_turn:
            self._since_s = time.monotonic()  # patience is for the cluster: others may take as long as they do
        return Room(
            waited_s=time.monotonic() - self._since_s,
            found=found if found is None else _as_planned(found, state),
            short=short,
            waits_for=None if why is None else why.text,
            others_turn=why is not None and why.others_turn,
            stop_requested=self._stop.is_set(),
        )


def _as_planned(found: RunPlan, state: RunState) -> RunPlan:
    """The first attempt is carried out as it was planned, where there is room for that."""
    plan = state.plan
    as_planned = (found.workers, found.device_name) == (plan.workers, plan.device_name)
    return plan if as_planned and not state.has_begun else found


def wait_for_room(
    plan: RunPlan,
    planner: Planner,
    capacity: Capacity,
    rules: Rules,
    *,
    say: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Returns once there is room for a plan's workers. Raises what `next_action` gives up with: CapacityError after
    the time that the rules allow, Interrupted when asked to stop."""
    seeker = RoomSeeker(planner, capacity, stop=stop)
    state, instructions = first_action(RunState(plan=plan, cause=""), rules, shares_cluster=True)
    while True:
        event: Room | None = None
        for instruction in instructions:
            match instruction:
                case Start():
                    return
                case GiveUp():
                    raise instruction.error from instruction.cause
                case Tell():
                    say(instruction.text)
                case AskForRoom():
                    event = seeker.look(state, pause_s=instruction.pause_s)
        assert event is not None, "what waits asks again"
        state, instructions = next_action(state, event, rules)
