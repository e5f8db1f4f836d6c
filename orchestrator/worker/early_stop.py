"""Whether a run has stopped getting better on the held-out data. Pure: all ranks decide alike from the same figures."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.ranking import WORST, Goal
from orchestrator.spec_survival import StopSpec


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What evaluations have shown so far."""

    best: float | None = None
    """The best value of the ranked metric; None before the first evaluation."""
    waited: int = 0
    """Evaluations since then, none of which was better."""

    def after(self, value: float | None, goal: Goal, *, min_delta: float) -> Progress:
        """With one more evaluation; one that gave no number is not better."""
        before = WORST if self.best is None else goal.goodness(self.best)
        if goal.goodness(value) > before + (0.0 if before == WORST else min_delta):
            return Progress(best=value)
        return Progress(best=self.best, waited=self.waited + 1)

    def reason(self, stop: StopSpec | None, goal: Goal) -> str | None:
        """Why the run ends here, in a sentence; None where it goes on."""
        if stop is None or self.waited < stop.patience:
            return None
        best = "no number" if self.best is None else f"{self.best:.6g}"
        return f"stopped early: {goal.metric} was not better than {best} in {self.waited} evaluations (training.stop)"
