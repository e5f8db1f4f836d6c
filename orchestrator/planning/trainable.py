"""Which weights a method trains, by architecture: adapters and heads by the names of their modules, and their number.

The training code picks the modules from the same tables; `plan` counts.
Nothing here loads torch or transformers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orchestrator.architectures.families import LLAMA_LIKE, ModelShape
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

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

MASKED_LM_TRANSFORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "deberta-v2"), ("predictions.transform",)),
    **dict.fromkeys(("roberta", "camembert", "xlm-roberta"), ("lm_head.dense", "lm_head.layer_norm")),
    "distilbert": ("vocab_transform", "vocab_layer_norm"),
    "albert": ("predictions.dense", "predictions.LayerNorm"),
    "electra": ("generator_predictions",),
    "modernbert": ("head",),
}
"""What a masked language model has between its last layer and the token table: a dense layer and a normalisation.

`method: lora` trains them besides the adapters, because a sentence encoder comes without them.
"""
_MASKED_LM_HEADS = ("cls.", "lm_head.", "vocab_transform.", "predictions.", "generator_predictions.", "head.")
"""How the names of a masked-LM head's weights begin: those above, ALBERT, ELECTRA and ModernBERT."""


TOKEN_MODULES = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "lm_head", "embed_out", "decoder"),
    *("vocab_projector", "generator_lm_head"),
)
"""What architectures call the token table and the output layer, which in a tied model are one weight."""


def trainable_parameters(spec: RunSpec, shape: ModelShape) -> int:
    """How many weights the method trains: all, the head (see `HEAD_MODULES`), or LoRA's adapters and the head or
    `MASKED_LM_TRANSFORMS`.

    Raises ModelError when `lora.targets` names no module of the architecture, or is needed and missing.
    """
    if spec.method in ("full", "scratch"):
        return shape.parameters
    if spec.method == "head":
        return shape.head_parameters
    targets = spec.lora.targets or DEFAULT_LORA_TARGETS.get(shape.model_type)
    if targets is None:
        raise ModelError(
            f"which modules of {shape.model_type} should get an adapter is not known",
            allowed=f"without lora.targets: {', '.join(DEFAULT_LORA_TARGETS)}",
            do="set lora.targets to the names of the attention's projections",
        )
    if shape.tied and spec.task != "text-classification":  # a classifier has no output layer to be tied
        refuse_tied_targets(targets, TOKEN_MODULES)
    whole = shape.head_parameters
    if spec.task == "masked-lm":
        transforms = MASKED_LM_TRANSFORMS.get(shape.model_type, ())
        whole = sum(
            math.prod(size)
            for name, size in shape.weights.items()
            if any(f".{part}." in f".{name}" for part in transforms)
        )
    return _adapter_parameters(shape, targets=targets, rank=spec.lora.rank) + whole


def lacks_masked_lm_head(names: Iterable[str]) -> bool:
    """Whether a base model's files surely hold no masked-LM head, by the names of its weights."""
    return not any(name.startswith(_MASKED_LM_HEADS) for name in names)


def _adapter_parameters(shape: ModelShape, *, targets: tuple[str, ...], rank: int) -> int:
    """Weights of the two factors of every adapter: rank x (inputs + outputs) for each matched module."""
    modules = _linear_modules(shape)
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


def _linear_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The two sizes of the linear modules of all layers, by name; empty for an unknown architecture."""
    return {
        name.removesuffix(".weight"): (size[0], size[1])
        for name, size in shape.weights.items()
        if len(size) == 2 and any(part.isdigit() for part in name.split("."))
    }
