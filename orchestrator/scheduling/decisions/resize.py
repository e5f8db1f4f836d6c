"""How many workers a run should have now, and whether to leave a node that holds it up. Pure; `run_training` acts on
it, between attempts or by draining one.

Growing and leaving save first, so they cost one restart and no step. They have to pay for that twice: over the time the
attempt has lasted, and over what the run has left to do. The first keeps a node that comes and goes from making a run
restart all the time: like renting until the rent would have bought the house, it never costs much more than knowing the
future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.quantities import human_duration

PAYBACK = 2.0
"""A change must gain so many restarts: steps get faster by less than workers are added, and restarts vary (a guess)."""


@dataclass(frozen=True, kw_only=True)
class SizeDecision:
    """The number of workers to have, and whether to do something about it."""

    workers: int | None
    """None where there is no room for the smallest size: wait."""
    act: bool
    """Whether to start an attempt of that size, ending the present one with a checkpoint first."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a change is weighed by; the defaults are those of a training that does not run."""

    since_start_s: float = 0.0
    """How long the attempt has trained."""
    step_s: float | None = None
    """Time of a step at the present size; None while it is not known."""
    restart_s: float = 0.0
    """From a wish to change to the first new step."""
    steps_left: int = 0


def decide_size(usable: Sequence[int], *, running: int | None, room: int, timing: Timing = Timing()) -> SizeDecision:
    """The size to go on with: the largest that has room, unless growing to it would not pay.

    `usable` are the sizes that the run may take, `running` its present number of workers (None between attempts), and
    `room` how many it could have, those it has included.
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
    saved_share = 1 - running / largest  # if steps get faster as workers are added
    return _if_it_pays(f"growing from {running} to {_workers(largest)}", running, largest, saved_share, timing)


@dataclass(frozen=True, kw_only=True)
class GrowthDecision:
    """Whether to grow now, and what to ask an autoscaler for so as to grow later."""

    size: SizeDecision
    ask_for: int
    """Workers beside the running ones; 0 lets go of what was asked for."""


def decide_growth(
    usable: Sequence[int], *, running: int, room: int, timing: Timing, can_ask: bool, others_wait: bool
) -> GrowthDecision:
    """What a running elastic training does about the next larger sizes.

    It takes the room that there is where that pays, and asks for the next size where growing to it would pay, so that
    no node is started for nothing. Others that wait for some come first. `room` is as in `decide_size`, what was asked
    for and has come included.
    """
    if others_wait:
        size = SizeDecision(workers=running, act=False, reason="another training waits for what it would grow into")
        return GrowthDecision(size=size, ask_for=0)
    if room > running:
        size = decide_size(usable, running=running, room=room, timing=timing)
        return GrowthDecision(size=size, ask_for=size.workers - running if size.workers and size.act else 0)
    larger = min((size for size in usable if size > running), default=None)
    stay = SizeDecision(workers=running, act=False, reason=_why_largest(usable, running, max(room, running)))
    if larger is None or not can_ask:
        return GrowthDecision(size=stay, ask_for=0)
    wish = decide_size(usable, running=running, room=larger, timing=timing)
    return GrowthDecision(
        size=SizeDecision(workers=running, act=False, reason=wish.reason), ask_for=larger - running if wish.act else 0
    )


def decide_leaving(ratio: float, *, running: int, elsewhere: int, timing: Timing) -> SizeDecision:
    """Whether to leave the node of a straggler, whose work takes `ratio` times as long as the others'.

    `elsewhere` is how many workers the run may have without that node, 0 where it cannot do without.
    """
    saved_share = 1 - running / elsewhere / ratio if elsewhere else 0.0
    if saved_share <= 0:
        reason = f"without its node there is room for only {elsewhere} of {_workers(running)}"
        return SizeDecision(workers=running, act=False, reason=reason)
    change = f"leaving its node, with {_workers(elsewhere)} elsewhere,"
    return _if_it_pays(change, running, elsewhere, saved_share, timing)


def _if_it_pays(change: str, running: int, workers: int, saved_share: float, timing: Timing) -> SizeDecision:
    """A change to `workers` that saves a share of the time, if it pays both over the time behind and the time ahead."""

    def stay(reason: str) -> SizeDecision:
        return SizeDecision(workers=running, act=False, reason=reason)

    if timing.step_s is None:
        return stay("no step was timed yet at this size")
    needed_s = PAYBACK * timing.restart_s / saved_share
    left_s = timing.steps_left * timing.step_s
    left, restart = human_duration(left_s), human_duration(timing.restart_s)
    if left_s < needed_s:
        return stay(f"{change} would not pay in the {left} that are left: a restart takes {restart}")
    if timing.since_start_s < needed_s:
        return stay(
            f"{change} waits until {human_duration(needed_s)} after the attempt began, so that the run does not keep "
            f"restarting; {human_duration(timing.since_start_s)} have passed"
        )
    return SizeDecision(
        workers=workers,
        act=True,
        reason=f"{change} saves up to {human_duration(saved_share * left_s)} of the {left} that are left, and a "
        f"restart takes {restart}",
    )


def _why_largest(usable: Sequence[int], size: int, room: int) -> str:
    if size == max(usable):
        return f"{_workers(size)}, the most that the run may have"
    return f"{_workers(size)}, the largest of the sizes {', '.join(map(str, usable))} with room for {room}"


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"
