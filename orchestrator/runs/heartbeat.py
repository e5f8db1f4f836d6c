"""The heartbeat of a rank: its phase, the time in that phase, and what its own work takes without waiting for others.

The training loop marks a `Heartbeat`, the control channel's thread reads it, and `scheduling.decisions.liveness` judges
the heartbeats of all ranks. No torch here: a driver stays light.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["starting", "loading", "computing", "waiting", "evaluating", "saving", "exporting"]

_RECENT_STEPS = 20
"""The usual time of a step is the median of so many recent ones."""
_STRETCH_S = 1.0
"""Own work is averaged over stretches of at least one step and so long: a short step falls between two time slices of a
shared core, a second holds hundreds of them."""
_STRETCHES = 16
"""Own work is known after so many stretches, and is that of the most recent ones (a guess)."""
_LONGEST_GAP_S = 15.0
"""Counted at most between two looks: a process that was itself stopped did not see that long a standstill."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a heartbeat says at one moment. Durations only, by this rank's own clock: hosts' clocks differ."""

    phase: Phase
    step: int
    """Optimizer steps done before this phase."""
    still_s: float
    """Seconds since anything moved: a mark by the loop, or a collective that was begun."""
    collectives: int
    """Collective operations begun by this process; the rank that holds up the others has begun fewer."""
    usual_step_s: float | None = None
    """Median seconds of this attempt's recent steps, None before it has taken two."""
    own_low_s: float | None = None
    """Seconds of own work a step: three quarters of the recent 16 stretches, each of a second or a step, took longer.
    None before there are so many, and where own work is not measured."""
    own_high_s: float | None = None
    """As `own_low_s`, but one quarter took longer."""


def _none_begun() -> int:
    return 0


class Heartbeat:
    """Marked by one thread (0.3 us a mark), read by another; a mark is one assignment, so neither needs a lock."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._collectives: Callable[[], int] = _none_begun
        self._mark: tuple[Phase, int] = ("starting", 0)
        self._step_began: tuple[int, float] | None = None
        self._steps_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._own_s: deque[float] = deque(maxlen=_STRETCHES)
        self._stretch: list[float] = []
        self._stretch_began = clock()
        self._seen: tuple[tuple[Phase, int], int] = (self._mark, 0)
        self._looked, self._still_s = clock(), 0.0

    def enter(self, phase: Phase, step: int) -> None:
        """The loop begins a phase, or a new part of it, after `step` optimizer steps."""
        self._mark = (phase, step)
        if phase == "computing":
            self._begin_step(step)

    def computed(self, own_s: float) -> None:
        """A step took so many seconds of this rank's own work, waiting for others left out."""
        self._stretch.append(own_s)
        now = self._clock()
        if now - self._stretch_began >= _STRETCH_S:
            self._own_s.append(statistics.fmean(self._stretch))
            self._stretch, self._stretch_began = [], now

    def count(self, collectives: Callable[[], int]) -> None:
        """From now on `collectives()` says how many collective operations this process has begun."""
        self._collectives = collectives

    def beat(self) -> Beat:
        """What it says now. Called by one thread, regularly: standing still is what it saw between its looks."""
        now, mark, collectives = self._clock(), self._mark, self._collectives()
        if mark is self._seen[0] and collectives == self._seen[1]:
            self._still_s += min(now - self._looked, _LONGEST_GAP_S)
        else:
            self._seen, self._still_s = (mark, collectives), 0.0
        self._looked = now
        steps_s, own_s = list(self._steps_s), sorted(self._own_s)
        is_known = len(own_s) == _STRETCHES
        return Beat(
            phase=mark[0],
            step=mark[1],
            still_s=self._still_s,
            collectives=collectives,
            usual_step_s=statistics.median(steps_s) if steps_s else None,
            own_low_s=own_s[_STRETCHES // 4] if is_known else None,
            own_high_s=own_s[-1 - _STRETCHES // 4] if is_known else None,
        )

    def _begin_step(self, step: int) -> None:
        now = self._clock()
        if self._step_began is not None and step == self._step_began[0] + 1:
            self._steps_s.append(now - self._step_began[1])
        self._step_began = (step, now)


def posting_period_s(world_size: int) -> float:
    """How often each rank posts its heartbeat, so that all of them together write at most 100 times a second."""
    return max(1.0, world_size / 100)
