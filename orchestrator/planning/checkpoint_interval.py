"""How many steps between checkpoints (`checkpoint.every_steps: auto`): saving costs time, and so do steps lost.

Comes in: what a checkpoint was measured to cost, and the failures of the run so far. Goes out: an `IntervalDecision`.
Called on rank 0 at the start and right after each checkpoint.

Young (CACM 17, 1974) put the optimum at sqrt(2 x cost x time between failures); Daly (Future Gener. Comput. Syst. 22,
2006) also counts failures while saving and repeating. What a restart takes does not move the optimum: it is paid for
each failure, whatever the interval. It only tells what failures cost in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.quantities import human_duration

FIRST_INTERVAL_STEPS = 10
"""The first checkpoint comes after so many steps, to be measured: a guess; its steps are past the slow first ones."""
MOST_LOST_S = 1800.0
"""No failure may undo more than half an hour of steps, however rare failures are: a judgement."""

_SMALL_RATE_PER_NODE_HOUR = 4e-4
"""Machines that are looked after: between the 1.6e-4 of Llama 3 405B (arXiv 2407.21783: 419 unexpected interruptions in
54 days of 2,048 nodes) and the 1e-3 of OPT-175B (arXiv 2205.01068: 7.5 hours between interruptions of 128 nodes). Jobs
of 1,024 GPUs on Meta's research clusters failed every 7.9 hours, 1e-3 again (arXiv 2410.21680; from memory)."""
_SPOT_RATE_PER_NODE_HOUR = 0.1
"""Spot machines: one in ten is taken back in an hour (Bamboo, NSDI 2023, the least of its rates; from memory)."""
_FAULTY_RATE_PER_NODE_HOUR = 3.0
"""Something is broken, or somebody breaks it on purpose: a guess."""

_NEVER = 50.0
"""Failures expected in one interval from which on e^x says that none is ever finished."""


@dataclass(frozen=True, kw_only=True)
class FailureClass:
    """A kind of cluster that a run may be on: its rate is Gamma-distributed, as if one failure had been seen."""

    share: float
    """Of trainings that are on such a cluster, before anything is seen: a guess."""
    rate_per_node_hour: float


CLASSES = (
    FailureClass(share=0.85, rate_per_node_hour=_SMALL_RATE_PER_NODE_HOUR),
    FailureClass(share=0.13, rate_per_node_hour=_SPOT_RATE_PER_NODE_HOUR),
    FailureClass(share=0.02, rate_per_node_hour=_FAULTY_RATE_PER_NODE_HOUR),
)
"""Rates of clusters differ by orders of magnitude: one Gamma prior for all would be vague about the usual ones, or
blind to the bad ones for days."""


@dataclass(frozen=True, kw_only=True)
class CheckpointCost:
    """What one checkpoint was measured to take, the mean of recent ones."""

    blocked_s: float
    """Training waits, while states are copied to the host."""
    write_s: float
    """From there until the checkpoint is complete, behind training."""
    late_s: float
    """By how much longer all steps took meanwhile than steps without a write."""

    @property
    def lost_s(self) -> float:
        """Seconds of training that it costs."""
        return self.blocked_s + self.late_s


@dataclass(frozen=True, kw_only=True)
class IntervalDecision:
    """Steps until the next checkpoint, and why."""

    steps: int
    overhead: float | None
    """Share of the time that is expected to go to saving, repeated steps and restarts; None before any measurement."""
    reason: str


def failures_per_node_hour(*, failures: int, node_hours: float) -> float:
    """The rate to expect after so many failures in so many node-hours, those of the run so far.

    Every class is updated as a Gamma(1, 1 / rate) prior by Poisson counts; the classes are weighed by how well each
    foretold the count. It is the mean over all of them, since what an interval wastes grows with the rate. Ends that
    were announced, such as drains, are no failures: they lose no step.
    """
    posterior = []
    for one in CLASSES:
        seen_before = 1 / one.rate_per_node_hour  # node-hours
        log_evidence = math.log(one.share * seen_before) - (failures + 1) * math.log(seen_before + node_hours)
        posterior.append((log_evidence, (failures + 1) / (seen_before + node_hours)))
    best = max(evidence for evidence, _ in posterior)
    weights = [math.exp(evidence - best) for evidence, _ in posterior]
    return sum(weight * rate for weight, (_, rate) in zip(weights, posterior, strict=True)) / sum(weights)


