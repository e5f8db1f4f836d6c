"""Fields of a spec that say how a model is adapted: the name of the method, and a block of settings for each.

`spec` puts them into the `RunSpec`. What a method does with its settings stands in its file in `methods/`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.spec_numbers import Rate, SmallCount
from orchestrator.spec_survival import Block

MethodName = Literal["full", "lora", "ia3", "head", "scratch"]


class LoraSpec(Block):
    """Low-rank adapters (Hu et al. 2021), used by `method: lora`."""

    rank: SmallCount = 8
    """Rank r of each adapter."""
    alpha: Rate = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each adapter."""
    targets: tuple[str, ...] | None = None
    """Names of the modules that get an adapter; none given means the attention's projections of the architecture."""


class MethodChoice(Block):
    """A method with the settings of all: only those of the method are used, so that a search may try several."""

    method: MethodName = "full"
    """Fine-tuning: `full` trains every weight, `lora` low-rank adapters, `ia3` factors of keys, values and the MLP,
    `head` only a new head on frozen features, `scratch` the same architecture with new weights, to compare with."""
    lora: LoraSpec = LoraSpec()
    """Adapter settings for `method: lora`."""
