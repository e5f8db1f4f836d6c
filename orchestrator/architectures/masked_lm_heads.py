"""What stands behind the last layer of a masked language model, by architecture. No torch."""

from __future__ import annotations

from collections.abc import Iterable

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


def lacks_masked_lm_head(names: Iterable[str]) -> bool:
    """Whether a base model's files surely hold no masked-LM head, by the names of its weights."""
    return not any(name.startswith(_MASKED_LM_HEADS) for name in names)
