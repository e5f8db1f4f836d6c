"""`method: prompt_tuning`: embeddings learnt in front of every sample (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.method_names import PROMPT_TOKENS
from orchestrator.methods.base import FROZEN_BACKBONE, MethodCost, Module
from orchestrator.methods.virtual_tokens import VirtualTokens

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class PromptTuning(VirtualTokens):
    """See the module."""

    name = "prompt_tuning"
    aliases = ("prompt",)
    cost = replace(FROZEN_BACKBONE, virtual_tokens=PROMPT_TOKENS)
    colour, marker = 7, ">"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return PROMPT_TOKENS * shape.hidden

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`: 0.3 by Adafactor in Lester et al. (2021); with AdamW 3e-2 is usual in peft's examples."""
        return 3e-2

    def positions(self, spec: RunSpec) -> int:
        """See `Method`."""
        return spec.prompt_tuning.tokens

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`."""
        return replace(self.cost, virtual_tokens=spec.prompt_tuning.tokens)

    def adapter_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `PeftMethod`."""
        return spec.prompt_tuning.tokens * _embedding_width(shape)

    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """See `PeftMethod`: embeddings begin as those of tokens drawn from the vocabulary."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type=shared["task_type"],
            num_virtual_tokens=spec.prompt_tuning.tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )

    def reads(self, model: Module) -> list[Any]:
        """See `Method`."""
        return [model.get_input_embeddings().weight]

    def adapt(self, model: Module, spec: RunSpec) -> Module:
        """See `Method`: the logits are those of the sample alone."""
        return _without_virtual_logits(super().adapt(model, spec))

    def load_adapter(self, model: Module, folder: Path) -> Module:
        """See `PeftMethod`."""
        return _without_virtual_logits(super().load_adapter(model, folder))


def _embedding_width(shape: ModelShape) -> int:
    """Of the token table, which in some models is narrower than the layers."""
    tables = (size for size in shape.weights.values() if len(size) == 2 and size[0] == shape.vocab)
    return next((size[1] for size in tables), shape.hidden)


def _without_virtual_logits(model: Module) -> Module:
    virtual = model.active_peft_config.num_virtual_tokens

    def cut(_: Module, __: Any, output: Any) -> Any:
        output.logits = output.logits[:, virtual:]
        return output

    model.register_forward_hook(cut)
    return model
