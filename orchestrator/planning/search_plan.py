"""What a search takes: its trials' plans added up, all to their end and as far as successive halving lets them go.

Comes in: the plan of every trial, the rungs and how many trials run at a time. Goes out: a `SearchPlan`. Called by
`plan`; `run` takes the number at a time from here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import CapacityError
from orchestrator.intervals import ZERO, Interval
from orchestrator.planning.run_plan import ClusterShape, RunPlan
from orchestrator.planning.throughput import STARTUP_SECONDS
from orchestrator.quantities import Budget


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """What the trials of a search take together."""

    steps: int
    gpu_hours: Interval
    wall_hours: Interval
    usd: Interval | None
    """None where a price is not known."""
    flops: float

    def of(self, budget: Budget) -> float:
        """The middle estimate in the budget's unit."""
        usd = (
            0.0 if self.usd is None else self.usd.mid
        )  # a budget in usd without a price was refused with the placement
        hours = {"hours": self.wall_hours.mid, "gpu-hours": self.gpu_hours.mid}
        return {**hours, "usd": usd, "flops": self.flops}[budget.unit]


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search, planned."""

    trials: int
    at_a_time: int
    """Trials beside each other."""
    rungs: tuple[int, ...]
    """Steps at which trials are compared and the worse stopped; none with `scheduler: none`."""
    reduction_factor: int
    """One in so many goes on at each rung."""
    all_to_their_end: SearchCost | None
    """The upper bound: nothing is stopped early. None while a trial's steps are open."""
    halving: SearchCost | None
    """If at every rung exactly one in `reduction_factor` goes on, whichever. A search lets more go on: the first to
    come to a rung are compared with few others."""
    fits: bool
    """Whether all trials surely fit in memory."""
    refused: tuple[str, ...]
    """Trials that may not fit, by name."""
    notes: tuple[str, ...] = ()
    """Where the budget is less than the search takes."""


def plan_search(
    plans: Sequence[RunPlan],
    *,
    names: Sequence[str],
    rungs: Sequence[int],
    reduction_factor: int,
    at_a_time: int,
    budget: Budget | None = None,
) -> SearchPlan:
    """The plans of all trials, added up."""
    whole = _together(plans, (), reduction_factor, at_a_time)
    halving = _together(plans, rungs, reduction_factor, at_a_time) if rungs else None
    return SearchPlan(
        trials=len(plans),
        at_a_time=at_a_time,
        rungs=tuple(rungs),
        reduction_factor=reduction_factor,
        all_to_their_end=whole,
        halving=halving,
        fits=all(plan.fits for plan in plans),
        refused=tuple(name for name, plan in zip(names, plans, strict=True) if not plan.fits),
        notes=_budget_notes(budget, whole, halving),
    )


def _budget_notes(budget: Budget | None, whole: SearchCost | None, halving: SearchCost | None) -> tuple[str, ...]:
    if budget is None or whole is None or whole.of(budget) <= budget.amount:
        return ()
    note = f"budget: {budget} is less than the {whole.of(budget):.3g}{budget.unit} of all trials to their end"
    if halving is not None:
        note += f"; if rungs halve they take {halving.of(budget):.3g}{budget.unit}"
    return (f"{note}; trials begin while there is enough for them",)


def trials_at_a_time(plans: Sequence[RunPlan], cluster: ClusterShape, *, most: int | None) -> int:
    """Trials that fit beside each other, `most` at most; raises CapacityError when not even one does."""
    cpus = max(plan.workers * plan.cpus_per_worker for plan in plans)
    gpus = max(plan.workers * plan.gpus_per_worker for plan in plans)
    shapes = cluster.reachable
    fitting = max(min(one.cpus // cpus, one.gpus // gpus) if gpus else one.cpus // cpus for one in shapes)
    if fitting < 1:
        raise CapacityError(
            "not even one trial fits this cluster",
            got=f"{cluster.cpus} cores, {cluster.gpus} GPUs",
            do="lower resources.workers or resources.cpus_per_worker",
        )
    return fitting if most is None else min(fitting, most)


def share_of_steps(steps: int, rungs: Sequence[int], reduction_factor: int) -> float:
    """The part of its steps that a trial takes on average when one in `reduction_factor` goes on at each rung."""
    edges = [0, *(rung for rung in rungs if rung < steps), steps]
    taken = sum(
        (end - begin) * float(reduction_factor) ** -passed
        for passed, (begin, end) in enumerate(itertools.pairwise(edges))
    )
    return taken / steps


def _together(plans: Sequence[RunPlan], rungs: Sequence[int], factor: int, at_a_time: int) -> SearchCost | None:
    """All trials, each for the part of its steps that it takes; a start is paid whole."""
    steps = flops = 0.0
    gpu_hours = longest = waited = ZERO
    usd: Interval | None = ZERO
    for plan in plans:
        if plan.steps is None or plan.wall_hours is None:
            return None
        share = share_of_steps(plan.steps, rungs, factor)
        wall = _cut(plan.wall_hours, share)
        device = wall.scaled(plan.workers)
        steps += plan.steps * share
        flops += plan.steps * share * plan.flops_per_step
        gpu_hours = gpu_hours + device
        usd = None if usd is None or plan.usd is None else usd + device.scaled(plan.usd_per_device_hour)
        waited = waited + wall.scaled(1 / at_a_time)
        whole = plan.wall_hours  # the best trial runs to its end, rungs or not
        longest = longest.at_least(whole)
    wall = longest.at_least(waited)
    return SearchCost(steps=round(steps), gpu_hours=gpu_hours, wall_hours=wall, usd=usd, flops=flops)


def _cut(wall: Interval, share: float) -> Interval:
    """Hours of a start, and of a part of the steps."""
    start = STARTUP_SECONDS.scaled(1 / 3600)
    return Interval(
        low=start.low + share * (wall.low - start.low),
        mid=start.mid + share * (wall.mid - start.mid),
        high=start.high + share * (wall.high - start.high),
    )
