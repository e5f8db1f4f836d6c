"""A model before it exists: its Hugging Face configuration, and from that its exact number of parameters.

`model_config` turns the `model:` block of a spec into the configuration as a plain mapping; the training code builds
the model from the same mapping. `families` counts. Nothing here loads torch or transformers.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.architectures.stored_weights import refuse_gguf
from orchestrator.architectures.text_part import text_part
from orchestrator.architectures.weight_names import HEAD_MODULES, Shape, weights_of
from orchestrator.errors import ModelError
from orchestrator.locations import resolve


class ModelChoice(Protocol):
    """Which model: the fields of a spec's `model` block, which says what each means."""

    @property
    def config(self) -> str | None:
        """A family of `FAMILY_DEFAULTS`, or a path, for new weights."""
        ...

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Values in place of the architecture's."""
        ...

    @property
    def base(self) -> str | None:
        """Pretrained weights."""
        ...

    @property
    def adapter(self) -> str | None:
        """What stands beside them."""
        ...

    @property
    def tokenizer(self) -> str:
        """`auto`, a folder or a hub name."""
        ...

    @property
    def vocab_size(self) -> int:
        """Entries of a tokenizer that is trained."""
        ...


# Beginning- and end-of-text and padding are null: their ids come from the tokenizer, and the published ones lie outside
# a small vocabulary.
# fmt: off
_BERT_BASE: dict[str, Any] = {
    "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    # GPT-2 small (Radford et al. 2019), as Hugging Face's GPT2Config has it.
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "bos_token_id": None, "eos_token_id": None,
        "n_layer": 12, "n_embd": 768, "n_head": 12, "n_inner": None, "tie_word_embeddings": True,
        "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    },
    # Llama's architecture (Touvron et al. 2023) at GPT-2 small's size: 8/3 x hidden wide in the gated MLP, which
    # costs what 4 x does in an ungated one, and tied embeddings as in small models since.
    "llama": {
        "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": None,
        "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "tie_word_embeddings": True,
        "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": None,
        "hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False,
        "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    },
    # The base sizes of Devlin et al. (2019) and Liu et al. (2019), as in their published configurations.
    "bert": {
        "model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, **_BERT_BASE,
    },
    "roberta": {
        "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
        "layer_norm_eps": 1e-5, **_BERT_BASE,
    },
}
# fmt: on
"""Configuration of each family that `model.config` names; `model.overrides` replaces single values."""

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3")
DECODERS = ("gpt2", "gpt_neox", "opt", *LLAMA_LIKE)
ENCODERS = (
    *("bert", "roberta", "distilbert", "albert", "camembert", "deberta", "deberta-v2", "electra", "modernbert"),
    *("mpnet", "xlm-roberta"),
)
"""Architectures whose tokens see those on both sides."""
_UNTIED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox")
"""Whose output layer is its own where a config.json does not say."""
_UNUSED_POSITIONS = {"roberta": 2}
"""Rows of the position table that no token gets: RoBERTa counts from its padding's id, 1, plus 1."""

MOST_SIZE = 10**9
"""Of any size of a model: a thousand times the widest published; what is above is a slip."""
# What transformers assumes when a config.json leaves it out; else: as many as heads, and the hidden size over them.
MOST_LAYERS = 10_000
"""Ten times the deepest transformer published (DeepNet, 2022)."""
_DEFAULT_KV_HEADS = {"mistral": 8}
_DEFAULT_HEAD_DIM = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
_LOOKED_UP = (
    *("word_embeddings", "position_embeddings", "token_type_embeddings", "wte", "wpe", "embed_tokens"),
    *("embed_positions", "embed_in", "tok_embeddings"),
)
"""Modules that are tables."""
_SHARES = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)
"""Settings of the families above that are probabilities of dropping."""
_DROPOUTS = ("attn_pdrop", "attention_probs_dropout_prob", "attention_dropout")
_SYNONYMS = {
    "hidden": ("hidden_size", "n_embd", "dim", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "intermediate": ("intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
"""Names that configurations use for the same size."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that memory, time and adapters follow from."""

    model_type: str
    parameters: int
    """All weights, tied ones once, with the head of the task."""
    embedding_parameters: int
    """Weights that are looked up, not multiplied: token, position and segment tables."""
    head_parameters: int
    """Weights of a classification head; 0 for language modelling, whose head is part of the base."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int | None
    """Longest sequence; None when the architecture sets no limit."""
    tied: bool
    """Whether the output layer is the token table."""
    causal: bool
    """Whether a token sees only those before it."""
    mlp_tensors: int
    """Tensors of width `intermediate` that a layer keeps for its backward pass."""
    rms_norm: bool
    """Whether layers are normalised by RMSNorm, which computes in fp32, rather than by a fused layer norm."""
    dropout: bool
    """Whether training drops activations, whose masks are kept."""
    exact: bool
    """Whether `parameters` is exact, or a standard transformer's of this size."""
    used_again: int = 0
    """Weights that a token meets once more, in layers that share them."""
    weights: Mapping[str, Shape] = field(default_factory=dict, repr=False)
    """Name and shape of each weight, with the head of the task; empty where they are not known."""


def model_config(
    model: ModelChoice, *, vocab_size: int | None = None, sequence_length: int | None = None
) -> dict[str, Any]:
    """The Hugging Face configuration of a model, without building it.

    New weights take `vocab_size`, else the trained tokenizer's `model.vocab_size`, and room for `sequence_length`
    tokens unless an override sets the context. A base keeps its own sizes.
    Raises ModelError when there is no such model, an override is unknown, or sizes do not go together.
    """
    if model.base is not None:
        described = None if model.adapter is None else configuration_beside(model.adapter)
        config = _read_config(model.base if described is None else str(described), field="model.base")
        _check_vocabulary(config, vocab_size)
        return config
    assert model.config is not None  # the spec holds one of the two
    named = FAMILY_DEFAULTS.get(model.config)
    config = dict(named) if named else _read_config(model.config, field="model.config")
    _check_overrides(config, model.overrides)
    config.update(model.overrides)
    if vocab_size is not None or model.tokenizer == "auto":
        config["vocab_size"] = vocab_size or model.vocab_size
    if named and sequence_length is not None:
        key = _first_name(config, "context")
        if key not in model.overrides:
            config[key] = max(config[key], sequence_length + _UNUSED_POSITIONS.get(model.config, 0))
    _check_heads(config)
    return config


CONFIG = "config"
"""In an adapter's folder: the configuration to load its base with, which names the classes. In the folder itself it
would make transformers look for whole weights there."""


def configuration_beside(adapter: str) -> Path | None:
    """The configuration that `export: adapter` leaves; None for an adapter without."""
    path = Path(resolve(adapter)) / CONFIG
    return path if (path / "config.json").is_file() else None


def _check_vocabulary(config: dict[str, Any], vocab_size: int | None) -> None:
    own = config.get("vocab_size")
    if vocab_size is not None and own is not None and vocab_size > own:
        raise ModelError(
            "the tokenizer has more entries than the base model's embedding",
            got=f"{vocab_size} entries for an embedding of {own}",
            do="set model.tokenizer=auto to use the base model's own",
        )


def _check_overrides(config: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    valid = set(config) | set(FAMILY_DEFAULTS.get(str(config.get("model_type")), ()))
    valid -= {"model_type", "vocab_size", "architectures", "transformers_version", "_name_or_path"}
    for name in overrides:
        if name == "vocab_size":
            raise ModelError(
                "the vocabulary is the tokenizer's", got="model.overrides.vocab_size", do="set model.vocab_size"
            )
        if name not in valid:
            same = [other for names in _SYNONYMS.values() if name in names for other in names if other in valid]
            near = same or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            raise ModelError(
                f"{config.get('model_type')} has no setting {name}",
                got=f"model.overrides.{name}",
                allowed=", ".join(sorted(valid)),
                do=f"did you mean {near[0]}?" if near else "remove it",
            )
        usual = config.get(name)
        kinds = (int, float) if type(usual) in (int, float) else (type(usual),)
        if usual is not None and type(overrides[name]) not in kinds:
            raise ModelError(
                f"{config.get('model_type')} takes another kind of value for {name}",
                got=f"model.overrides.{name}: {overrides[name]!r:.100}",
                allowed=f"such as {usual!r}",
                do="correct it",
            )
        if name in _SHARES and not 0 <= overrides[name] < 1:
            raise ModelError(
                f"{name} is a share", got=overrides[name], allowed="0 or more, below 1", do=f"correct {name}"
            )


def _check_heads(config: dict[str, Any]) -> None:
    hidden, heads = _size(config, "hidden"), _size(config, "heads")
    if hidden % heads and not config.get("head_dim"):
        name = _first_name(config, "hidden")
        raise ModelError(
            "the hidden size does not split evenly over the attention heads",
            got=f"{name} {hidden} and {_first_name(config, 'heads')} {heads}",
            do=f"set model.overrides.{name} to a multiple of {heads}, such as {(hidden // heads + 1) * heads}",
        )
    kv_heads = _given_size(config, "num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(
            "the attention heads do not split evenly over the key-value heads",
            got=f"{heads} heads and num_key_value_heads {kv_heads}",
            do=f"set model.overrides.num_key_value_heads to a divisor of {heads}",
        )


def _read_config(location: str, *, field: str) -> dict[str, Any]:
    """The mapping in the config.json of a folder, a file or a hub name."""
    path = Path(resolve(location))
    refuse_gguf(path)
    file = path if path.suffix == ".json" else path / "config.json"
    if not path.exists():
        if _looks_like_a_path(location):
            raise ModelError(f"{field} names no folder or file", got=str(path), do="give a folder with a config.json")
        file = _hub_config(location, field=field)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (path / "adapter_config.json").exists():
            raise ModelError(
                f"{field} is an adapter, which is no model without its base",
                got=path,
                do="give a merged model: set export=merged in the run that made it, or merge it with peft",
            ) from error
        raise ModelError(f"{field} holds no config.json", got=path, do="give a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is not a Hugging Face configuration", got=error) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{file} is not a Hugging Face configuration", got="no model_type in it")
    return text_part(config, location=location, weights=field == "model.base")


def _looks_like_a_path(location: str) -> bool:
    parent = Path(location).parent
    return location.startswith((".", "/", "~")) or "://" in location or (parent != Path(".") and parent.is_dir())


def _hub_config(name: str, *, field: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError) as error:
        raise ModelError(
            f"{field} is no folder here, and the hub has no such model or could not be reached",
            got=f"{name} ({type(error).__name__})",
            allowed=f"{', '.join(FAMILY_DEFAULTS)}, a folder, or a hub name" if field == "model.config" else None,
            do="check the name, or give the folder of a downloaded model",
        ) from error


def _first_name(config: dict[str, Any], size: str) -> str:
    names = _SYNONYMS[size]
    return next((name for name in names if config.get(name) is not None), names[0])


def _size(config: dict[str, Any], size: str) -> int:
    name = _first_name(config, size)
    value = _given_size(config, name)
    if value is None:
        raise _no_size(config, name)
    return value


def _given_size(config: dict[str, Any], name: str) -> int | None:
    """A size of a configuration, None where it is left out; raises ModelError when it is no size."""
    value = config.get(name)
    most = MOST_LAYERS if name in _SYNONYMS["layers"] else MOST_SIZE
    if value is None or (type(value) is int and 1 <= value <= most):
        return value
    raise _no_size(config, name)


def _no_size(config: dict[str, Any], name: str) -> ModelError:
    return ModelError(
        f"the model's configuration has no usable {name}",
        got=f"{config.get(name)!r:.100} for model_type {config.get('model_type')}",
        allowed=f"a positive whole number up to {MOST_LAYERS if name in _SYNONYMS['layers'] else MOST_SIZE:.0e}",
        do=f"correct {name}",
    )


class LearntByModel(Protocol):
    """What of a task decides what a model of it looks like; the tasks are in `tasks`."""

    @property
    def name(self) -> str:
        """As a spec gives it."""

    @property
    def models_language(self) -> bool:
        """Whether the model predicts tokens; else it has a head that predicts classes."""

    @property
    def hides_tokens(self) -> bool:
        """Whether it predicts hidden tokens from both sides."""

    @property
    def generates(self) -> bool:
        """Whether it continues a text."""


def model_shape(config: dict[str, Any], *, task: LearntByModel, num_labels: int | None = None) -> ModelShape:
    """The sizes and the number of parameters of a configuration with the head of a task (2 labels if not said).

    Exact for the architectures of `architectures.KNOWN`; a standard transformer's otherwise.
    Raises ModelError when a size is missing or the model cannot learn the task.
    """
    kind = str(config["model_type"])
    if task.generates and kind in ENCODERS:
        raise ModelError(
            f"{kind} sees the whole text at once, so it cannot learn to continue it",
            got=f"task: {task.name} with model_type {kind}",
            do="use task: masked-lm, which hides tokens of the text, or a model such as gpt2 or llama",
        )
    if task.hides_tokens and kind in DECODERS:
        raise ModelError(
            f"{kind} sees only what comes before a token, so it cannot fill a gap",
            got=f"task: {task.name} with model_type {kind}",
            do="use task: causal-lm, or a model such as bert or roberta",
        )
    vocab = _given_size(config, "vocab_size")
    if vocab is None:
        raise ModelError("the model's configuration has no vocab_size", got=f"model_type {kind}")
    hidden, heads = _size(config, "hidden"), _size(config, "heads")
    known_width = config.get(_first_name(config, "intermediate")) is not None
    context = _given_size(config, _first_name(config, "context"))
    if context:
        context -= _UNUSED_POSITIONS.get(kind, 0)
    labels = 0 if task.models_language else num_labels or 2
    sizes: dict[str, Any] = {
        "model_type": kind,
        "layers": _size(config, "layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _given_size(config, "num_key_value_heads") or _DEFAULT_KV_HEADS.get(kind, heads),
        "head_dim": _given_size(config, "head_dim") or _DEFAULT_HEAD_DIM.get(kind, hidden // heads),
        "intermediate": _size(config, "intermediate") if known_width else 4 * hidden,
        "vocab": vocab,
        "context": context,
        "tied": bool(config.get("tie_word_embeddings", kind not in _UNTIED)),
        "causal": kind not in ENCODERS and not task.hides_tokens,
        "mlp_tensors": _mlp_tensors(config),
        "rms_norm": "rms_norm_eps" in config or kind in LLAMA_LIKE,
        "dropout": any(config.get(name, 0.0 if kind in LLAMA_LIKE else 0.1) for name in _DROPOUTS),
    }
    weights = weights_of(config, sizes, labels=labels)
    if weights is None:
        parameters, embeddings, head = _count_standard(sizes, labels)
        return ModelShape(
            parameters=parameters, embedding_parameters=embeddings, head_parameters=head, exact=False, **sizes
        )
    heads_of = HEAD_MODULES[kind] if labels else ()
    return ModelShape(
        parameters=_count(weights),
        embedding_parameters=_count(weights, within=_LOOKED_UP),
        head_parameters=_count(weights, within=heads_of),
        used_again=_used_again(config, sizes, weights) if kind == "albert" else 0,
        weights=weights,
        exact=True,
        **sizes,
    )


def _count(weights: Mapping[str, Shape], *, within: Collection[str] | None = None) -> int:
    """Of all, or of those in modules whose own name is one of `within`."""
    return sum(
        math.prod(shape)
        for name, shape in weights.items()
        if within is None or not set(name.split(".")).isdisjoint(within)
    )


def _used_again(config: dict[str, Any], sizes: Mapping[str, Any], weights: Mapping[str, Shape]) -> int:
    groups = config.get("num_hidden_groups") or 1
    return int(_count(weights, within=("albert_layers",)) * (sizes["layers"] / groups - 1))


def _mlp_tensors(config: dict[str, Any]) -> int:
    """How many tensors as wide as the MLP autograd keeps, by activation function."""
    activation = config.get("activation_function") or config.get("hidden_act") or config.get("activation") or "gelu"
    if not isinstance(activation, str):
        raise ModelError("the model's activation function is no name", got=f"{activation!r:.100}", do="correct it")
    if activation in ("silu", "swish") or "glu" in activation:
        return 4  # gate, its activation, up, and their product
    if activation in ("gelu_new", "gelu_fast", "quick_gelu"):
        return 5  # written out in PyTorch: input, tanh and two factors, and the result
    return 2  # a fused activation: its input and its result


def _count_standard(s: dict[str, Any], labels: int) -> tuple[int, int, int]:
    h, i, q, kv = s["hidden"], s["intermediate"], s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    embeddings, head = s["vocab"] * h, h * labels
    layer = 2 * h * q + 2 * h * kv + (3 if s["mlp_tensors"] == 4 else 2) * h * i + 4 * h
    output = 0 if labels or s["tied"] else s["vocab"] * h
    return embeddings + s["layers"] * layer + h + head + output, embeddings, head
