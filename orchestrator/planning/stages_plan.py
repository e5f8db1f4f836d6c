"""What stages take together: their plans added up, with the largest peak. Pure; called by `plan`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.intervals import ZERO, Interval
from orchestrator.planning.run_plan import RunPlan
from orchestrator.quantities import Budget
from orchestrator.spec_stages import StagedSpec


@dataclass(frozen=True, kw_only=True)
class StagesPlan:
    """Stages, planned."""

    plans: tuple[RunPlan, ...]
    """Of each stage, in their order."""
    workers: int
    """The most that a stage has."""
    steps: int | None
    """Of all stages; None while those of one are open, as are the next three."""
    gpu_hours: Interval | None
    wall_hours: Interval | None
    usd: Interval | None
    """None, too, where a price is not known."""
    peak_gib: Interval
    """The largest of any stage."""
    fits: bool
    """Whether every stage surely fits in memory."""
    refused: tuple[str, ...]
    """Stages that may not fit, by name."""
    notes: tuple[str, ...]
    """Where the budget is less than the stages take."""

    def to_dict(self) -> dict[str, Any]:
        """The figures of the whole as plain JSON values."""
        return {key: value for key, value in asdict(self).items() if key not in ("plans", "notes")} | {
            "reasons": list(self.notes)
        }


def plan_stages(staged: StagedSpec, plans: Sequence[RunPlan]) -> StagesPlan:
    """The plans of all stages, added up."""
    steps = [plan.steps for plan in plans]
    gpu_hours, wall_hours = _sum([plan.gpu_hours for plan in plans]), _sum([plan.wall_hours for plan in plans])
    usd = _sum([plan.usd for plan in plans])
    peaks = [plan.peak_gib for plan in plans]
    counted = None if None in steps else sum(count or 0 for count in steps)
    flops = (
        None if counted is None else sum(plan.flops_once + plan.flops_per_step * (plan.steps or 0) for plan in plans)
    )
    needs = {
        "usd": None if usd is None else usd.mid,
        "gpu-hours": None if gpu_hours is None else gpu_hours.mid,
        "hours": None if wall_hours is None else wall_hours.mid,
        "flops": None if counted is None else flops,
    }
    return StagesPlan(
        plans=tuple(plans),
        workers=max(plan.workers for plan in plans),
        steps=counted,
        gpu_hours=gpu_hours,
        wall_hours=wall_hours,
        usd=usd,
        peak_gib=functools.reduce(Interval.at_least, peaks),
        fits=all(plan.fits for plan in plans),
        refused=tuple(stage.label for stage, plan in zip(staged.stages, plans, strict=True) if not plan.fits),
        notes=_budget_notes(staged.budget, None if staged.budget is None else needs[staged.budget.unit]),
    )


def _budget_notes(budget: Budget | None, needed: float | None) -> tuple[str, ...]:
    if budget is None or needed is None or needed <= budget.amount:
        return ()
    return (
        f"budget: {budget} is less than the {needed:.3g}{budget.unit} that all stages take in the middle estimate; "
        "the stage that spends the last of it ends the whole",
    )


def _sum(parts: Sequence[Interval | None]) -> Interval | None:
    known = [part for part in parts if part is not None]
    return sum(known, start=ZERO) if len(known) == len(parts) else None
