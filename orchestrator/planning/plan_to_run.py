"""The plan of a training that is about to start: `make_plan` on a cluster, or on what its autoscaler could make of it.

What surely cannot work is refused; `plan` itself shows what does not fit. Called by everything that runs.
"""

from __future__ import annotations

from orchestrator.errors import CapacityError, SpecError
from orchestrator.methods.registry import method_of
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import ClusterShape, DatasetCounts, Kept, RunPlan
from orchestrator.spec import RunSpec


def plan_to_run(
    spec: RunSpec, cluster: ClusterShape, *, counts: DatasetCounts | None = None, kept: Kept | None = None
) -> RunPlan:
    """`make_plan` for a training that is about to start, on the cluster or on what its autoscaler could make of it.

    Raises CapacityError, too, when the states alone need more memory than there is: whatever else the estimate may get
    wrong, that cannot run.
    """
    missing: dict[ClusterShape, CapacityError] = {}
    for shape in _in_order(spec, cluster):
        try:
            return _plan_to_run(spec, shape, counts=counts, kept=kept)
        except CapacityError as error:
            missing[shape] = error
    if not cluster.may_become:
        raise missing[cluster]
    short = missing[cluster.may_become[0]]
    most = "its autoscaler may add no more nodes than that"
    allowed = most if short.allowed is None else f"{short.allowed}; {most}"
    raise CapacityError(short.what, got=short.got, allowed=allowed, do=short.do) from short


def _in_order(spec: RunSpec, cluster: ClusterShape) -> tuple[ClusterShape, ...]:
    """The shapes to plan for: what is up comes first, but for the GPUs that a worker gets where they can be had."""
    waits_for_gpus = spec.resources.gpus_per_worker == "auto" and not cluster.gpus
    if waits_for_gpus and any(shape.gpus for shape in cluster.may_become):
        return (*cluster.may_become, cluster)
    return cluster.reachable


def _plan_to_run(spec: RunSpec, cluster: ClusterShape, *, counts: DatasetCounts | None, kept: Kept | None) -> RunPlan:
    plan = make_plan(spec, cluster, counts=counts, kept=kept)
    if plan.states_gib > plan.device_memory_gib:
        raise CapacityError(
            "the training cannot fit: weights, gradients and optimizer states alone need more memory than there is",
            got=f"{plan.states_gib:.3g} GiB on each of {plan.workers} x {plan.device_name}",
            allowed=f"up to {plan.device_memory_gib:.3g} GiB",
            do=plan.reasons[-1],
        )
    if not method_of(spec.method).trains:
        _check_pays_for_all(spec, plan)
    return plan


def _check_pays_for_all(spec: RunSpec, plan: RunPlan) -> None:
    """Raises SpecError where a budget surely ends before all rows are asked about: a part of them gives no figures."""
    budget, usd, device, wall = spec.parsed_budget, plan.usd, plan.gpu_hours, plan.wall_hours
    if budget is None or device is None or wall is None:
        return
    least = {"usd": usd.low if usd else 0.0, "gpu-hours": device.low, "hours": wall.low, "flops": plan.flops_once}
    if least[budget.unit] > budget.amount:
        raise SpecError(
            "the budget ends before all held-out rows have been read, and a part of them gives no figures",
            got=f"budget: {budget}",
            allowed=f"{least[budget.unit]:.3g}{budget.unit} or more, start included",
            do="raise the budget, or set data.max_validation_examples lower",
        )
