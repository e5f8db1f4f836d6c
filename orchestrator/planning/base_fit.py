"""Whether a base model can be trained as a spec says, what becomes of its head, and what a user should know of that.

Called with a plan and by the worker that loads the model, so that both say the same. Reads headers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.architectures.families import ModelShape, configuration_beside
from orchestrator.architectures.masked_lm_heads import MASKED_LM_TRANSFORMS, lacks_masked_lm_head
from orchestrator.architectures.stored_weights import StoredWeights, read_weights
from orchestrator.architectures.weight_names import HEAD_MODULES, Shape, is_in_head
from orchestrator.errors import DataError, ModelError
from orchestrator.locations import resolve
from orchestrator.method_names import EVALUATE
from orchestrator.methods.registry import method_behind, method_of

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec
    from orchestrator.tasks.base import LearntTask

OUTPUT_OF_HEAD = re.compile(r"^((?:score|classifier|classifier\.out_proj)\.(?:weight|bias))$")
"""Names of the weights of a classification head's last layer, which has a row for each class."""
_TOKEN_TABLE = re.compile(r"(^|\.)(word_embeddings|wte|embed_tokens|embed_in|tok_embeddings)\.weight$")
_UNNAMED = re.compile(r"LABEL_(\d+)")
_SHOWN = 5


