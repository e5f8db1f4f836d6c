"""The weights of an architecture before it exists: the name and shape of each, from a configuration.

One table for what `plan` counts, which weights a method trains, and what the files of a base must hold. Tied output
layers are left out, as in a module's parameters. Names and shapes are those of transformers 5.23, which tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shape = tuple[int, ...]
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3")
Weights = dict[str, Shape]
Sizes = Mapping[str, Any]
"""`hidden`, `layers`, `heads`, `kv_heads`, `head_dim`, `intermediate`, `vocab`, `tied` of a `ModelShape`."""


HEAD_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_LLAMA_LIKE, "gpt2", "gpt_neox", "opt"), ("score",)),
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
USUAL_HEADS = ("classifier", "score")
"""The classification head of an architecture that `HEAD_MODULES` does not know."""


_BEFORE_LAYERS = ("wte", "wpe", "project_in", "conv")
"""Modules before the layers that have no `embed` in their names."""
_RELATIVE = "deberta.encoder.LayerNorm"
"""That of the relative positions' table."""


def head_modules(model_type: str) -> tuple[str, ...]:
    """Names of the modules that are the classification head of an architecture."""
    return HEAD_MODULES.get(model_type, USUAL_HEADS)


def is_in_head(name: str, model_type: str) -> bool:
    """Whether a parameter belongs to the classification head, by its full name."""
    return any(part in head_modules(model_type) for part in name.split("."))


def depth_of(name: str) -> int | None:
    """The layer that a weight is in, from 0; -1 for what lies before the layers, None for what lies behind them.

    In ALBERT it is the group of layers that share their weights.
    """
    parts = name.split(".")
    for part in parts:
        if part.isdigit():
            return int(part)
    return -1 if any("embed" in part or part in _BEFORE_LAYERS for part in parts) or _RELATIVE in name else None


def weights_of(config: Mapping[str, Any], sizes: Sizes, *, labels: int) -> Weights | None:
    """All weights with the head of a task: for `labels` classes of texts, or with 0 for the architecture's own kind of
    language modelling; None for an architecture that is not in the table.
    """
    make = _ARCHITECTURES.get(str(config["model_type"]))
    return None if make is None else make(config, sizes, labels)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Weights:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm(name: str, size: int, *, bias: bool = True) -> Weights:
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if bias else {})}


def _square(names: str, size: int) -> Weights:
    """Linear layers from a size to itself, with biases."""
    return {key: shape for name in names.split() for key, shape in _linear(name, size, size).items()}


