"""What one run costs as it goes, and whether its budget allows the next step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from orchestrator.planning.run_plan import RunPlan
from orchestrator.quantities import Budget
from orchestrator.runs.attempts import Held
from orchestrator.runs.budget_ledger import (
    BudgetDecision,
    Cost,
    Entry,
    Ledger,
    LedgerBudget,
    decide,
    evaluation_is_due,
    time_cost,
)
from orchestrator.runs.job import LoopState

_PACE_STEPS = 20
"""The pace is the mean of so many recent steps."""
_WRITE_BYTES_PER_SECOND = 100e6
"""A slow shared disk (a guess), until a checkpoint of this run was timed."""
_CLOSING_S = 4.0
"""What the end takes beside evaluation, checkpoint and export: libraries used for the first time, the last metrics on
their way to MLflow. Tiny models on two cores took 0.5 to 2.7 s in all with a load of 2 to 6 (measured)."""
_CLAIM_S = 0.2
"""With a ledger, steps of so many seconds are claimed at a time. A claim beside three running trials and a hundred that
have ended takes 2 to 4 ms on a local disk and a busy core (measured)."""


class Account:
    """The costs of one run over all its attempts, kept by the training loop.

    All seconds of an attempt count, not only those of its steps: from when its workers were asked for, `started_s_ago`
    before now, so every start is in `cost/...`, in what a budget spends and in what a plan foresees. So do the seconds
    of work that a crash lost, as far as the driver or a ledger knows of them; its FLOPs count once, when they are done
    again.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        evaluated_samples: int,
        started_s_ago: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._clock = clock
        self._started = clock() - started_s_ago
        self._base = LoopState()
        self._steps = self._tokens = self._padded_tokens = self._taken = 0
        self._step_seconds = 0.0
        self._recent: deque[float] = deque(maxlen=_PACE_STEPS)
        self._evaluation_batches = evaluated_samples / plan.global_batch
        self._evaluation_s: float | None = None
        self._saving_s: float | None = None
        self._ledger: Ledger | None = None
        self._claimed = Cost()
        self._least = Cost()

    def resume(self, state: LoopState, held_before: Held = Held()) -> None:  # noqa: B008  a frozen value
        """Goes on from what a checkpoint says, and from how long earlier attempts had their workers in all."""
        self._base = replace(
            state,
            padded_tokens=state.padded_tokens or state.tokens,
            wall_seconds=max(state.wall_seconds, held_before.wall_seconds),
            device_seconds=max(state.device_seconds, held_before.device_seconds),
        )

    def rewind(self, state: LoopState) -> None:
        """Goes back to a checkpoint without a new attempt: the steps since are undone, the time they took is not."""
        self._base = replace(state, wall_seconds=self._base.wall_seconds, device_seconds=self._base.device_seconds)
        self._steps = self._tokens = self._padded_tokens = 0
        self._step_seconds = 0.0

    def add_step(self, *, seconds: float, tokens: int, padded_tokens: int) -> None:
        """One optimizer step was taken."""
        self._steps += 1
        self._tokens += tokens
        self._padded_tokens += padded_tokens
        self._step_seconds += seconds
        self._recent.append(seconds)
        self._taken += 1
        if self._taken == 1:
            self._least = self._closing() + self._cost_of(self._clock() - self._started, self._plan.flops_per_step)

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
        base = self._base
        return (base.step_seconds or base.wall_seconds) / base.step if base.step else 0.0

    def state(self) -> LoopState:
        """Where the run stands now, for its next checkpoint."""
        seconds = self._clock() - self._started
        return replace(
            self._base,
            step=self.step,
            tokens=self._base.tokens + self._tokens,
            padded_tokens=self._base.padded_tokens + self._padded_tokens,
            wall_seconds=self._base.wall_seconds + seconds,
            device_seconds=self._base.device_seconds + seconds * self._plan.workers,
            step_seconds=self._base.step_seconds + self._step_seconds,
        )

    def cost(self) -> Cost:
        """What the run has cost up to now."""
        state = self.state()
        gpu_hours = state.device_seconds / 3600
        return Cost(
            hours=state.wall_seconds / 3600,
            gpu_hours=gpu_hours,
            usd=gpu_hours * self._plan.usd_per_device_hour,
            flops=self._plan.flops_once
            + state.padded_tokens * self._plan.flops_per_step / self._plan.padded_tokens_per_step,
        )

    def decide(self, budget: Budget, *, may_claim: Callable[[], bool] = lambda: True) -> BudgetDecision:
        """Whether the budget allows one more step. `may_claim` says whether this attempt may still write into a ledger
        in a bucket; where it may not, nothing is decided. Raises StorageError when the ledger cannot be used."""
        if isinstance(budget, LedgerBudget):
            return self._claim(budget, may_claim)
        return decide(budget, spent=self.cost(), next_step=self._cost_of_steps(1), closing=self._closing())

    def _claim(self, budget: LedgerBudget, may_claim: Callable[[], bool]) -> BudgetDecision:
        """From what was claimed before, or by a new claim: of several steps, or near the end of the budget of one."""
        if self._ledger is None:
            self._ledger = budget.open_ledger()
            self._take_over(self._ledger.entry(budget.member))
        spent, closing = self.cost(), self._closing()
        due = self._cost_of(self._due_s(budget), 0.0)
        if (spent + due + self._cost_of_steps(1) + closing).of(budget) <= self._claimed.of(budget):
            return BudgetDecision(go_on=True, reason="")
        if budget.ledger_at is not None and not may_claim():  # a newer attempt has the entry now
            return BudgetDecision(go_on=True, reason="")
        for steps in sorted({self._steps_of_a_claim(self._ledger), 1}, reverse=True):
            ahead = due + self._cost_of_steps(steps)
            entry = Entry(spent=spent, ahead=ahead, closing=closing, least=self._least)
            decision = self._ledger.claim(budget, budget.member, entry)
            if decision.go_on:
                self._claimed = spent + ahead + closing
                break
        return decision

    def _take_over(self, entry: Entry | None) -> None:
        """Counts the time that an earlier attempt spent after the checkpoint that this one goes on from."""
        if entry is None:
            return
        known = (entry.ended() if entry.running else entry).spent
        self._base = replace(
            self._base,
            wall_seconds=max(self._base.wall_seconds, known.hours * 3600),
            device_seconds=max(self._base.device_seconds, known.gpu_hours * 3600),
        )
        self._least = entry.least

    def _steps_of_a_claim(self, ledger: Ledger) -> int:
        left = 1 if self._plan.steps is None else max(1, self._plan.steps - self.step)
        return min(left, max(1, int(max(_CLAIM_S, ledger.period_s) / self.pace_s))) if self.pace_s else 1

    def _due_s(self, budget: LedgerBudget) -> float:
        """The evaluation and the checkpoint that the loop does between this step and the next."""
        evaluates = evaluation_is_due(self.step, every=budget.eval_every_steps, rungs=budget.rungs)
        saves = budget.save_every_steps is not None and self.step > 0 and self.step % budget.save_every_steps == 0
        return self._next_evaluation_s() * evaluates + self._next_saving_s() * saves

    def _closing(self) -> Cost:
        """An evaluation, a checkpoint and an export, which writes about as much as a checkpoint."""
        return self._cost_of(_CLOSING_S + self._next_evaluation_s() + 2 * self._next_saving_s(), 0.0)

    def _next_evaluation_s(self) -> float:
        """Before the first, a held-out batch counts as a whole step, though it has no backward pass."""
        return self.pace_s * self._evaluation_batches if self._evaluation_s is None else self._evaluation_s

    def _next_saving_s(self) -> float:
        return self._plan.checkpoint_bytes / _WRITE_BYTES_PER_SECOND if self._saving_s is None else self._saving_s

    def _cost_of_steps(self, steps: int) -> Cost:
        return self._cost_of(steps * self.pace_s, steps * self._plan.flops_per_step)

    def _cost_of(self, seconds: float, flops: float) -> Cost:
        return replace(time_cost(seconds, self._plan), flops=flops)
