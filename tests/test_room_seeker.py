"""How long a training has looked for room, and what it is planned as once there is some; without Ray or a clock."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any, cast

import pytest

from orchestrator.errors import CapacityError, Interrupted
from orchestrator.planning.run_plan import ClusterShape, Kept, RunPlan
from orchestrator.scheduling.capacity import Capacity, RoomSeeker, Why, wait_for_room
from orchestrator.scheduling.decisions.next_action import Rules, RunState
from tests.test_out_of_memory import planned

PLAN = planned(2, 4, 2)
RULES = Rules(max_failures=0, capacity_timeout_s=60, asks_for_room=True)


class Claim:
    """A claim on a cluster that others leave at `others_until_s`, and that has room from `room_from_s` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, others_until_s: float, room_from_s: float) -> None:
        self.now_s, self._others_until_s, self._room_from_s = 0.0, others_until_s, room_from_s
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def room(self, plan: RunPlan, **_: Any) -> None:
        if self.now_s < self._room_from_s:
            raise CapacityError("no room")

    def lacks(self, plan: RunPlan, short: CapacityError, **_: Any) -> Why:
        others = self.now_s < self._others_until_s
        return Why(text="others" if others else "nodes", others_turn=others)


def fits(room: ClusterShape, kept: Kept | None) -> RunPlan:
    return replace(PLAN, reasons=("planned anew",))


def waited(claim: Claim, *, stop: threading.Event | None = None) -> list[str]:
    said: list[str] = []
    wait_for_room(PLAN, fits, cast(Capacity, claim), RULES, say=said.append, stop=stop or threading.Event())
    return said


def test_patience_is_for_the_cluster_and_not_for_other_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim(monkeypatch, others_until_s=1000, room_from_s=1050)
    assert waited(claim) == [
        "waiting for room: others",
        "waiting for room, 60 s at most: nodes",
        "starting workers",
    ]
    assert claim.now_s == 1050
    with pytest.raises(CapacityError, match="no room for the workers for 60 s") as given_up:
        waited(Claim(monkeypatch, others_until_s=1000, room_from_s=2000))
    assert given_up.value.got == "nodes"


def test_a_wish_to_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="waited for room"):
        waited(Claim(monkeypatch, others_until_s=10, room_from_s=20), stop=stop)


def test_a_first_attempt_is_carried_out_as_it_was_planned_and_a_later_one_as_its_room_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = cast(Capacity, Claim(monkeypatch, others_until_s=0, room_from_s=0))
    seeker = RoomSeeker(fits, claim, stop=threading.Event())
    state = RunState(plan=PLAN, cause="")
    assert seeker.look(state, pause_s=0).found is PLAN
    assert seeker.look(replace(state, has_begun=True), pause_s=0).found == fits(
        ClusterShape(nodes=(), device_name="cpu"), None
    )
    other_device = replace(PLAN, device_name="another")
    assert seeker.look(RunState(plan=other_device, cause=""), pause_s=0).found != other_device
