"""Successive halving, decided: at which steps the trials of a search are compared, and which of them go on. No Ray.

A rung is an optimizer step. Every trial is evaluated exactly there, whatever its `training.eval_every_steps`, and is
compared by that value alone with what others had at the same step: one that is better at every step is never stopped.
Trials of different lengths meet at the rungs before the end of the shorter one, which takes no part in later ones; its
last value counts for a rung only where its last step is that rung. A longer trial is then at an earlier place of its
learning rate's schedule: what is compared is what so many steps have brought.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import StorageError
from orchestrator.ranking import WORST


@dataclass(frozen=True, kw_only=True)
class RungDecision:
    """Whether a trial goes on after a rung, and why."""

    go_on: bool
    reason: str


def rung_steps(*, grace: int | None, intervals: Sequence[int], reduction_factor: int, longest: int) -> tuple[int, ...]:
    """Steps of the rungs, ascending: from the grace on, each `reduction_factor` times as far as the one before.

    They lie where a trial with the shortest of `intervals` is evaluated anyway. A grace below that (or None) is that:
    nobody has a value earlier, and a rung there would be one halving more. None lies at or after `longest`, the last
    step of the longest trial, since nothing is left to stop there.
    """
    if not intervals:
        return ()
    interval = min(intervals)
    first = max(grace or 0, interval)
    steps = []
    milestone = first
    while (step := math.ceil(milestone / interval) * interval) < longest:
        steps.append(step)
        milestone *= reduction_factor
    return tuple(steps)


def rungs_of_trials(
    trials: Sequence[tuple[int | None, int]], *, grace: int | None, reduction_factor: int
) -> list[tuple[int, ...]]:
    """The rungs of each of some trials, given its evaluation interval and its steps.

    A trial without an interval, which is evaluated at its end only, takes no part.
    """
    judged = [(every, length) for every, length in trials if every is not None]
    steps = rung_steps(
        grace=grace,
        intervals=[every for every, _ in judged],
        reduction_factor=reduction_factor,
        longest=max((length for _, length in judged), default=0),
    )
    return [() if every is None else tuple(step for step in steps if step <= length) for every, length in trials]


def decide(goodness: float, earlier: Sequence[float], *, reduction_factor: int) -> RungDecision:
    """Stops a trial that is not among the best `1 / reduction_factor` of those that were at the rung before it.

    Larger is better, minus infinity for a value that is no number. This is asynchronous successive halving as Ray's
    ASHA decides (Li et al. 2020): the quantile is interpolated, a trial that equals it goes on, and so does the first.
    """
    if not earlier:
        return RungDecision(go_on=True, reason="it is the first here")
    cutoff = _quantile(earlier, 1 - 1 / reduction_factor)
    compared = f"{'at least' if goodness >= cutoff else 'below'} what the best 1 of {reduction_factor} had here"
    return RungDecision(go_on=goodness >= cutoff, reason=compared)


def _quantile(values: Sequence[float], share: float) -> float:
    """Interpolated between neighbours in order; nothing lies between minus infinity and a number."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    if low == high or place == below or math.isinf(low):
        return low
    return min(high, low + (high - low) * (place - below))


class Rungs:
    """What each trial had at each rung and what was decided then, in the order of their coming.

    Kept in a file, so that a search that goes on after any stop decides as if it had not stopped: a trial that replays
    its evaluations is not judged a second time, by others that came after it. Raises StorageError when it cannot be.
    """

    def __init__(self, file: Path, *, reduction_factor: int, show: Callable[[], None] = lambda: None) -> None:
        """`show` makes the file visible to a driver elsewhere: before its trial is told, and may act on it."""
        self._file, self._factor, self._show = file, reduction_factor, show
        self._kept: dict[str, dict[str, dict[str, Any]]] = read_json(file) or {}

    def judge(self, trial: str, step: int, goodness: float, *, is_its_end: bool) -> RungDecision:
        """What becomes of a trial at a rung; one that is at its end has nothing to lose, but others are compared with
        it."""
        here = self._kept.setdefault(str(step), {})
        if trial in here:
            return RungDecision(go_on=here[trial]["go_on"], reason=here[trial]["reason"])
        earlier = [WORST if other["value"] is None else other["value"] for other in here.values()]
        decision = decide(goodness, earlier, reduction_factor=self._factor)
        if is_its_end:
            decision = RungDecision(go_on=True, reason="it is at its end")
        value = goodness if math.isfinite(goodness) else None
        here[trial] = {"value": value, "go_on": decision.go_on, "reason": decision.reason}
        try:
            write_json(self._file, self._kept)
        except OSError as error:
            raise StorageError(
                "what trials are compared by cannot be kept", got=f"{self._file} ({error})", do="free space"
            ) from error
        self._show()
        return decision
