"""`method: lora`: low-rank adapters beside frozen projections, merged into them at export (Hu et al. 2021)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.architectures.families import LLAMA_LIKE
from orchestrator.errors import ModelError
from orchestrator.methods.base import MethodCost, Module, Strategy
from orchestrator.methods.peft_method import TRANSPOSED, PeftMethod, adaptable, linear_modules, within_layer

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.method_names import MethodName
    from orchestrator.spec import RunSpec

LEARNING_RATE_RATIO = 9.8
"""Best learning rate of LoRA over that of full fine-tuning ("LoRA Without Regret" 2025); Biderman 2024: about 10."""
ATTENTION: dict[str, tuple[str, ...]] = {
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
"""Queries and values, by model type: as in peft 0.21 and Hu et al. (2021)."""

TOKEN_MODULES = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "lm_head", "embed_out", "decoder"),
    *("vocab_projector", "generator_lm_head"),
)
"""What architectures call the token table and the output layer, which in a tied model are one weight."""


class Lora(PeftMethod):
    """See the module."""

    name: ClassVar[MethodName] = "lora"
    strategy: ClassVar[Strategy | None] = "peft"
    is_advised = True
    quantised: ClassVar[MethodName | None] = "qlora"
    colour, marker = 1, "s"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`: queries and values (Hu et al. 2021)."""
        return adapters_on_queries_and_values(shape, rank=rank)

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`."""
        return LEARNING_RATE_RATIO * super().learning_rate(base_parameters)

    def largest_zero_stage(self, spec: RunSpec) -> int:
        """See `Method`: peft 0.21.2 measures DoRA's rows when it is set up, and stage 3 has split them by then."""
        return 2 if spec.lora.dora else 3

    def cost_of(self, spec: RunSpec, shape: ModelShape) -> MethodCost:
        """See `Method`: an adapter keeps the input of its module, and its own as narrow as its rank.

        DoRA keeps both results of a module besides, and the sum of its weights about twice (`tests/test_memory.py`).
        """
        sizes = _adapted_sizes(shape, spec.lora.targets)
        per_token, whole = spec.lora.rank * len(sizes) / shape.layers, 0.0
        if spec.lora.dora:
            per_token += 2 * sum(outputs for _, outputs in sizes) / shape.layers
            whole = 2 * sum(inputs * outputs for inputs, outputs in sizes) / shape.layers
        return replace(
            self.cost,
            keeps_inputs=spec.lora.targets != "attention",
            kept_per_token=per_token,
            kept_per_layer=whole,
        )

    def adapter_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `PeftMethod`."""
        settings = spec.lora
        if isinstance(settings.targets, tuple) and shape.tied and spec.models_language:
            refuse_tied_targets(settings.targets, TOKEN_MODULES)  # a classifier has no output layer to be tied
        sizes = _adapted_sizes(shape, settings.targets)
        factors = sum(settings.rank * (inputs + outputs) for inputs, outputs in sizes)
        return factors + (sum(outputs for _, outputs in sizes) if settings.dora else 0)

    def peft_config(self, model: Module, spec: RunSpec, shared: Mapping[str, Any]) -> Any:
        """See `PeftMethod`: on the chosen, or the architecture's usual projections."""
        from peft import LoraConfig

        settings, model_type = spec.lora, str(model.config.model_type)
        if settings.targets == "all-linear":
            targets = _short(adaptable(model), model)
        elif settings.targets == "attention":
            targets = _attention(model_type)
        else:
            targets = settings.targets
            refuse_tied_targets(targets, _tied_modules(model))
            _refuse_absent(targets, model)
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            target_modules=list(targets),
            fan_in_fan_out=model_type in TRANSPOSED,
            **shared,
        )


def adapters_on_queries_and_values(shape: ModelShape, *, rank: int) -> int:
    """Weights of the adapters of both projections in every layer."""
    return shape.layers * rank * (2 * shape.hidden + shape.heads * shape.head_dim + shape.kv_heads * shape.head_dim)


def _attention(model_type: str) -> tuple[str, ...]:
    """Queries and values. Raises ModelError for an architecture whose projections are not known."""
    if model_type not in ATTENTION:
        raise ModelError(
            f"which modules of {model_type} are the attention's projections is not known",
            got="lora.targets: attention",
            allowed=f"with {', '.join(ATTENTION)}",
            do="set lora.targets=all-linear, or to the names of the modules",
        )
    return ATTENTION[model_type]


def _short(names: Sequence[str], model: Module) -> tuple[str, ...]:
    """The same modules by their names inside of a layer, where those are no other's."""
    short = tuple(dict.fromkeys(within_layer(name) for name in names))
    found = [name for name, _ in model.named_modules() if any(matches(name, target) for target in short)]
    return short if found == list(names) else tuple(names)


def _adapted_sizes(shape: ModelShape, targets: str | tuple[str, ...]) -> list[tuple[int, int]]:
    """(inputs, outputs) of each module that gets an adapter. Raises ModelError for a target that there is not."""
    modules = linear_modules(shape)
    if targets == "all-linear":
        return list(modules.values()) if modules else _standard_sizes(shape)
    wanted = _attention(shape.model_type) if isinstance(targets, str) else targets
    if not modules:  # an architecture we do not know by name: its projections are about hidden x hidden
        return [(shape.hidden, shape.hidden)] * (len(wanted) * shape.layers)
    for target in wanted:
        if not any(matches(name, target) for name in modules):
            names = sorted({name.rpartition(".")[2] for name in modules})
            near = difflib.get_close_matches(target, names, n=1)
            raise ModelError(
                f"{shape.model_type} has no module {target}",
                got=f"lora.targets: {', '.join(wanted)}",
                allowed=", ".join(names),
                do=f"did you mean {near[0]}?" if near else None,
            )
    return [size for name, size in modules.items() if any(matches(name, target) for target in wanted)]


def _standard_sizes(shape: ModelShape) -> list[tuple[int, int]]:
    """Those of a standard transformer's linear modules."""
    h, i, q, kv = shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = [(h, q), (h, kv), (h, kv), (q, h), *[(h, i)] * (2 if shape.mlp_tensors == 4 else 1), (i, h)]
    return layer * shape.layers


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
