"""A factor learnt for each key, value and inner activation of the MLP (Liu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.methods.base import FROZEN_BACKBONE, PricedMethod

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape


class Ia3(PricedMethod):
    """See the module."""

    name = "ia3"
    cost = FROZEN_BACKBONE

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return shape.layers * (2 * shape.kv_heads * shape.head_dim + shape.intermediate)
