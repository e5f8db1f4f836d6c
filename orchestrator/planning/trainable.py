"""Which weights a method trains, by architecture: adapters and heads by the names of their modules, and their number.

The training code picks the modules from the same tables; `plan` counts.
Nothing here loads torch or transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator.errors import ModelError
from orchestrator.planning.model_shape import BERT_LIKE, DECODERS, LLAMA_LIKE, ModelShape, transform_parameters

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

DEFAULT_LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn",),
    **dict.fromkeys(LLAMA_LIKE, ("q_proj", "v_proj")),
    **dict.fromkeys(("bert", "roberta"), ("query", "value")),
    "distilbert": ("q_lin", "v_lin"),
}
"""Modules that get an adapter when `lora.targets` is not set, by model type: as in peft 0.21 and Hu et al. (2021)."""

HEAD_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(DECODERS, ("score",)),
    **dict.fromkeys(("bert", "albert", "deberta", "deberta-v2"), ("pooler", "classifier")),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "electra", "mpnet"), ("classifier",)),
    "modernbert": ("head", "classifier"),
    "distilbert": ("pre_classifier", "classifier"),
}
"""Modules of the classification head, by model type and the last part of their name.

`method: head` trains only these; `method: lora` trains them besides the adapters. The head of every encoder is a dense
layer and a projection. BERT's dense layer is its pooler, which may come with the base; it is trained all the same,
because sentence encoders such as MiniLM average the tokens instead and never trained the one they carry, and a masked
language model of ALBERT or DeBERTa-v2 has none.
"""

MASKED_LM_TRANSFORMS: dict[str, tuple[str, ...]] = {
    "bert": ("predictions.transform",),
    "roberta": ("lm_head.dense", "lm_head.layer_norm"),
    "distilbert": ("vocab_transform", "vocab_layer_norm"),
}
"""What a masked language model has between its last layer and the token table: a dense layer and a normalisation.

`method: lora` trains them besides the adapters, because a sentence encoder comes without them.
"""
_MASKED_LM_HEADS = ("cls.", "lm_head.", "vocab_transform.", "predictions.", "generator_predictions.", "head.")
"""How the names of a masked-LM head's weights begin: those above, ALBERT, ELECTRA and ModernBERT."""


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
    whole = shape.head_parameters
    if spec.task == "masked-lm" and shape.model_type in MASKED_LM_TRANSFORMS:
        whole = transform_parameters(shape.hidden)
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
        if not any(_matches(name, target) for name in modules):
            names = sorted({name.rpartition(".")[2] for name in modules})
            near = difflib.get_close_matches(target, names, n=1)
            raise ModelError(
                f"{shape.model_type} has no module {target}",
                got=f"lora.targets: {', '.join(targets)}",
                allowed=", ".join(names),
                do=f"did you mean {near[0]}?" if near else None,
            )
    matched = [size for name, size in modules.items() if any(_matches(name, target) for target in targets)]
    return shape.layers * sum(rank * (inputs + outputs) for inputs, outputs in matched)


def _matches(name: str, target: str) -> bool:
    """peft's rule for a list of names: the whole name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def _linear_modules(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear modules of one layer, by name; empty for an unknown architecture."""
    h, i = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    square = (h, h)
    if shape.model_type == "gpt2":
        return {"attn.c_attn": (h, 3 * h), "attn.c_proj": square, "mlp.c_fc": (h, i), "mlp.c_proj": (i, h)}
    if shape.model_type in LLAMA_LIKE:
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return {**attention, "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}
    if shape.model_type == "distilbert":
        return {**dict.fromkeys(("q_lin", "k_lin", "v_lin", "out_lin"), square), "ffn.lin1": (h, i), "ffn.lin2": (i, h)}
    if shape.model_type in BERT_LIKE:
        attention = dict.fromkeys(("query", "key", "value", "attention.output.dense"), square)
        return {**attention, "intermediate.dense": (h, i), "output.dense": (i, h)}
    return {}
