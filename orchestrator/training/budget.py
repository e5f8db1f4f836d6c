"""What a run costs as it goes, and whether its budget allows the next step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.planning.run_plan import RunPlan
from orchestrator.quantities import Budget
from orchestrator.training.job import LoopState

_PACE_STEPS = 20
"""The pace is the mean of so many recent steps."""
_WRITE_BYTES_PER_SECOND = 100e6
"""A slow shared disk (a guess), until a checkpoint of this run was timed."""


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


class Account:
    """The costs of one run over all its attempts, kept by the training loop.

    All seconds of an attempt count, not only those of its steps; work that a crash lost and that is done again counts
    once, since the checkpoint that the run goes on from does not know of it.
    """

    def __init__(self, plan: RunPlan, *, validation_samples: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._clock = clock
        self._started = clock()
        self._base = LoopState()
        self._steps = self._tokens = 0
        self._recent: deque[float] = deque(maxlen=_PACE_STEPS)
        self._evaluation_batches = validation_samples / plan.global_batch
        self._evaluation_s: float | None = None
        self._saving_s: float | None = None

    def resume(self, state: LoopState) -> None:
        """Goes on from what a checkpoint says."""
        self._base = state

    def add_step(self, *, seconds: float, tokens: int) -> None:
        """One optimizer step was taken."""
        self._steps += 1
        self._tokens += tokens
        self._recent.append(seconds)

    def add_evaluation(self, seconds: float) -> None:
        """The held-out data was evaluated; the longest time is what the next one may take."""
        self._evaluation_s = max(seconds, self._evaluation_s or 0.0)

    def add_saving(self, seconds: float) -> None:
        """A checkpoint was written."""
        self._saving_s = max(seconds, self._saving_s or 0.0)

    @property
    def step(self) -> int:
        """Optimizer steps done, over all attempts."""
        return self._base.step + self._steps

    @property
    def pace_s(self) -> float:
        """Seconds of a recent step; of an earlier attempt's when this one has taken none; 0 before the very first."""
        if self._recent:
            return sum(self._recent) / len(self._recent)
        return self._base.wall_seconds / max(1, self._base.step)

    def state(self) -> LoopState:
        """Where the run stands now, for its next checkpoint."""
        seconds = self._clock() - self._started
        return replace(
            self._base,
            step=self.step,
            tokens=self._base.tokens + self._tokens,
            wall_seconds=self._base.wall_seconds + seconds,
            device_seconds=self._base.device_seconds + seconds * self._plan.workers,
        )

    def cost(self) -> Cost:
        """What the run has cost up to now."""
        state = self.state()
        gpu_hours = state.device_seconds / 3600
        return Cost(
            hours=state.wall_seconds / 3600,
            gpu_hours=gpu_hours,
            usd=gpu_hours * self._plan.usd_per_device_hour,
            flops=state.tokens * self._plan.flops_per_step / self._plan.tokens_per_step,
        )

    def decide(self, budget: Budget) -> BudgetDecision:
        """Whether the budget allows one more step."""
        return decide(
            budget,
            spent=self.cost(),
            next_step=self._cost_of(self.pace_s, self._plan.flops_per_step),
            closing=self._cost_of(self._closing_s(), 0.0),
        )

    def _closing_s(self) -> float:
        """An evaluation, a checkpoint and an export, which writes about as much as a checkpoint.

        Before the first evaluation a held-out batch counts as a whole step, though it has no backward pass.
        """
        plan = self._plan
        evaluation = self.pace_s * self._evaluation_batches if self._evaluation_s is None else self._evaluation_s
        checkpoint_bytes = 4 * plan.parameters + 12 * plan.trainable_parameters  # fp32 weights, masters and moments
        saving = checkpoint_bytes / _WRITE_BYTES_PER_SECOND if self._saving_s is None else self._saving_s
        return evaluation + 2 * saving

    def _cost_of(self, seconds: float, flops: float) -> Cost:
        devices = seconds * self._plan.workers / 3600
        return Cost(hours=seconds / 3600, gpu_hours=devices, usd=devices * self._plan.usd_per_device_hour, flops=flops)
