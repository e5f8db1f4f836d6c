"""`method: lora`: low-rank adapters beside frozen projections, merged into them at export (Hu et al. 2021)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.architectures.families import LLAMA_LIKE
from orchestrator.errors import ModelError
from orchestrator.methods.base import Module
from orchestrator.methods.peft_method import TRANSPOSED, PeftMethod, linear_modules

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec

LEARNING_RATE_RATIO = 9.8
"""Best learning rate of LoRA over that of full fine-tuning ("LoRA Without Regret" 2025); Biderman 2024: about 10."""
DEFAULT_LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn",),
    **dict.fromkeys(LLAMA_LIKE, ("q_proj", "v_proj")),
    "phi3": ("qkv_proj",),
    "gpt_neox": ("query_key_value",),
    "opt": ("q_proj", "v_proj"),
    **dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "albert", "electra"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
}
"""Modules that get an adapter when `lora.targets` is not set, by model type: as in peft 0.21 and Hu et al. (2021)."""

TOKEN_MODULES = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "lm_head", "embed_out", "decoder"),
    *("vocab_projector", "generator_lm_head"),
)
"""What architectures call the token table and the output layer, which in a tied model are one weight."""


class Lora(PeftMethod):
    """See the module."""

    name = "lora"
    is_advised = True
    quantised = "qlora"
    colour, marker = 1, "s"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`: queries and values (Hu et al. 2021)."""
        return adapters_on_queries_and_values(shape, rank=rank)

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`."""
        return LEARNING_RATE_RATIO * super().learning_rate(base_parameters)

    def adapter_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `PeftMethod`: raises ModelError, too, when `lora.targets` is needed and missing."""
        targets = _targets(spec, shape.model_type)
        if shape.tied and spec.models_language:  # a classifier has no output layer to be tied
            refuse_tied_targets(targets, TOKEN_MODULES)
        return _adapter_parameters(shape, targets=targets, rank=spec.lora.rank)

    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """See `PeftMethod`: on the given or the architecture's usual projections."""
        from peft import LoraConfig

        model_type = str(model.config.model_type)
        targets = _targets(spec, model_type)
        refuse_tied_targets(targets, _tied_modules(model))
        _refuse_absent(targets, model)
        return LoraConfig(
            r=spec.lora.rank,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=list(targets),
            fan_in_fan_out=model_type in TRANSPOSED,
            **shared,
        )


def adapters_on_queries_and_values(shape: ModelShape, *, rank: int) -> int:
    """Weights of the adapters of both projections in every layer."""
    return shape.layers * rank * (2 * shape.hidden + shape.heads * shape.head_dim + shape.kv_heads * shape.head_dim)


def _targets(spec: RunSpec, model_type: str) -> tuple[str, ...]:
    """The modules that get an adapter. Raises ModelError where the spec names none and the architecture is unknown."""
    targets = spec.lora.targets or DEFAULT_LORA_TARGETS.get(model_type)
    if targets is None:
        raise ModelError(
            f"which modules of {model_type} should get an adapter is not known",
            allowed=f"without lora.targets: {', '.join(DEFAULT_LORA_TARGETS)}",
            do="set lora.targets to the names of the attention's projections",
        )
    return targets


def _adapter_parameters(shape: ModelShape, *, targets: tuple[str, ...], rank: int) -> int:
    """Weights of the two factors of every adapter: rank x (inputs + outputs) for each matched module."""
    modules = linear_modules(shape)
    if not modules:  # an architecture we do not know by name: its projections are about hidden x hidden
        return len(targets) * shape.layers * rank * 2 * shape.hidden
    for target in targets:
        if not any(matches(name, target) for name in modules):
            names = sorted({name.rpartition(".")[2] for name in modules})
            near = difflib.get_close_matches(target, names, n=1)
            raise ModelError(
                f"{shape.model_type} has no module {target}",
                got=f"lora.targets: {', '.join(targets)}",
                allowed=", ".join(names),
                do=f"did you mean {near[0]}?" if near else None,
            )
    matched = [size for name, size in modules.items() if any(matches(name, target) for target in targets)]
    return sum(rank * (inputs + outputs) for inputs, outputs in matched)


def refuse_tied_targets(targets: Sequence[str], tied: Sequence[str]) -> None:
    """Raises ModelError when an adapter is wanted on a module whose weight is another's too.

    Both would train with one of them adapted and be merged into both: the finished model would compute something else.
    """
    wrong = [target for target in targets if any(matches(name, target) or matches(target, name) for name in tied)]
    if wrong:
        rest = [target for target in targets if target not in wrong]
        raise ModelError(
            "an adapter on one of two tied layers cannot be merged: token table and output layer are one weight",
            got=f"lora.targets: {', '.join(targets)}",
            allowed="projections of attention and MLP",
            do=f"set lora.targets=[{', '.join(rest)}]" if rest else "leave lora.targets out, or use method: full",
        )


def matches(name: str, target: str) -> bool:
    """peft's rule for a list of names: the whole name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def _refuse_absent(targets: Sequence[str], model: Module) -> None:
    """Raises ModelError where no target is a module of the model."""
    modules = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    if not any(matches(name, target) for name in modules for target in targets):
        leaves = sorted({name.rpartition(".")[2] for name in modules})
        raise ModelError(
            "lora.targets names no module of this model", got=", ".join(targets), allowed=", ".join(leaves)
        )


def _tied_modules(model: Module) -> tuple[str, ...]:
    """Full names of token table and output layer where both have one weight."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return ()
    return tuple(name for name, module in model.named_modules() if any(module is end for end in ends))