def _repeated(prefix: str, layers: int, layer: Weights) -> Weights:
    return {f"{prefix}.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}


def _causal_head(s: Sizes, labels: int, *, width: int | None = None, name: str = "lm_head") -> Weights:
    width = width or s["hidden"]
    if labels:
        return _linear("score", width, labels, bias=False)
    return {} if s["tied"] else _linear(name, width, s["vocab"], bias=False)


# -- decoders ----------------------------------------------------------------------------------------------------------


def _gpt2(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, i = s["hidden"], s["intermediate"]

    def conv(name: str, inputs: int, outputs: int) -> Weights:  # which keeps its weights transposed
        return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}

    layer = {**_norm("ln_1", h), **conv("attn.c_attn", h, 3 * h), **conv("attn.c_proj", h, h)}
    layer |= {**_norm("ln_2", h), **conv("mlp.c_fc", h, i), **conv("mlp.c_proj", i, h)}
    body: Weights = {"transformer.wte.weight": (s["vocab"], h), "transformer.wpe.weight": (s["context"], h)}
    body |= _repeated("transformer.h", s["layers"], layer) | _norm("transformer.ln_f", h)
    return body | _causal_head(s, labels)


def _llama_like(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    kind, h, i, d = config["model_type"], s["hidden"], s["intermediate"], s["head_dim"]
    q, kv = s["heads"] * d, s["kv_heads"] * d
    bias = bool(config.get("attention_bias", False))
    first = bias or kind == "qwen2"
    if kind == "phi3":
        layer = _linear("self_attn.qkv_proj", h, q + 2 * kv, bias=False) | _linear("self_attn.o_proj", q, h, bias=False)
        layer |= _linear("mlp.gate_up_proj", h, 2 * i, bias=False) | _linear("mlp.down_proj", i, h, bias=False)
    else:
        layer = _linear("self_attn.q_proj", h, q, bias=first) | _linear("self_attn.k_proj", h, kv, bias=first)
        layer |= _linear("self_attn.v_proj", h, kv, bias=first) | _linear("self_attn.o_proj", q, h, bias=bias)
        also = bool(config.get("mlp_bias", False))
        layer |= _linear("mlp.gate_proj", h, i, bias=also) | _linear("mlp.up_proj", h, i, bias=also)
        layer |= _linear("mlp.down_proj", i, h, bias=also)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in norms:
        layer |= _norm(name, h, bias=False)
    if kind in ("qwen3", "gemma3_text"):
        layer |= _norm("self_attn.q_norm", d, bias=False) | _norm("self_attn.k_norm", d, bias=False)
    body = {"model.embed_tokens.weight": (s["vocab"], h), **_repeated("model.layers", s["layers"], layer)}
    return body | _norm("model.norm", h, bias=False) | _causal_head(s, labels)


def _gpt_neox(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, i = s["hidden"], s["intermediate"]
    bias = bool(config.get("attention_bias", True))
    layer = _norm("input_layernorm", h) | _norm("post_attention_layernorm", h)
    layer |= _linear("attention.query_key_value", h, 3 * h, bias=bias) | _linear("attention.dense", h, h, bias=bias)
    layer |= _linear("mlp.dense_h_to_4h", h, i) | _linear("mlp.dense_4h_to_h", i, h)
    body = {"gpt_neox.embed_in.weight": (s["vocab"], h), **_repeated("gpt_neox.layers", s["layers"], layer)}
    return body | _norm("gpt_neox.final_layer_norm", h) | _causal_head(s, labels)


def _opt(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, i, at = s["hidden"], s["intermediate"], "model.decoder"
    e = config.get("word_embed_proj_dim") or h
    bias, affine = bool(config.get("enable_bias", True)), bool(config.get("layer_norm_elementwise_affine", True))
    layer: Weights = {}
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        layer |= _linear(f"self_attn.{name}", h, h, bias=bias)
    layer |= _linear("fc1", h, i, bias=bias) | _linear("fc2", i, h, bias=bias)
    if affine:
        layer |= _norm("self_attn_layer_norm", h) | _norm("final_layer_norm", h)
    # Two rows more than positions: OPT counts from 2.
    body: Weights = {
        f"{at}.embed_tokens.weight": (s["vocab"], e),
        f"{at}.embed_positions.weight": (s["context"] + 2, h),
    }
    if e != h:
        body |= _linear(f"{at}.project_in", e, h, bias=False) | _linear(f"{at}.project_out", h, e, bias=False)
    if affine and config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        body |= _norm(f"{at}.final_layer_norm", h)
    return body | _repeated(f"{at}.layers", s["layers"], layer) | _causal_head(s, labels, width=e)


# -- encoders ----------------------------------------------------------------------------------------------------------


def _positions(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or 512)


def _embeddings(at: str, config: Mapping[str, Any], s: Sizes, *, width: int, segments: int) -> Weights:
    found = {f"{at}.word_embeddings.weight": (s["vocab"], width)}
    found[f"{at}.position_embeddings.weight"] = (_positions(config), width)
    if segments:
        found[f"{at}.token_type_embeddings.weight"] = (segments, width)
    return found | _norm(f"{at}.LayerNorm", width)


def _encoder_layer(s: Sizes, *, attention: Weights) -> Weights:
    h, i = s["hidden"], s["intermediate"]
    layer = {**attention, **_square("attention.output.dense", h), **_norm("attention.output.LayerNorm", h)}
    layer |= _linear("intermediate.dense", h, i) | _linear("output.dense", i, h) | _norm("output.LayerNorm", h)
    return layer


def _dense_and_projection(h: int, labels: int) -> Weights:
    return _square("classifier.dense", h) | _linear("classifier.out_proj", h, labels)


def _masked_output(s: Sizes, *, decoder: str, bias: str, width: int, own_bias: bool = True) -> Weights:
    """What follows the transform: a bias for each entry, and untied the layer itself, in most with another bias."""
    found: Weights = {bias: (s["vocab"],)}
    return found if s["tied"] else found | _linear(decoder, width, s["vocab"], bias=own_bias)


def _bert(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    kind, h = config["model_type"], s["hidden"]
    at = "bert" if kind == "bert" else "roberta"
    attention = _square("attention.self.query attention.self.key attention.self.value", h)
    body = _embeddings(f"{at}.embeddings", config, s, width=h, segments=config.get("type_vocab_size", 2))
    body |= _repeated(f"{at}.encoder.layer", s["layers"], _encoder_layer(s, attention=attention))
    if labels:
        if kind == "bert":
            return body | _square("bert.pooler.dense", h) | _linear("classifier", h, labels)
        return body | _dense_and_projection(h, labels)
    if kind == "bert":
        body |= _square("cls.predictions.transform.dense", h) | _norm("cls.predictions.transform.LayerNorm", h)
        return body | _masked_output(s, decoder="cls.predictions.decoder", bias="cls.predictions.bias", width=h)
    body |= _square("lm_head.dense", h) | _norm("lm_head.layer_norm", h)
    return body | _masked_output(s, decoder="lm_head.decoder", bias="lm_head.bias", width=h)


def _distilbert(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, i = s["hidden"], s["intermediate"]
    layer = _square("attention.q_lin attention.k_lin attention.v_lin attention.out_lin", h) | _norm("sa_layer_norm", h)
    layer |= _linear("ffn.lin1", h, i) | _linear("ffn.lin2", i, h) | _norm("output_layer_norm", h)
    body = _embeddings("distilbert.embeddings", config, s, width=h, segments=0)
    body |= _repeated("distilbert.transformer.layer", s["layers"], layer)
    if labels:
        return body | _square("pre_classifier", h) | _linear("classifier", h, labels)
    body |= _square("vocab_transform", h) | _norm("vocab_layer_norm", h)
    output: Weights = {} if s["tied"] else {"vocab_projector.weight": (s["vocab"], h)}
    return body | output | {"vocab_projector.bias": (s["vocab"],)}


def _albert(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, i, e = s["hidden"], s["intermediate"], config.get("embedding_size") or 128
    layer = _norm("full_layer_layer_norm", h) | _square("attention.query attention.key attention.value", h)
    layer |= _square("attention.dense", h) | _norm("attention.LayerNorm", h)
    layer |= _linear("ffn", h, i) | _linear("ffn_output", i, h)
    body = _embeddings("albert.embeddings", config, s, width=e, segments=config.get("type_vocab_size", 2))
    body |= _linear("albert.encoder.embedding_hidden_mapping_in", e, h)
    group = _repeated("albert_layers", config.get("inner_group_num") or 1, layer)
    body |= _repeated("albert.encoder.albert_layer_groups", config.get("num_hidden_groups") or 1, group)
    if labels:
        return body | _square("albert.pooler", h) | _linear("classifier", h, labels)
    body |= _norm("predictions.LayerNorm", e) | _linear("predictions.dense", h, e)
    return body | _masked_output(s, decoder="predictions.decoder", bias="predictions.bias", width=e)


def _electra(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, e = s["hidden"], config.get("embedding_size") or 128
    attention = _square("attention.self.query attention.self.key attention.self.value", h)
    body = _embeddings("electra.embeddings", config, s, width=e, segments=config.get("type_vocab_size", 2))
    if e != h:
        body |= _linear("electra.embeddings_project", e, h)
    body |= _repeated("electra.encoder.layer", s["layers"], _encoder_layer(s, attention=attention))
    if labels:
        return body | _dense_and_projection(h, labels)
    body |= _norm("generator_predictions.LayerNorm", e) | _linear("generator_predictions.dense", h, e)
    output: Weights = {} if s["tied"] else {"generator_lm_head.weight": (s["vocab"], e)}
    return body | output | {"generator_lm_head.bias": (s["vocab"],)}


def _modernbert(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, i = s["hidden"], s["intermediate"]
    norm, attention, mlp = (bool(config.get(f"{name}_bias", False)) for name in ("norm", "attention", "mlp"))
    body = {"model.embeddings.tok_embeddings.weight": (s["vocab"], h), **_norm("model.embeddings.norm", h, bias=norm)}
    layer = _linear("attn.Wqkv", h, 3 * h, bias=attention) | _linear("attn.Wo", h, h, bias=attention)
    layer |= _norm("mlp_norm", h, bias=norm) | _linear("mlp.Wi", h, 2 * i, bias=mlp) | _linear("mlp.Wo", i, h, bias=mlp)
    body |= _repeated("model.layers", s["layers"], layer)
    for n in range(1, s["layers"]):  # the first layer follows the embeddings' norm
        body |= _norm(f"model.layers.{n}.attn_norm", h, bias=norm)
    body |= _norm("model.final_norm", h, bias=norm)
    head = bool(config.get("classifier_bias", False))
    body |= _linear("head.dense", h, h, bias=head) | _norm("head.norm", h, bias=norm)
    if labels:
        return body | _linear("classifier", h, labels)
    decoder: Weights = {"decoder.bias": (s["vocab"],)} if config.get("decoder_bias", True) else {}
    return body | decoder | ({} if s["tied"] else {"decoder.weight": (s["vocab"], h)})


def _deberta_v2(config: Mapping[str, Any], s: Sizes, labels: int) -> Weights:
    h, e = s["hidden"], config.get("embedding_size") or s["hidden"]
    projections = "attention.self.query_proj attention.self.key_proj attention.self.value_proj"
    kinds, relative = config.get("pos_att_type") or [], bool(config.get("relative_attention", False))
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    if relative and not config.get("share_att_key", False):
        projections += " attention.self.pos_key_proj" if "c2p" in kinds else ""
        projections += " attention.self.pos_query_proj" if "p2c" in kinds else ""
    at = "deberta.embeddings"
    body: Weights = {f"{at}.word_embeddings.weight": (s["vocab"], e), **_norm(f"{at}.LayerNorm", h)}
    if config.get("position_biased_input", True):
        body[f"{at}.position_embeddings.weight"] = (_positions(config), e)
    if segments := config.get("type_vocab_size") or 0:
        body[f"{at}.token_type_embeddings.weight"] = (segments, e)
    if e != h:
        body |= _linear(f"{at}.embed_proj", e, h, bias=False)
    body |= _repeated("deberta.encoder.layer", s["layers"], _encoder_layer(s, attention=_square(projections, h)))
    body |= _relative(config, h) if relative else {}
    if kernel := config.get("conv_kernel_size") or 0:
        groups = config.get("conv_groups") or 1
        body |= {"deberta.encoder.conv.conv.weight": (h, h // groups, kernel), "deberta.encoder.conv.conv.bias": (h,)}
        body |= _norm("deberta.encoder.conv.LayerNorm", h)
    if labels:
        p = config.get("pooler_hidden_size") or h
        return body | _linear("pooler.dense", p, p) | _linear("classifier", p, labels)
    body |= _linear("cls.predictions.transform.dense", h, e) | _norm("cls.predictions.transform.LayerNorm", e)
    return body | _masked_output(s, decoder="cls.predictions.decoder", bias="cls.predictions.bias", width=e)


def _relative(config: Mapping[str, Any], h: int) -> Weights:
    reach = config.get("position_buckets") or -1
    if reach < 1:
        reach = config.get("max_relative_positions") or -1
    found: Weights = {"deberta.encoder.rel_embeddings.weight": (2 * (reach if reach > 0 else _positions(config)), h)}
    kinds = [name.strip() for name in str(config.get("norm_rel_ebd", "none")).lower().split("|")]
    return found | (_norm("deberta.encoder.LayerNorm", h) if "layer_norm" in kinds else {})


_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], Sizes, int], Weights]] = {
    "gpt2": _gpt2,
    **dict.fromkeys(_LLAMA_LIKE, _llama_like),
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _bert),
    "distilbert": _distilbert,
    "albert": _albert,
    "electra": _electra,
    "modernbert": _modernbert,
    "deberta-v2": _deberta_v2,
}
KNOWN = frozenset(_ARCHITECTURES)
"""Architectures whose weights are known one by one."""
