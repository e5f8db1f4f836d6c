"""LoRA beside weights of 4 bits (Dettmers et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.methods.base import MethodCost, PricedMethod
from orchestrator.methods.lora import adapters_on_queries_and_values

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape


class QLora(PricedMethod):
    """See the module."""

    name = "qlora"
    # That quantised modules keep their inputs is bitsandbytes' way (0.41).
    cost = MethodCost(flops_per_weight=4.0, bytes_per_weight=1.0, keeps_inputs=True, keeps_rows=True, is_quantised=True)

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return adapters_on_queries_and_values(shape, rank=rank)