def optimum_s(*, cost_s: float, between_failures_s: float) -> float:
    """Seconds of training between two checkpoints that waste least: Daly's higher-order estimate."""
    ratio = cost_s / (2 * between_failures_s)
    if ratio >= 1:
        return between_failures_s
    young = math.sqrt(2 * cost_s * between_failures_s)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def expected_overhead(*, interval_s: float, cost_s: float, between_failures_s: float, restart_s: float) -> float:
    """Share of the time that is not training, by Daly's complete model, between 0 and 1."""
    risk = (interval_s + cost_s) / between_failures_s
    if risk + restart_s / between_failures_s > _NEVER:
        return 1.0
    stretched = between_failures_s * math.exp(restart_s / between_failures_s) * math.expm1(risk) / interval_s
    return 1 - 1 / stretched


def interval_steps(
    *,
    step_s: float | None,
    cost: CheckpointCost | None,
    restart_s: float,
    nodes: int,
    failures: int,
    node_hours: float,
) -> IntervalDecision:
    """Steps from the checkpoint just made to the next: the whole number that is expected to waste least.

    Never more than half an hour's, never fewer than the last checkpoint takes to be written, and at least 1. Until a
    step and a checkpoint were measured it is FIRST_INTERVAL_STEPS. `restart_s` is the time from a failure to the first
    new step, `node_hours` those of the run so far over all its attempts. The same input always gives the same answer.
    """
    if step_s is None or cost is None:
        return IntervalDecision(
            steps=FIRST_INTERVAL_STEPS,
            overhead=None,
            reason=f"every {FIRST_INTERVAL_STEPS} steps until a checkpoint was measured",
        )
    between_s = 3600 / (nodes * failures_per_node_hour(failures=failures, node_hours=node_hours))
    best = _best_whole(step_s, cost.lost_s, between_s)
    most = max(1, math.floor(MOST_LOST_S / step_s))
    least = max(1, math.ceil(cost.write_s / step_s))
    steps = max(least, min(best, most))
    overhead = expected_overhead(
        interval_s=steps * step_s, cost_s=cost.lost_s, between_failures_s=between_s, restart_s=restart_s
    )
    bound = ""
    if steps == least > best:
        bound = f"; {best:,} would waste less, but a checkpoint takes {human_duration(cost.write_s)} to be written"
    elif steps == most < best:
        bound = f"; {best:,} would waste less, but no failure may undo more than {human_duration(MOST_LOST_S)}"
    return IntervalDecision(
        steps=steps,
        overhead=overhead,
        reason=(
            f"every {steps:,} steps ({human_duration(steps * step_s)}): a checkpoint costs {cost.lost_s:.3g} s of "
            f"training, and on {nodes} node{'s' if nodes > 1 else ''} a failure is expected every "
            f"{human_duration(between_s)} ({failures} in {node_hours:.3g} node-hours so far); "
            f"{100 * overhead:.2g} % of the time goes to saving, repeating and restarting{bound}"
        ),
    )


def _best_whole(step_s: float, cost_s: float, between_s: float) -> int:
    """Whichever of the whole numbers about Daly's optimum wastes less."""
    below = max(1, math.floor(optimum_s(cost_s=cost_s, between_failures_s=between_s) / step_s))
    return min(
        (below, below + 1),
        key=lambda steps: expected_overhead(
            interval_s=steps * step_s, cost_s=cost_s, between_failures_s=between_s, restart_s=0.0
        ),
    )
