"""`method: prefix`: keys and values learnt in every layer, which all tokens attend to (Li and Liang 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.method_names import PREFIX_TOKENS
from orchestrator.methods.base import MethodCost, Module
from orchestrator.methods.virtual_tokens import VirtualTokens

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class Prefix(VirtualTokens):
    """See the module."""

    name = "prefix"
    recomputes = False  # a layer that is computed again by peft 0.21.2 and transformers 5.23 has lost its prefix
    colour, marker = 6, "<"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return _parameters(shape, PREFIX_TOKENS)

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`: a guess; Li and Liang (2021) learn at 5e-5 behind a projection, and without one a prefix needs
        a rate near prompt tuning's."""
        return 1e-2

    def positions(self, spec: RunSpec) -> int:
        """See `Method`."""
        return spec.prefix.tokens

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`: a layer keeps keys and values of the sample and the prefix side by side, and those of the
        prefix once more."""
        width = 2 * shape.kv_heads * shape.head_dim
        return replace(self.cost, kept_per_token=width, kept_per_sample=2 * width * spec.prefix.tokens)

    def adapter_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `PeftMethod`."""
        return _parameters(shape, spec.prefix.tokens)

    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """See `PeftMethod`."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type=shared["task_type"], num_virtual_tokens=spec.prefix.tokens)


def _parameters(shape: ModelShape, tokens: int) -> int:
    return shape.layers * tokens * 2 * shape.kv_heads * shape.head_dim
