"""What a checkpoint costs the training that makes it, measured as it goes: one half of `checkpoint.every_steps: auto`.

Comes in: the seconds of every step, and when a checkpoint was being written behind it. Goes out: a `CheckpointCost`.
Rank 0's view: its write ends when the checkpoint is complete, so it lasts as long as any rank's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import fmean, median

from orchestrator.checkpoints.async_writer import SaveTimes
from orchestrator.planning.checkpoint_interval import CheckpointCost

PRIOR_SLOWDOWN = 0.35
"""By how much longer steps take while a checkpoint is written, as a share, until a run has seen it: 1.3 to 1.4 times
were measured on two cores (README, "How fast"). Elsewhere a guess, and on the high side: a GPU does not write."""

_RECENT_SAVES = 5
_RECENT_STEPS = 64
"""Steps without a write that the others are compared with: enough for a steady median, few enough to follow a drift."""


class SaveCost:
    """The mean cost of the newest checkpoints."""

    def __init__(self) -> None:
        self._undisturbed_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._disturbed_s: list[float] = []
        self._late_s: deque[float] = deque(maxlen=_RECENT_SAVES)
        self._saves: deque[SaveTimes] = deque(maxlen=_RECENT_SAVES)
        self._is_writing = False

    def add_step(self, seconds: float, *, is_writing: bool) -> None:
        """A step was taken; `is_writing` says whether a checkpoint is still being written at its end."""
        (self._disturbed_s if self._is_writing else self._undisturbed_s).append(seconds)
        self._is_writing = is_writing

    def save_begins(self, finished: Iterable[SaveTimes]) -> None:
        """Another checkpoint is handed over; `finished` are those that were completed since the last one was."""
        if self._disturbed_s and self._undisturbed_s:
            usual_s = median(self._undisturbed_s)
            # Below zero by chance where a write costs nothing: kept, so that the mean is of all.
            self._late_s.append(sum(seconds - usual_s for seconds in self._disturbed_s))
        self._disturbed_s.clear()
        self._saves.extend(finished)
        self._is_writing = True

    def mean(self) -> CheckpointCost | None:
        """Of the newest few; None before the first was complete."""
        if not self._saves:
            return None
        write_s = fmean(times.writing_s for times in self._saves)
        unseen_s = write_s * PRIOR_SLOWDOWN / (1 + PRIOR_SLOWDOWN)
        return CheckpointCost(
            blocked_s=fmean(times.blocked_s for times in self._saves),
            write_s=write_s,
            late_s=max(0.0, fmean(self._late_s)) if self._late_s else unseen_s,
        )
