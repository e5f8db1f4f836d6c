"""Validation of a training: its metrics, and what follows from them: early stopping, and the weights to export.

Comes in: the engine, each time, since a rewound training may have a new one. Goes out: metrics to log, a reason to
stop, this part of a checkpoint's `LoopState`, and the model that is left in the end. Called by the loop, which says
when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from orchestrator.runs.job import LoopState, TrainingJob
from orchestrator.samples.masking import Masking
from orchestrator.worker.best_weights import BestWeights
from orchestrator.worker.early_stop import Progress
from orchestrator.worker.engine import Engine
from orchestrator.worker.evaluation import Evaluator, gap_samples
from orchestrator.worker.export import Sample
from orchestrator.worker.model_inputs import ModelInputs
from orchestrator.worker.objectives import objective_for
from orchestrator.worker.recovery import Agree, RecoveryManager
from orchestrator.worker.retention import Forgetting


def evaluated_samples(job: TrainingJob) -> int:
    """How many samples one evaluation takes: those held out, the training's for the gap, and general ones."""
    counts = job.data.counts
    general = 0 if job.data.retained is None else job.data.retained.counts.validation_samples
    gap = gap_samples(counts.train_samples, counts.validation_samples)
    return counts.validation_samples + len(gap) + general


class Validation:
    """One rank's share of measuring a training; every rank calls each method that takes the engine at the same step."""

    def __init__(
        self,
        job: TrainingJob,
        inputs: ModelInputs,
        recovery: RecoveryManager,
        *,
        masking: Masking,
        rank: int,
        agree: Agree,
        before_batch: Callable[[], None],
    ) -> None:
        """`before_batch` is called before each forward pass."""
        self._job, self._inputs, self._leads = job, inputs, rank == 0
        self._evaluator = Evaluator(
            job,
            objective_for(job.spec.task),
            train=inputs.train,
            validation=inputs.validation,
            rank=rank,
            before_batch=before_batch,
        )
        self._forgetting = Forgetting(job, masking=masking)
        self._best = BestWeights(job, recovery, leads=self._leads, agree=agree, compared=inputs.compared())
        self._progress = Progress()
        self._evaluated_step = 0

    # -- checkpoints -------------------------------------------------------------------------------------------

    def take_up(self, state: LoopState) -> None:
        """Goes on from a checkpoint; every rank calls it."""
        self._evaluated_step = state.evaluated_step
        self._progress = Progress(best=state.best, waited=state.waited)
        self._best.take_up(state)
        self._forgetting.take_up(state)

    def added_to(self, state: LoopState) -> LoopState:
        """A checkpoint's state with what a resumed run must know of the evaluations before."""
        return replace(
            state,
            evaluated_step=self._evaluated_step,
            best=self._progress.best,
            waited=self._progress.waited,
            best_step=self._best.step,
            best_metrics=dict(self._best.metrics),
            retained_before=self._forgetting.before,
        )

    def saved(self) -> None:
        """A checkpoint has what `added_to` gave."""
        self._best.named()

    # -- evaluation --------------------------------------------------------------------------------------------

    @property
    def needs_baseline(self) -> bool:
        """Whether something is to be measured before the first step."""
        return self._forgetting.is_unmeasured

    def baseline(self, engine: Engine) -> dict[str, float]:
        """The metrics before the first step."""
        return self._forgetting.figures(self._evaluator, engine)

    def is_evaluated(self, step: int) -> bool:
        """Whether the newest evaluation is of the weights after this step."""
        return self._evaluated_step == step

    def is_due(self, step: int) -> bool:
        """Whether an evaluation falls between this step and the next, and is still to be done."""
        return self._job.is_evaluated_after(step) and not self.is_evaluated(step)

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """The metrics of the weights after this step."""
        figures = self._evaluator.figures(engine) | self._forgetting.figures(self._evaluator, engine)
        self._evaluated_step = step
        return figures

    def judge(
        self, engine: Engine, figures: Mapping[str, float], *, metrics: Mapping[str, float], is_last: bool
    ) -> None:
        """Draws the conclusions from the figures of the newest evaluation: keeps the weights where they are the best,
        and counts towards `training.stop` unless it is the last evaluation.

        `metrics` are the newest of every kind: a search may rank by one of the training's. Weights of the last step
        need not be written.
        """
        self._best.judge(engine, self._evaluated_step, figures, is_last=is_last)
        if not is_last:
            self._count(metrics)

    def _count(self, metrics: Mapping[str, float]) -> None:
        """Those every so many steps count, those at the rungs of a search do not."""
        training, goal = self._job.spec.training, self._job.spec.goal
        every = training.eval_every_steps
        if training.stop is not None and every and self._evaluated_step and self._evaluated_step % every == 0:
            self._progress = self._progress.after(metrics.get(goal.metric), goal, min_delta=training.stop.min_delta)

    def stop_reason(self) -> str | None:
        """Why the run ends here, in a sentence; None where it goes on."""
        return self._progress.reason(self._job.spec.training.stop, self._job.spec.goal)

    # -- the model that is left --------------------------------------------------------------------------------

    def best_before(self, step: int) -> int | None:
        """The step of the best evaluation, where it is an earlier one than this."""
        return None if self._best.step == step else self._best.step

    @property
    def best_metrics(self) -> Mapping[str, float]:
        """What was evaluated there."""
        return self._best.metrics

    def best_in_words(self, newest: Mapping[str, float]) -> str:
        """Why the model is of an earlier step, in a sentence; `newest` are the metrics of the last one."""
        return (
            f"the model is that of step {self._best.step}, the best of all evaluations: {self._best.in_words(newest)}"
        )

    def final_model(self, engine: Engine, step: int) -> tuple[dict[str, Tensor], Sample]:
        """The full state dict to export after this step, on rank 0 and empty elsewhere, and what such a model gives."""
        rows = self._inputs.compared_rows()
        logits, state = engine.logits(self._inputs.compared()), engine.full_state()
        if (best := self._best.at(step)) is not None:
            logits, state = best.logits, state | best.weights
        return self._inputs.whole(state) if self._leads else {}, Sample(batch=rows, logits=logits)
