"""The configuration of a model for text and pictures -> that of its text part, where it can be trained alone."""

from __future__ import annotations

from typing import Any

from orchestrator.errors import ModelError

TAKEN_APART = ("dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
"""Architectures of whose folder `AutoModelForCausalLM` of transformers 5.23 loads the text part alone."""
_NOT_ALONE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")
"""Text parts that `AutoModelForCausalLM` of transformers 5.23 has no class for."""


def text_part(config: dict[str, Any], *, location: str, weights: bool) -> dict[str, Any]:
    """The nested `text_config` of a configuration that has one; any other configuration as it is.

    `weights` says whether those in the folder are wanted, or only its sizes. Raises ModelError, with what saves the
    text part as a folder of its own, where transformers would load the part for pictures too, or nothing.
    """
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    kind = str(nested.get("model_type") or f"{config['model_type']}_text")
    if not weights or config["model_type"] in TAKEN_APART:
        return {**nested, "model_type": kind}
    save = f"save the text part: {_recipe(location)} and model.base=text"
    raise ModelError(
        "the base model reads more than text, and its text part cannot be trained from this folder",
        got=f"{location} ({config['model_type']} around {kind})",
        allowed=f"a model of text, or {', '.join(TAKEN_APART)}, whose text part transformers loads alone",
        do="give a model of text" if kind in _NOT_ALONE else save,
    )


def _recipe(location: str) -> str:
    return (
        f'python -c "import transformers as t; m = t.AutoModelForImageTextToText.from_pretrained({location!r}); '
        "c = t.AutoModelForCausalLM.from_config(m.config.get_text_config()); "
        "c.model.load_state_dict(m.model.language_model.state_dict()); "
        "c.lm_head.load_state_dict(m.lm_head.state_dict()); c.save_pretrained('text'); "
        f"t.AutoTokenizer.from_pretrained({location!r}).save_pretrained('text')\""
    )
