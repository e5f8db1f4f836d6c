"""What a strategy is expected to give: what `labelled_quality` and `language_quality` return, and `advise` compares."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from orchestrator.intervals import Z90, Interval

if TYPE_CHECKING:
    from orchestrator.policy.corrections import Corrected, Correction


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """Quality of one strategy. `badness` is what is compared: lower is better, and differences are what evidence knows.

    For labelled data it is the natural logarithm of the error rate, for raw text nats per token.
    """

    badness: float
    spread: float
    """Standard deviation of the part of `badness` that is this strategy's own; the task's part is common to all."""
    kind: Literal["error", "loss"]
    shared: float
    """Standard deviation of the part that is common to all strategies on a task: how hard the task is."""
    forgetting: float = 0.0
    """How much worse the base model gets at what it could do, in the unit of `badness`."""
    reasons: tuple[str, ...] = ()
    """Why, each with the evidence or law it rests on."""
    rule_of_thumb: bool = False
    """Whether no law or measurement backs the figure, only practice."""

    @property
    def score(self) -> Interval | None:
        """Expected accuracy, 0 to 1; None for raw text."""
        if self.kind != "error":
            return None
        wide = Z90 * math.hypot(self.spread, self.shared)
        ends = (1 - min(1.0, math.exp(self.badness + sign * wide)) for sign in (1, 0, -1))
        low, mid, high = ends
        return Interval(low=low, mid=mid, high=high)

    @property
    def loss(self) -> Interval | None:
        """Expected held-out loss in nats per token; None for labelled data."""
        if self.kind != "loss":
            return None
        wide = Z90 * math.hypot(self.spread, self.shared)
        return Interval(low=self.badness - wide, mid=self.badness, high=self.badness + wide)

    def learned(self, quality: Correction) -> Expectation:
        """The same after past runs on the very dataset: what is common to all strategies moves, and is surer."""
        change = self.change(quality)
        moved, low, high = (getattr(change.after, end) for end in ("mid", "low", "high"))
        if self.kind == "error":
            badness, shared = math.log(moved), math.log(high / low) / (2 * Z90)
        else:
            badness, shared = moved, (high - low) / (2 * Z90)
        return replace(self, badness=badness, shared=shared)

    def change(self, quality: Correction) -> Corrected:
        """The middle and the common spread of the error, or the loss, before and after past runs."""
        from orchestrator.policy.corrections import corrected

        if self.kind == "error":
            mid, wide = math.exp(self.badness), math.exp(Z90 * self.shared)
            before = Interval(low=mid / wide, mid=mid, high=mid * wide)
        else:
            wide = Z90 * self.shared
            before = Interval(low=max(1e-3, self.badness - wide), mid=self.badness, high=self.badness + wide)
        return corrected(self.kind, before, quality)
