"""The spec of an evaluation: a model that is measured, not trained."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from orchestrator.spec import UntrainedRunSpec
from orchestrator.spec_data import MeasuredDataSpec


class EvaluationSpec(UntrainedRunSpec):
    """A model that is measured."""

    data: MeasuredDataSpec
    """Which examples."""

    @model_validator(mode="after")
    def _measures_something(self) -> Self:
        if self.data.test is not None:
            raise ValueError("kind: evaluate measures on data.validation: name data.test there")
        if not self.data.train and self.data.validation is None:
            raise ValueError(
                "kind: evaluate needs data.validation, all of which is measured on, or data.train, of which that is "
                "what a training would hold out"
            )
        return self
