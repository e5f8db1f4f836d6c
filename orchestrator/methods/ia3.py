"""`method: ia3`: a factor learnt for each key, value and inner activation of the MLP (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.architectures.families import LLAMA_LIKE
from orchestrator.errors import ModelError
from orchestrator.methods.base import MethodCost, Module
from orchestrator.methods.peft_method import (
    TRANSPOSED,
    PeftMethod,
    linear_modules,
    modules_within_layers,
    within_layer,
)

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec

_ATTENTION = ("attention.self.key", "attention.self.value")
TARGETS: dict[str, tuple[tuple[str, ...], str]] = {
    "gpt2": (("attn.c_attn",), "mlp.c_proj"),
    **dict.fromkeys(LLAMA_LIKE, (("self_attn.k_proj", "self_attn.v_proj"), "mlp.down_proj")),
    "phi3": (("self_attn.qkv_proj",), "mlp.down_proj"),
    "gpt_neox": (("attention.query_key_value",), "mlp.dense_4h_to_h"),
    "opt": (("self_attn.k_proj", "self_attn.v_proj"), "fc2"),
    **dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "electra"), (_ATTENTION, "output.dense")),
    "deberta-v2": (("attention.self.key_proj", "attention.self.value_proj"), "output.dense"),
    "albert": (("attention.key", "attention.value"), "ffn_output"),
    "distilbert": (("attention.k_lin", "attention.v_lin"), "ffn.lin2"),
    "modernbert": (("attn.Wqkv",), "mlp.Wo"),
}
"""What yields keys and values, and what reads the MLP's inner activations, by their names inside of a layer.

As in peft 0.21 where it knows an architecture, except that its `output.dense` is the output of BERT's attention too.
Where one module yields queries as well, they get a factor too.
"""


class Ia3(PeftMethod):
    """See the module."""

    name = "ia3"
    colour, marker = 4, "P"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return shape.layers * (2 * shape.kv_heads * shape.head_dim + shape.intermediate)

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`: 3e-3, at which Liu et al. (2022) trained T0 by IA3 with Adafactor."""
        return 3e-3

    def decays(self, name: str, dimensions: int) -> bool:
        """See `Method`: decay would pull factors to 0, which silences what they scale, and not to 1."""
        return super().decays(name, dimensions) and ".ia3_l." not in name

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`: what is scaled is kept, and not the input of the modules that yield keys and values."""
        return replace(self.cost, kept_per_token=self.adapter_parameters(spec, shape) / shape.layers - shape.hidden)

    def adapter_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `PeftMethod`."""
        attention, mlp = _targets(shape.model_type)
        modules = linear_modules(shape).items()
        scaled_outputs = sum(outputs for name, (_, outputs) in modules if within_layer(name) in attention)
        return scaled_outputs + sum(inputs for name, (inputs, _) in modules if within_layer(name) == mlp)

    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """See `PeftMethod`."""
        from peft import IA3Config

        model_type = str(model.config.model_type)
        attention, mlp = _targets(model_type)
        return IA3Config(
            target_modules=modules_within_layers(model, (*attention, mlp)),
            feedforward_modules=modules_within_layers(model, (mlp,)),
            fan_in_fan_out=model_type in TRANSPOSED,
            **shared,
        )


def _targets(model_type: str) -> tuple[tuple[str, ...], str]:
    """Raises ModelError for an architecture whose modules are not known."""
    if model_type not in TARGETS:
        raise ModelError(
            f"which modules of {model_type} method: ia3 should scale is not known",
            got=f"model_type {model_type}",
            allowed=", ".join(TARGETS),
            do="use method: lora with lora.targets, or method: full",
        )
    return TARGETS[model_type]
