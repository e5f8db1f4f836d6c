"""General data in a training on a base: what of it was forgotten, and its samples in the batches of a step."""

from __future__ import annotations

import numpy as np

from orchestrator.runs.job import LoopState, TrainingJob
from orchestrator.samples.batches import Samples
from orchestrator.samples.masking import Masking
from orchestrator.samples.metric_names import FORGETTING, RETAINED_LOSS
from orchestrator.samples.open_split import open_split
from orchestrator.samples.replay import JoinedSamples, ReplayOrder
from orchestrator.worker.engine import Engine
from orchestrator.worker.evaluation import Evaluator
from orchestrator.worker.step_data import StepData


def step_data(job: TrainingJob, train: Samples, *, masking: Masking, rank: int) -> StepData:
    """The training split as one rank sees it, with the general data that is replayed."""
    plan, seed, general = job.plan, job.spec.training.seed, job.data.retained
    if general is None or not job.spec.replayed:
        return StepData(train, plan=plan, seed=seed, rank=rank)
    other = open_split(general.path, "train", masking=masking)
    order = ReplayOrder.of(
        seed=seed, train=len(train), general=len(other), batch=plan.global_batch, replayed=job.spec.replayed
    )
    return StepData(JoinedSamples(train, other), plan=plan, seed=seed, rank=rank, order=order)


class Forgetting:
    """The loss on general data, and its rise since before the first step."""

    def __init__(self, job: TrainingJob, *, masking: Masking) -> None:
        general = job.data.retained
        self._samples = None if general is None else open_split(general.path, "validation", masking=masking)
        self._before: float | None = None

    @property
    def is_unmeasured(self) -> bool:
        """Whether the loss of the base is still to be measured."""
        return self._samples is not None and self._before is None

    @property
    def before(self) -> float | None:
        """The loss before the first step, for a checkpoint."""
        return self._before

    def take_up(self, state: LoopState) -> None:
        """Goes on from a checkpoint; what was measured on this base before stays true at its start."""
        self._before = self._before if state.retained_before is None else state.retained_before

    def figures(self, evaluator: Evaluator, engine: Engine) -> dict[str, float]:
        """The metrics of an evaluation, none without general data; all ranks call it, first before the first step."""
        if self._samples is None:
            return {}
        loss = evaluator.loss(engine, self._samples, np.arange(len(self._samples)))
        if self._before is None:
            self._before = loss
        return {RETAINED_LOSS: loss, FORGETTING: loss - self._before}
