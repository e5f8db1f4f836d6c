"""The weights of the best evaluation so far (`checkpoint.keep: best`), which the model is exported from in the end.

They are written in full by rank 0, so they fit a run of any size and ZeRO stage. Those that the newest checkpoint names
stay beside newer ones, so that a run which goes on from there finds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.atomic_file import draft_of
from orchestrator.checkpoints.catalog import storage_errors
from orchestrator.ranking import WORST
from orchestrator.runs.job import BEST, LoopState, TrainingJob, best_file
from orchestrator.worker.engine import Engine
from orchestrator.worker.objectives import Batch
from orchestrator.worker.recovery import Agree, RecoveryManager


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What was trained at one evaluation."""

    weights: dict[str, Tensor]
    """Of the full state dict what is not frozen."""
    logits: Tensor
    """What the model gave for the samples that an exported one is compared on."""


class BestWeights:
    """One rank's share of keeping the best weights; every rank calls each method at the same step."""

    def __init__(
        self, job: TrainingJob, recovery: RecoveryManager, *, leads: bool, agree: Agree, compared: Batch
    ) -> None:
        """`compared` are the samples by which an exported model is checked."""
        self._is_on, self._goal, self._run_folder = job.spec.keeps_best, job.spec.goal, job.run_folder
        self._recovery, self._leads, self._agree, self._compared = recovery, leads, agree, compared
        self._step: int | None = None
        self._metrics: Mapping[str, float] = {}
        self._named: int | None = None

    @property
    def step(self) -> int | None:
        """The step of the best evaluation; None before the first, and where the newest weights are wanted."""
        return self._step

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was evaluated there."""
        return self._metrics

    def in_words(self, newest: Mapping[str, float]) -> str:
        """The ranked metric there, and among the `newest` metrics."""
        name, key = self._goal.metric, "checkpoint.keep"
        last = newest.get(name, float("nan"))
        return f"{name} {self._metrics[name]:.4g}, at the last step {last:.4g} ({key}: a number keeps the last)"

    def take_up(self, state: LoopState) -> None:
        """Goes on from a checkpoint. A best evaluation whose weights are not there any more does not count."""
        step = state.best_step
        if step is not None and step != state.step:
            is_there = self._agree(self._file_of(step).exists() if self._leads else None)
            step = step if is_there else None
        self._step = self._named = step
        self._metrics = {} if step is None else state.best_metrics

    def judge(self, engine: Engine, step: int, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """Keeps the weights where no evaluation before was better than this one, which gave `metrics`; those of the
        last step need not be written."""
        if not self._is_on or self._rank(metrics)[0] == WORST:
            return
        if self._step is not None and self._rank(metrics) <= self._rank(self._metrics):
            return
        self._step = step
        self._metrics = metrics
        if is_last:
            return
        kept = {"logits": engine.logits(self._compared), "weights": engine.trained_state()}
        if self._leads and self._recovery.holds():
            self._write(self._file_of(step), kept)

    def named(self) -> None:
        """A checkpoint names the best evaluation: its weights stay until the next one does."""
        self._named = self._step

    def at(self, step: int) -> Kept | None:
        """The weights of the best evaluation, on rank 0; None where they are those of this step, and on other ranks."""
        if self._step is None or self._step == step or not self._leads:
            return None
        with storage_errors(self._run_folder, what="the best weights", doing="read"):
            return Kept(**torch.load(self._file_of(self._step), map_location="cpu", weights_only=True))

    def _rank(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Larger is better; of equal values, such as accuracies on few samples, the one with the smaller loss.

        Where the loss is no number, a class was chosen by none.
        """
        loss = metrics.get("eval/loss", 0.0)
        return (self._goal.goodness(metrics.get(self._goal.metric)), -loss) if math.isfinite(loss) else (WORST, WORST)

    def _file_of(self, step: int) -> Path:
        return self._run_folder / best_file(step)

    def _write(self, file: Path, kept: Mapping[str, Any]) -> None:
        with storage_errors(self._run_folder, what="the best weights"):
            file.parent.mkdir(exist_ok=True)
            with draft_of(file) as draft:
                torch.save(kept, draft)
                draft.replace(file)
            needed = {file} if self._named is None else {file, self._file_of(self._named)}
            for other in set(file.parent.glob("*.pt")) - needed:
                self._recovery.hide(f"{BEST}/{other.name}")
