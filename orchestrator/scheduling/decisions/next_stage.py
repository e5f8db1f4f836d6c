"""Which stage comes next, with which spec and budget, or why all is over. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.quantities import LEAST_BUDGET, Budget
from orchestrator.spec import ModelSpec, RunSpec
from orchestrator.spec_stages import StagedSpec


@dataclass(frozen=True, kw_only=True)
class DoneStage:
    """What the next stage depends on of one that is over."""

    status: str
    """`finished` or `stopped_by_budget`."""
    model_path: str | None
    spent: float
    """In the unit of the budget; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A stage to run, or to go on with."""

    spec: RunSpec
    reason: str


@dataclass(frozen=True, kw_only=True)
class Over:
    """Nothing is left to run."""

    status: Literal["finished", "stopped_by_budget"]
    reason: str


def next_stage(staged: StagedSpec, done: Sequence[DoneStage]) -> Begin | Over:
    """What follows the stages that are over, which are the first ones in their order.

    A stage may spend what those before it have left of the budget; what it has spent itself, before it was stopped, it
    knows from its own ledger.
    """
    count, budget = len(staged.stages), staged.budget
    if done and done[-1].status != "finished":
        return Over(
            status="stopped_by_budget",
            reason=f"stage {staged.stages[len(done) - 1].label} was stopped by the budget of {budget}; with a larger "
            "one the same command goes on with it",
        )
    if len(done) == count:
        return Over(status="finished", reason=f"all {count} stages are finished")
    stage = staged.stages[len(done)]
    left = None if budget is None else budget.amount - sum(one.spent for one in done)
    if left is not None and left < LEAST_BUDGET:
        return Over(
            status="stopped_by_budget",
            reason=f"the budget of {budget} was spent before stage {stage.label} began; with a larger one the same "
            "command begins it",
        )
    reason = f"stage {len(done) + 1} of {count}: {stage.label}"
    changes: dict[str, object] = {}
    if done:
        changes["model"] = ModelSpec(base=done[-1].model_path)
        reason += f", from the model of {staged.stages[len(done) - 1].label}"
    if budget is not None and left is not None:
        # Written out in full: the same stage, asked for again, must find that its budget has not grown.
        changes["budget"] = f"{left!r}{budget.unit}"
        reason += f"; {Budget(amount=left, unit=budget.unit)} of {budget} are left" if done else f"; budget {budget}"
    return Begin(spec=stage.spec.model_copy(update=changes), reason=reason)


def metrics_of_whole(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of the last stage, with the costs of all."""
    total: dict[str, float] = {}
    for metrics in stages:
        for key, value in metrics.items():
            if key.startswith("cost/"):
                total[key] = total.get(key, 0.0) + value
    return {**(stages[-1] if stages else {}), **total}
