"""Whether the next step may be taken under a budget. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.quantities import Budget


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run, or a part of one, has cost."""

    hours: float
    """Wall-clock hours."""
    gpu_hours: float
    """Hours times devices held."""
    usd: float
    flops: float

    def of(self, budget: Budget) -> float:
        """The amount in the budget's unit."""
        return {"hours": self.hours, "gpu-hours": self.gpu_hours, "usd": self.usd, "flops": self.flops}[budget.unit]


@dataclass(frozen=True, kw_only=True)
class BudgetDecision:
    """Whether to take another step, and why."""

    go_on: bool
    reason: str


def decide(budget: Budget, *, spent: Cost, next_step: Cost, closing: Cost) -> BudgetDecision:
    """Go on only if the next step and then closing (evaluation, checkpoint, export) still fit.

    `closing` is what those took last time, or an estimate before the first time.
    """
    after = spent.of(budget) + next_step.of(budget) + closing.of(budget)
    if after <= budget.amount:
        return BudgetDecision(go_on=True, reason="")
    return BudgetDecision(
        go_on=False,
        reason=f"budget {budget}: {spent.of(budget):.4g} spent, and the next step with the closing work would make "
        f"{after:.4g}",
    )
