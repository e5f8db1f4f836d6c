"""Keys and values learnt in every layer, which all tokens attend to (Li and Liang 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.methods.base import FROZEN_BACKBONE, PricedMethod

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape

USUAL_TOKENS = 50
"""As in peft's comparison; 10 to 200 in Li and Liang (2021)."""


class Prefix(PricedMethod):
    """See the module."""

    name = "prefix"
    cost = FROZEN_BACKBONE

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return shape.layers * USUAL_TOKENS * 2 * shape.kv_heads * shape.head_dim