def base_notes(
    spec: RunSpec, config: Mapping[str, Any], shape: ModelShape, *, label_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """What becomes of a base's head, in sentences; none without a base or with `method: scratch`.

    `config` is the base's, `shape` that of the model that is trained, `label_names` are the classes of the data once
    they are known.
    Raises ModelError where its files cannot be used, or do not hold what its config.json says.
    """
    base = spec.model.base
    if base is None or method_of(spec.method).is_from_scratch:
        return ()
    _refuse_quantised(base, config)
    stored = read_weights(base)
    if stored is None:
        return (f"base: {base} is not on this machine yet, so its files were not looked at",)
    _check_against_config(base, stored, config)
    task = method_of(spec.method).model_task(spec)
    if spec.kind == EVALUATE:
        _check_can_be_measured(spec, stored, config, task)
    _check_names(spec, stored, shape, task)
    if spec.kind == EVALUATE:
        return ()
    if not task.models_language:
        _check_head_is_kept(spec, stored, config, label_names)
        return tuple(_about_classifier(base, stored, config, label_names))
    if task.hides_tokens and lacks_masked_lm_head(stored.shapes):
        if spec.of_general_data is not None:
            raise _knows_nothing(base, "no masked-LM head", "a base with its masked-LM head")
        refuse_frozen_head(spec, str(config.get("model_type")))
        note = f"head: {base} comes without a masked-LM head; a new one is trained, so the loss begins near guessing"
        return (note,)
    return ()


def _check_can_be_measured(spec: RunSpec, stored: StoredWeights, config: Mapping[str, Any], task: LearntTask) -> None:
    """Raises ModelError where a model lacks the head of the task, so that it would answer at random."""
    if spec.model.adapter is not None:
        _check_adapter(spec.model.adapter, task)
        return
    base, saved_as = str(spec.model.base), str((config.get("architectures") or [""])[0])
    rows = next((shape[0] for name, shape in stored.shapes.items() if OUTPUT_OF_HEAD.fullmatch(name) and shape), None)
    got = None
    if task.is_classification:
        missing = [name for name in HEAD_MODULES.get(str(config.get("model_type")), ()) if not _has(stored, name)]
        if rows is None or not _is_classifier(config):
            got = "no head for classes of texts"
        elif missing:
            got = f"no {' and no '.join(missing)} in its head"
        elif rows != len(classes_of(config)):
            got = f"a head for {rows} classes, of which its config.json names {len(classes_of(config))}"
    elif saved_as_classifier(config):
        got = "a head for classes of texts"
    elif task.hides_tokens and lacks_masked_lm_head(stored.shapes):
        got = "no masked-LM head"
    if got is not None:
        raise ModelError(
            f"the model was not trained for task: {task.name}, and would answer at random",
            got=f"{base} with {got}" + (f", saved as {saved_as}" if saved_as else ""),
            do="give a model that was, or the task of this one; `orchestrator run` trains one",
        )


def _check_adapter(adapter: str, task: LearntTask) -> None:
    """Raises ModelError for an adapter that cannot be put beside its base again."""
    path = Path(resolve(adapter))
    kind = adapter_kind(adapter)
    got = None
    if method_behind(kind) is None:
        got = f"peft_type {kind}"
    elif (path / "quantization_config.json").is_file():
        got = "one beside a base of 4-bit weights (quantization_config.json)"
    elif task.is_classification and configuration_beside(adapter) is None:
        got = "no config/config.json, which names its classes"
    if got is not None:
        raise ModelError(
            "this adapter cannot be measured beside its base",
            got=f"{adapter} with {got}",
            allowed="adapters that `run` leaves with method: lora, ia3, prefix or prompt_tuning",
            do="merge it with peft, or run the training again with export=merged, and give the merged model",
        )


def adapter_kind(adapter: str) -> str:
    """What peft calls it. Raises ModelError where the folder holds no adapter."""
    return str(adapter_settings(adapter).get("peft_type"))


def adapter_settings(adapter: str) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises ModelError where the folder holds no adapter."""
    file = Path(resolve(adapter)) / "adapter_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("model.adapter is no folder of peft's", got=f"{file} ({error})") from error
    if not isinstance(found, dict):
        raise ModelError("model.adapter is no folder of peft's", got=f"{file} holds no mapping")
    return found


def model_in(folder: str) -> dict[str, str]:
    """The block `model` of a spec: a model, or an adapter with the base that it names. Raises ModelError for an adapter
    that names none."""
    path = Path(resolve(folder))
    if not (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return {"base": folder}
    base = adapter_settings(folder).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            "the adapter does not say what it stands beside",
            got=f"no base_model_name_or_path in the adapter_config.json of {folder}",
            do="write the base's folder there",
        )
    return {"base": str(base), "adapter": folder}


def _has(stored: StoredWeights, module: str) -> bool:
    return any(module in name.split(".") for name in stored.shapes)


def _check_head_is_kept(
    spec: RunSpec, stored: StoredWeights, config: Mapping[str, Any], label_names: Sequence[str] | None
) -> None:
    """Raises ModelError where `retain.data` would be evaluated by a head that is drawn anew."""
    if spec.of_general_data is None:
        return
    allowed = "a classifier of the same classes, such as the model of an earlier run"
    if not (_is_classifier(config) and any(OUTPUT_OF_HEAD.fullmatch(name) for name in stored.shapes)):
        raise _knows_nothing(str(spec.model.base), "no head for classes of texts", allowed)
    if label_names is not None and not keeps_head(config, label_names):
        classes = f"a head for {_few(_labels(config))}, not for the data's {_few(label_names)}"
        raise _knows_nothing(str(spec.model.base), classes, allowed)


def _knows_nothing(base: str, head: str, allowed: str) -> ModelError:
    return ModelError(
        "retain.data measures what the base's head knows, and a new head knows nothing",
        got=f"{base} with {head}",
        allowed=allowed,
        do="give such a base in model.base, or remove retain.data (retain.l2sp works without it)",
    )


def check_same_classes(names: Sequence[str] | None, general: Sequence[str] | None) -> None:
    """Raises DataError where the general data is labelled with other classes than the training data."""
    if list(names or ()) != list(general or ()):
        raise DataError(
            "the general data has other classes than the training data",
            got=f"{_few(general or ())} in retain.data, {_few(names or ())} in data.train",
            do="give rows with all of the same classes in retain.data, or remove it",
        )


def keeps_head(config: Mapping[str, Any], label_names: Sequence[str]) -> bool:
    """Whether the head of a base, if it has one, is for just these classes, in this order."""
    return _is_classifier(config) and _labels(config) == list(label_names)


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """A base's classes by number, as its config.json names them."""
    # transformers writes neither for two classes without names.
    names = config.get("id2label") or {str(n): f"LABEL_{n}" for n in range(config.get("num_labels") or 2)}
    return [str(names[key]) for key in sorted(names, key=lambda key: int(key))]


def _labels(config: Mapping[str, Any]) -> list[str]:
    """A base's classes by number; those that transformers numbered itself are their numbers."""
    return [own_name(name) for name in classes_of(config)]


def own_name(label: str) -> str:
    """A class's name; transformers calls one without a name LABEL_ and its number, which is its name then."""
    match = _UNNAMED.fullmatch(label)
    return label if match is None else match[1]


def saved_as_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a model says of itself that it has a head for classes of texts."""
    return bool(config.get("architectures")) and _is_classifier(config)


def _is_classifier(config: Mapping[str, Any]) -> bool:
    saved_as = config.get("architectures") or ["ForSequenceClassification"]
    return str(saved_as[0]).endswith("ForSequenceClassification")


def _about_classifier(
    base: str, stored: StoredWeights, config: Mapping[str, Any], label_names: Sequence[str] | None
) -> Iterator[str]:
    kind = str(config.get("model_type"))
    modules = HEAD_MODULES.get(kind, ())
    if "pooler" in modules and not any("pooler" in name.split(".") for name in stored.shapes):
        yield f"head: {base} comes without a pooler; a new one is drawn and trained with the head"
    rows = [shape[0] for name, shape in stored.shapes.items() if OUTPUT_OF_HEAD.fullmatch(name) and shape]
    if not rows:
        return
    classes = f"{rows[0]} classes ({_few(_labels(config))})"
    if not _is_classifier(config):
        yield f"head: {base} was saved as {config['architectures'][0]}; a new head for classes of texts is drawn"
    elif label_names is None:
        yield f"head: {base} brings one for {classes}; it is kept if the data has the same, else a new one is drawn"
    elif keeps_head(config, label_names) and rows[0] == len(label_names):
        yield f"head: {base} brings one for the same {classes}, which is trained on"
    else:
        yield (
            f"head: {base} was saved with one for {classes}, and the data has {len(label_names)} "
            f"({_few(label_names)}); a new head is drawn"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")


def _refuse_quantised(base: str, config: Mapping[str, Any]) -> None:
    how = config.get("quantization_config")
    if how:
        raise ModelError(
            "the base model's weights are rounded for inference, and cannot be trained as they are",
            got=f"quantization_config in the config.json of {base}: {how.get('quant_method', how)}",
            do="give the model that it was made from",
        )


def refuse_frozen_head(spec: RunSpec, kind: str) -> None:
    """Raises ModelError where a base of this architecture comes without a masked-LM head, and the method would not
    train a new one."""
    if not method_of(spec.method).trains_new_masked_lm_head(kind):
        raise ModelError(
            f"the base model has no masked-LM head, and method: {spec.method} would leave a new one as it was drawn",
            got=f"{spec.model.base or spec.name} ({kind})",
            allowed=f"method: {spec.method} with {', '.join(MASKED_LM_TRANSFORMS)}, or a base with its masked-LM head",
            do="use method: full",
        )


def _check_against_config(base: str, stored: StoredWeights, config: Mapping[str, Any]) -> None:
    """Raises ModelError where the token table or whole layers are not what config.json says."""
    vocab = config.get("vocab_size")
    tables = {name: shape[0] for name, shape in stored.shapes.items() if _TOKEN_TABLE.search(name) and shape}
    if isinstance(vocab, int) and tables and vocab not in tables.values():
        name, rows = next(iter(tables.items()))
        raise ModelError(
            "the base model's config.json and weights do not go together",
            got=f"vocab_size {vocab} and {name} of {rows} rows in {base}",
            do="copy both files from the same model",
        )
    if not stored.shapes:
        raise ModelError("the base model's weights are empty", got=base, do="copy or download the files again")


def _check_names(spec: RunSpec, stored: StoredWeights, shape: ModelShape, task: LearntTask) -> None:
    """Raises ModelError where the files lack a weight of a known architecture, or have it in another shape.

    A weight may be stored with or without the name of the body it is in; what lies in the task's head may be absent.
    """
    if any("language_model" in name.split(".")[:2] for name in stored.shapes):
        return  # a text part within a larger model, whose names transformers changes
    body = next(iter(shape.weights), "").partition(".")[0]
    held = {_bare(name, body): size for name, size in stored.shapes.items()}
    absent, other = [], []
    for name, size in shape.weights.items():
        found = held.get(_bare(name, body))
        if _in_head(name, task, shape, body):
            continue
        if found is None and not (shape.tied and _TOKEN_TABLE.search(name) and size in _outputs(held)):
            absent.append(name)
        elif found is not None and found != size:
            other.append(f"{name} {list(found)}, not {list(size)}")
    if absent:
        raise lacking(str(spec.model.base), absent)
    if other:
        raise ModelError(
            "the base model's config.json and weights do not go together",
            got=f"{spec.model.base}: {'; '.join(other[:2])}",
            do="copy both files from the same model",
        )


def lacking(base: str, absent: Sequence[str]) -> ModelError:
    """The error for a base without weights of its own architecture."""
    names = sorted(absent)
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return ModelError(
        "the base model lacks weights of its own architecture, which would be drawn at random",
        got=f"{base} without {', '.join(names[:3])}{more}",
        do="give a complete base model, or use method: scratch for new weights",
    )


def _bare(name: str, body: str) -> str:
    """A weight's name without that of the body, in today's words."""
    plain = name.removeprefix(f"{body}.").replace("LayerNorm.gamma", "LayerNorm.weight")
    plain = plain.replace("LayerNorm.beta", "LayerNorm.bias")
    return "lm_head.weight" if plain == "embed_out.weight" else plain  # as GPT-NeoX's was called


def _outputs(held: Mapping[str, Shape]) -> set[Shape]:
    return {size for name, size in held.items() if name.endswith(("lm_head.weight", "decoder.weight"))}


def _in_head(name: str, task: LearntTask, shape: ModelShape, body: str) -> bool:
    if not task.models_language:
        return is_in_head(name, shape.model_type)
    return task.hides_tokens and not name.startswith(f"{body}.")


def check_tokenizer(
    spec: RunSpec, config: Mapping[str, Any], *, vocab_size: int, special: Mapping[str, int | None]
) -> None:
    """Raises ModelError when the tokenizer gives ids for which a base's embedding has no row.

    `special` are the ids that are put between and around texts, by name.
    """
    rows = config.get("vocab_size")
    if spec.model.base is None or not isinstance(rows, int) or vocab_size <= rows:
        return
    beyond = {name: i for name, i in special.items() if i is not None and i >= rows}
    got = f"{vocab_size} entries for an embedding of {rows} rows"
    if beyond:
        got += "; beyond it: " + ", ".join(f"{name} {i}" for name, i in beyond.items())
    if spec.model.tokenizer != "auto":
        do = "set model.tokenizer=auto to use the base model's own"
    else:
        saved_as = (config.get("architectures") or ["AutoModel"])[0]
        at = repr(spec.model.base)
        do = (
            f'enlarge the embedding: python -c "import transformers as t; m = t.{saved_as}.from_pretrained({at}); '
            f"m.resize_token_embeddings({vocab_size}); m.save_pretrained('larger'); "
            f"t.AutoTokenizer.from_pretrained({at}).save_pretrained('larger')\" and model.base=larger"
        )
        if set(beyond) == {"pad"} and vocab_size == beyond["pad"] + 1:
            do += "; or name a token that the model knows as pad_token in its tokenizer_config.json"
    raise ModelError("the tokenizer has more entries than the base model's embedding", got=got, do=do)
