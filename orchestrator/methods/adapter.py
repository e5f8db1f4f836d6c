"""LLaMA-Adapter (Zhang et al. 2023): rows learnt in every layer, whose attention is gated. `run` does not train it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.methods.base import FROZEN_BACKBONE, PricedMethod

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape

USUAL_ROWS = 10
"""As litgpt measured it."""


class LlamaAdapter(PricedMethod):
    """See the module."""

    name = "adapter"
    cost = FROZEN_BACKBONE

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return shape.layers * USUAL_ROWS * shape.hidden
