"""How many workers an elastic run should have now. Pure; `train_run` acts on it, between attempts or by draining one.

Growing saves first, so it costs one restart and no step. It has to pay for that twice: over the time the run has been
at its size, and over what it has left to do. The first keeps a node that comes and goes from making a run restart all
the time: like renting until the rent would have bought the house, it never costs much more than knowing the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.quantities import human_duration

PAYBACK = 2.0
"""Growing must gain so many restarts: steps get faster by less than workers are added, and restarts vary (a guess)."""


@dataclass(frozen=True, kw_only=True)
class SizeDecision:
    """The number of workers to have, and whether to do something about it."""

    workers: int | None
    """None where there is no room for the smallest size: wait."""
    act: bool
    """Whether to start an attempt of that size, ending the present one with a checkpoint first."""
    reason: str


def decide_size(
    usable: Sequence[int],
    *,
    running: int | None,
    room: int,
    since_last_resize_s: float = 0.0,
    step_s: float | None = None,
    restart_s: float = 0.0,
    steps_left: int = 0,
) -> SizeDecision:
    """The size to go on with: the largest that has room, unless growing to it would not pay.

    `usable` are the sizes that the run may take, `running` its present number of workers (None between attempts), and
    `room` how many it could have, those it has included. `step_s` is the time of a step at the present size, None while
    it is not known; `restart_s` that from a wish to grow to the first new step.
    """
    fitting = [size for size in usable if size <= room]
    if not fitting:
        return SizeDecision(
            workers=None,
            act=running is not None,
            reason=f"there is room for {_workers(room)}, and the run needs at least {min(usable)}",
        )
    largest = max(fitting)
    if running is None:
        return SizeDecision(workers=largest, act=True, reason=_why_largest(usable, largest, room))
    if room < running:
        return SizeDecision(
            workers=largest, act=True, reason=f"there is room for only {room} of {_workers(running)}: {largest} go on"
        )
    if largest <= running:
        return SizeDecision(workers=running, act=False, reason=_why_largest(usable, running, room))
    return _grow(
        running, largest, since_s=since_last_resize_s, step_s=step_s, restart_s=restart_s, steps_left=steps_left
    )


def _grow(
    running: int, larger: int, *, since_s: float, step_s: float | None, restart_s: float, steps_left: int
) -> SizeDecision:
    """Whether growing pays, both over the time behind and over the time ahead."""
    if step_s is None:
        return SizeDecision(workers=running, act=False, reason="no step was timed yet at this size")
    saved_share = 1 - running / larger  # of the time, if steps get faster as workers are added
    needed_s = PAYBACK * restart_s / saved_share
    left_s = steps_left * step_s
    growing = f"growing from {running} to {_workers(larger)}"
    if left_s < needed_s:
        return SizeDecision(
            workers=running,
            act=False,
            reason=f"{growing} would not pay in the {human_duration(left_s)} that are left: a restart takes "
            f"{human_duration(restart_s)}",
        )
    if since_s < needed_s:
        return SizeDecision(
            workers=running,
            act=False,
            reason=f"{growing} waits until {human_duration(needed_s)} after the last change of size, so that the run "
            f"does not keep restarting; {human_duration(since_s)} have passed",
        )
    return SizeDecision(
        workers=larger,
        act=True,
        reason=f"{growing} saves up to {human_duration(saved_share * left_s)} of the {human_duration(left_s)} that are "
        f"left, and a restart takes {human_duration(restart_s)}",
    )


def _why_largest(usable: Sequence[int], size: int, room: int) -> str:
    if size == max(usable):
        return f"{_workers(size)}, the most that the run may have"
    return f"{_workers(size)}, the largest of the sizes {', '.join(map(str, usable))} with room for {room}"


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"
