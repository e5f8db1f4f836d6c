"""Successive halving on Ray Tune: what `rungs` decides, told to Tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from orchestrator.ranking import Goal
from orchestrator.scheduling.search.rungs import Rungs
from orchestrator.scheduling.search.trial import STEP, TrialTask


class SuccessiveHalving(FIFOScheduler):  # type: ignore[misc]
    """Tells Tune which trials to stop."""

    def __init__(self, tasks: Sequence[TrialTask], rungs: Rungs, goal: Goal) -> None:
        super().__init__()
        self._tasks, self._rungs, self._goal = tasks, rungs, goal

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune with every evaluation of every trial."""
        task = self._tasks[trial.config["trial"]]
        step = int(result[STEP])
        if step not in task.rungs:
            return str(self.CONTINUE)
        goodness = self._goal.goodness(result.get(self._goal.metric))
        decision = self._rungs.judge(task.trial.name, step, goodness, is_its_end=step == task.prepared.plan.steps)
        return str(self.CONTINUE if decision.go_on else self.STOP)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles the scheduler with its settings; what was decided is kept in the search's folder."""
        return {}
