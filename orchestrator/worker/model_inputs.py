"""What the trained model reads of each split: encoded rows, or features of its frozen backbone, computed once.

Comes in: the prepared data, and each model that is built to be trained. Goes out: samples for training and evaluation,
and the held-out ones that an exported model is compared on. Called by the loop and by `validation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.runs.job import TrainingJob
from orchestrator.samples.batches import Samples
from orchestrator.samples.masking import Masking
from orchestrator.samples.open_split import open_split
from orchestrator.worker import models
from orchestrator.worker.export import check_batch, first_batch
from orchestrator.worker.features import FeatureSamples, HeadAlone
from orchestrator.worker.objectives import Batch


class ModelInputs:
    """The training and the held-out split in the form that the model of this training reads."""

    def __init__(
        self,
        job: TrainingJob,
        *,
        masking: Masking,
        device: torch.device,
        say: Callable[[str], None],
        before_batch: Callable[[], None],
    ) -> None:
        """Rows, until features are cached. `say` is told what a user should know; `before_batch` is called before each
        forward pass of the backbone."""
        self._job, self._device, self._say, self._before_batch = job, device, say, before_batch
        self.train: Samples = open_split(job.data.path, "train", masking=masking)
        self.validation: Samples = open_split(job.data.path, "validation", masking=masking)
        self._held_out_rows = self.validation
        self._are_features = False

    def cache_features(self, model: Any) -> None:
        """Takes the backbone out of a model, and at the first call has it read every row before; every rank calls it.

        Where the head does not read one vector of a row, model and rows stay as they are.
        """
        head = HeadAlone(model, dtype=models.DTYPES[self._job.plan.precision], device=self._device)
        if not self._are_features:
            read = head.reading(self.train)
            if read is None:
                self._say("features: the head does not read one vector of a row, so the backbone is run in every pass")
                return
            self.train, self.validation = (
                FeatureSamples(rows, head.compute(rows, read, before_batch=self._before_batch))
                for rows in (self.train, self.validation)
            )
            self._are_features = True
        head.cut()

    def compared(self) -> Batch:
        """What the trained model is given of the held-out samples by which an exported one is checked."""
        return first_batch(self.validation) if self._are_features else self.compared_rows()

    def compared_rows(self) -> Batch:
        """The same samples as an exported model is given them, which is whole."""
        return check_batch(self._held_out_rows, self._job.plan, whole=self._are_features)

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The full state dict of the trained model, with the backbone where that was taken out."""
        if not self._are_features:
            return dict(state)
        return {**models.build_model(self._job.spec, self._job.plan, self._job.data).state_dict(), **state}
