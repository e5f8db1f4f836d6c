"""The block of a spec that says how a training keeps what its base knew. `spec` puts it into the `RunSpec`.

Rules between these and other fields stand in `spec` and, where they depend on the method, in `methods/base`.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from orchestrator.spec_data import DataFormat, DataSpec, Delimiter, IncompleteRows, Locations
from orchestrator.spec_numbers import Count, RateOrZero
from orchestrator.spec_survival import Block

SHARED = (
    *("validation_fraction", "exclude", "format", "text_column", "label_column", "delimiter", "incomplete_rows"),
    *("max_train_examples", "max_validation_examples"),
)
"""Fields that say of the general data what those of the same names in `data` say of the training data."""


class RetainSpec(Block):
    """Measures and limits what a training on a base forgets. The three parts work alone and together."""

    data: Locations | None = None
    """General data, such as the base was trained on, located like `data.train`. Its held-out share is evaluated before
    the first step and at every evaluation: `eval/retained_loss`, and `eval/forgetting`, the rise since the start."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each global batch drawn from the rest of the general data, rounded to whole samples; 0 turns it off."""
    l2sp: RateOrZero = 0.0
    """L2-SP (Li, Grandvalet and Davoine 2018), decoupled from the gradient as in AdamW: before each step every
    pretrained weight w that is trained moves by -learning rate x l2sp x (w - its value in the base). It replaces weight
    decay for these weights; new ones, such as those of a new head, keep theirs. 0 turns it off."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the general data that is held out to measure forgetting."""
    exclude: tuple[str, ...] = ()
    """As `data.exclude`."""
    format: DataFormat = "auto"
    """As `data.format`."""
    text_column: str | None = None
    """As `data.text_column`."""
    label_column: str | None = None
    """As `data.label_column`."""
    delimiter: Delimiter | None = None
    """As `data.delimiter`."""
    incomplete_rows: IncompleteRows = "refuse"
    """As `data.incomplete_rows`."""
    max_train_examples: Count | None = None
    """Replay at most this many documents or rows, drawn by `data.split_seed`."""
    max_validation_examples: Count | None = None
    """Measure forgetting on at most this many documents or rows, drawn alike."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.data is None and self.replay:
            raise ValueError("retain.replay draws samples from general data: set retain.data, or remove retain.replay")
        if self.data is None and not self.l2sp:
            raise ValueError("retain does nothing: set retain.data, retain.l2sp or both, or remove the block")
        fields = type(self).model_fields
        unused = [name for name in SHARED if self.data is None and getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(f"retain.{unused[0]} describes general data: set retain.data, or remove it")
        return self

    def data_spec(self, data: DataSpec) -> DataSpec:
        """The general data as a block of its own, in samples like those of the training data `data`."""
        assert self.data is not None
        return DataSpec(
            train=self.data,
            split_seed=data.split_seed,
            sequence_length=data.sequence_length,
            **{name: getattr(self, name) for name in SHARED},
        )
