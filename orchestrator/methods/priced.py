"""Methods as they are priced by sizes alone: those that `run` trains, and others that `estimate` knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from orchestrator.architectures.families import ModelShape
from orchestrator.methods.base import FROZEN_BACKBONE, MethodCost
from orchestrator.methods.registry import METHODS

AdaptMethod = Literal["full", "scratch", "lora", "qlora", "prefix", "prompt", "ia3", "adapter", "head"]

COSTS: Mapping[str, MethodCost] = {
    **{method.name: method.cost for method in METHODS},
    "qlora": MethodCost(flops_per_weight=4.0, bytes_per_weight=1.0, keeps_inputs=True, is_quantised=True),
    **dict.fromkeys(("prefix", "prompt", "ia3", "adapter"), FROZEN_BACKBONE),
}
"""By `AdaptMethod`. That quantised modules keep their inputs is bitsandbytes' way (0.41)."""
PRICED: dict[str, AdaptMethod] = {
    **{name: name for name in get_args(AdaptMethod)},
    "frozen": "head",
    "features": "head",
}
"""Methods by the names they go by."""
QUANTISABLE = ("full", "scratch", "lora")
"""Methods in whose place QLoRA takes less memory."""

PREFIX_TOKENS = 50
"""Keys and values learnt in every layer by `prefix`: as in peft's comparison; 10 to 200 in Li and Liang (2021)."""
PROMPT_TOKENS = 100
"""Virtual tokens that `prompt` puts before every sample: Lester et al. (2021)."""
ADAPTER_TOKENS = 10
"""Rows learnt in every layer by `adapter`: LLaMA-Adapter (Zhang et al. 2023), as litgpt measured it."""


def virtual_tokens(method: AdaptMethod) -> int:
    """Tokens that a method puts before every sample."""
    return PROMPT_TOKENS if method == "prompt" else 0


def trainable_of(method: AdaptMethod, shape: ModelShape, *, rank: int) -> int:
    """Weights that a method trains in a shape; adapters of rank `rank` sit on queries and values (Hu et al. 2021)."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "full": shape.parameters,
        "scratch": shape.parameters,
        "lora": shape.layers * rank * (2 * shape.hidden + q + kv),
        "qlora": shape.layers * rank * (2 * shape.hidden + q + kv),
        "prefix": shape.layers * PREFIX_TOKENS * 2 * kv,
        "prompt": PROMPT_TOKENS * shape.hidden,
        "ia3": shape.layers * (2 * kv + shape.intermediate),
        "adapter": shape.layers * ADAPTER_TOKENS * shape.hidden,
        "head": shape.head_parameters,
    }[method]
