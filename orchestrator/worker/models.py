"""Base model + method -> a module with the right parameters trainable. `export` makes a plain folder of it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    PretrainedConfig,
)
from transformers.initialization import no_init_weights

from orchestrator.architectures.families import model_config, model_shape
from orchestrator.architectures.weight_names import is_in_head
from orchestrator.errors import ModelError, one_line
from orchestrator.locations import resolve
from orchestrator.methods.last_layers import depths_of
from orchestrator.methods.registry import method_behind, method_of
from orchestrator.planning.base_fit import OUTPUT_OF_HEAD, adapter_kind, base_notes, keeps_head, lacking
from orchestrator.planning.run_plan import RunPlan
from orchestrator.samples.prepare import PreparedData
from orchestrator.spec import RunSpec, Task
from orchestrator.spec_methods import LayerwiseSpec
from orchestrator.tasks.registry import task_of
from orchestrator.worker.lr_schedule import layer_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the precision of a plan."""
_USUAL_DECAY = method_of("full").decays
_LEFTOVERS = ("finetuning_task", "task_specific_params")
"""What configurations remember of a task that their model was trained for before."""


def _say_nothing(note: str) -> None:
    return None


LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What transformers raises for files that it cannot make a model of."""


def build_model(
    spec: RunSpec, plan: RunPlan, data: PreparedData, *, say: Callable[[str], None] = _say_nothing
) -> torch.nn.Module:
    """The module to train, on the CPU in fp32 (DeepSpeed casts and moves it), seeded by `training.seed`.

    `say` is told what a user should know of it.
    Raises ModelError when the base model cannot be loaded for the task, or an adapter's target is not there.
    """
    _quieten()
    torch.manual_seed(spec.training.seed)
    with sharded_construction(plan):
        model = _new_weights(spec, plan, data) if _is_new(spec) else _pretrained(spec, data, say)
    if plan.activation_checkpointing:
        # The reentrant kind needs inputs with gradients, which would send a frozen backbone's backward pass to its end.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method = method_of(spec.method)
    with _gathered(method.reads(model)):
        adapted: torch.nn.Module = method.adapt(model, spec)
    if plan.zero_stage == 3:
        _cast(adapted, DTYPES[plan.precision])
    return adapted


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Adapters in the number format of the base, which ZeRO-3 has built in it: it trains weights of one format only.

    The other stages cast all weights by themselves; masters are in fp32 either way.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _quieten() -> None:
    """No progress bars and load reports; what matters in a report is checked in `_pretrained`."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _is_new(spec: RunSpec) -> bool:
    return spec.model.base is None or method_of(spec.method).is_from_scratch


@contextlib.contextmanager
def sharded_construction(plan: RunPlan) -> Iterator[None]:
    """Under ZeRO-3, transformers meanwhile builds each weight already sharded."""
    if plan.zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(plan.deepspeed)  # transformers looks for such an object
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def auto_class(task: Task) -> Any:
    """The class of transformers that builds and loads models for a task."""
    return getattr(transformers, task_of(task).auto_class)


def _task_settings(spec: RunSpec, data: PreparedData) -> dict[str, Any]:
    """Configuration values that follow from the data: special tokens, and the classes by name."""
    settings: dict[str, Any] = {}
    if data.pad_id is not None:
        settings["pad_token_id"] = data.pad_id
    if not spec.models_language:
        names = data.label_names or ()
        settings["num_labels"] = len(names)
        settings["id2label"] = dict(enumerate(names))
        settings["label2id"] = {name: index for index, name in enumerate(names)}
        settings["problem_type"] = "single_label_classification"
    return settings


def _new_weights(spec: RunSpec, plan: RunPlan, data: PreparedData) -> torch.nn.Module:
    """Weights drawn by the seed, the same under every ZeRO stage.

    Stage 3 draws each module's weights once, in the order of `initialize_weights`; the constructors' own draws, which
    are overwritten anyway, would put the other stages out of step with it.
    """
    if plan.zero_stage == 3:
        with _drawn_without_padding():
            sharded: torch.nn.Module = auto_class(spec.task).from_config(configuration(spec, data), dtype=torch.float32)
        return sharded
    model = blank_model(spec, data)
    let_every_token_train(model)
    model.initialize_weights()
    model.tie_weights()
    return model


def blank_model(spec: RunSpec, data: PreparedData) -> torch.nn.Module:
    """The architecture with whatever the memory held for weights, none of them tied yet."""
    with no_init_weights():
        model: torch.nn.Module = auto_class(spec.task).from_config(configuration(spec, data), dtype=torch.float32)
    return model


def let_every_token_train(model: torch.nn.Module) -> None:
    """Takes the padding row out of the token table; the configuration goes on naming the padding token.

    Many architectures make the row of `pad_token_id` zero at the start and give it no gradient. Where padding falls
    back to the end of text, as in most language models, that token could never be learnt as an input. Language models
    here have no padding, and a classifier's is masked, so a padding token of its own has no gradient anyway. The
    position tables of RoBERTa and its kind keep their padding row, by which they count.
    """
    table = model.get_input_embeddings()
    if getattr(table, "padding_idx", None) is not None:
        table.padding_idx = None


@contextlib.contextmanager
def _drawn_without_padding() -> Iterator[None]:
    """Under ZeRO-3 transformers draws weights as soon as it has built the modules; meanwhile without padding rows."""
    from transformers.integrations import deepspeed as sharding

    draw = sharding.initialize_weights_zero3

    def draw_all(model: torch.nn.Module) -> None:
        let_every_token_train(model)
        draw(model)

    sharding.initialize_weights_zero3 = draw_all
    try:
        yield
    finally:
        sharding.initialize_weights_zero3 = draw


def configuration(spec: RunSpec, data: PreparedData) -> PretrainedConfig:
    """The configuration of the model that is trained, without what a base's says of another task or way of use."""
    settings = _task_settings(spec, data)
    if not _is_new(spec):
        return _base_configuration(spec, settings)
    own = spec.model.base is None
    values = model_config(
        spec.model,
        vocab_size=data.counts.vocab_size if own else None,
        sequence_length=spec.data.sequence_length,
    )
    first = data.eos_id if data.cls_id is None else data.cls_id
    special = {"bos_token_id": first, "eos_token_id": data.eos_id} if own else {}
    values = {**values, **settings, **special}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _base_configuration(spec: RunSpec, settings: dict[str, Any]) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(resolve(str(spec.model.base)), **settings)
    for name in _LEFTOVERS:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    # Of a model that was saved to look inside it; `return_dict: false` would give tuples instead of named logits.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    if spec.models_language:
        config.problem_type, config.num_labels = None, 2
        config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # transformers' default, which it leaves out of the file
        config.label2id = {"LABEL_0": 0, "LABEL_1": 1}
    if task_of(spec.task).generates:
        config.use_cache = True  # off in what a training with activation checkpointing saved: slow, and no property
    if task_of(spec.task).hides_tokens:
        config.is_decoder, config.add_cross_attention = False, False  # it sees both sides
    return config


def load_base(spec: RunSpec, data: PreparedData, *, dtype: torch.dtype, new_head: bool) -> tuple[Any, dict[str, Any]]:
    """The base with the head of the task, and transformers' report; a new head takes nothing of the base's.

    Raises ModelError when it cannot be loaded.
    """
    try:
        model, report = auto_class(spec.task).from_pretrained(
            resolve(str(spec.model.base)),
            config=configuration(spec, data),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=new_head,
            # ZeRO-3 knows only renaming: there another size ends rank 0 alone, and the others wait for ever.
            key_mapping={OUTPUT_OF_HEAD.pattern: r"of_other_classes.\1"} if new_head else None,
        )
    except LOADING_ERRORS as error:
        raise _not_loaded(spec, f"a model for task: {spec.task}", error) from error
    return model, report


def _pretrained(spec: RunSpec, data: PreparedData, say: Callable[[str], None]) -> torch.nn.Module:
    own, names = model_config(spec.model), data.label_names or ()
    new_head = not spec.models_language and not keeps_head(own, names)
    model, report = load_base(spec, data, dtype=torch.float32, new_head=new_head)
    in_head = _in_masked_lm_head if task_of(spec.task).hides_tokens else _in_classification_head
    _refuse_other_sizes(spec, [name for name, *_ in report["mismatched_keys"]])
    absent = [name for name in report["missing_keys"] if not in_head(name, model)]
    if absent:
        raise lacking(str(spec.model.base), absent)
    if new_head:
        _draw_output_anew(model)
    for name, parameter in model.named_parameters():
        parameter._is_new = name in report["missing_keys"] or (new_head and OUTPUT_OF_HEAD.fullmatch(name) is not None)
    shape = model_shape(own, task=task_of(spec.task), num_labels=len(names) or None)
    for note in base_notes(spec, own, shape, label_names=data.label_names):
        say(note)
    let_every_token_train(model)
    loaded: torch.nn.Module = model
    return loaded


def load_as_is(spec: RunSpec, plan: RunPlan, data: PreparedData) -> torch.nn.Module:
    """The base with its own head of the task, in the plan's precision, to be measured and not trained.

    Raises ModelError when it cannot be loaded so, or a weight of it is not in its files.
    """
    _quieten()
    dtype, absent = DTYPES[plan.precision], set[str]()
    if spec.model.adapter is None:
        model, report = load_base(spec, data, dtype=dtype, new_head=False)
    else:
        base, report = load_base(spec, data, dtype=dtype, new_head=not spec.models_language)
        model, absent = _with_adapter(base, spec.model.adapter)
        model = model.to(dtype)
    _refuse_other_sizes(spec, [name for name, *_ in report["mismatched_keys"]])
    if missing := sorted(set(report["missing_keys"]) - absent):
        raise lacking(str(spec.model.base), missing)
    loaded: torch.nn.Module = model
    return loaded


def _with_adapter(base: Any, adapter: str) -> tuple[Any, set[str]]:
    """(a base with its adapter, the weights that this brings whole). Raises ModelError when it cannot be read."""
    method, folder = method_behind(adapter_kind(adapter)), Path(resolve(adapter))
    assert method is not None, "checked with the plan"
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            names = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118  no mapping
        return method.load_adapter(base, folder), names
    except LOADING_ERRORS as error:
        raise ModelError("the adapter cannot be loaded", got=f"{adapter} ({one_line(error)})") from error


def load_language_model(spec: RunSpec, plan: RunPlan) -> torch.nn.Module:
    """The base as a causal language model, in the plan's precision, to be asked and not trained.

    Raises ModelError when it cannot be loaded so.
    """
    _quieten()
    torch.manual_seed(spec.training.seed)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            resolve(str(spec.model.base)), dtype=DTYPES[plan.precision], output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise _not_loaded(spec, "a causal language model", error) from error
    if report["missing_keys"]:
        raise lacking(str(spec.model.base), sorted(report["missing_keys"]))
    loaded: torch.nn.Module = model
    return loaded


def _not_loaded(spec: RunSpec, what: str, error: Exception) -> ModelError:
    return ModelError(
        f"the base model cannot be loaded as {what}",
        got=f"{spec.model.base} ({one_line(error)})",
        do="give a folder with config.json and model.safetensors whose architecture supports that",
    )


def _refuse_other_sizes(spec: RunSpec, names: list[str]) -> None:
    """Only a head for other classes may have another size than its own in the file."""
    other = sorted(name for name in names if not OUTPUT_OF_HEAD.fullmatch(name))
    if other:
        raise ModelError(
            "the base model's config.json and weights do not go together",
            got=f"{spec.model.base}: other sizes of {', '.join(other[:3])}",
            do="copy both files from the same model",
        )


def _draw_output_anew(model: torch.nn.Module) -> None:
    """A last layer of the head by the architecture's own rule, whatever was loaded; the seed decides."""
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters() if OUTPUT_OF_HEAD.fullmatch(name)}
    for name in sorted(names):
        module = model.get_submodule(name)
        with _gathered(list(module.parameters())):
            for parameter in module.parameters():
                parameter._is_hf_initialized = False  # what transformers' rules look at
            model._init_weights(module)


@contextlib.contextmanager
def _gathered(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Weights whole meanwhile; those that ZeRO-3 has sharded are rank 0's afterwards."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def _in_classification_head(name: str, model: torch.nn.Module) -> bool:
    """Whether a parameter belongs to the classification head, by its full name."""
    return is_in_head(name, str(model.config.model_type))


def _in_masked_lm_head(name: str, model: torch.nn.Module) -> bool:
    """Whether a parameter lies behind the architecture's backbone, by its full name."""
    return not name.startswith(f"{model.base_model_prefix}.")


def parameter_groups(
    model: torch.nn.Module,
    weight_decay: float,
    *,
    decays: Callable[[str, int], bool] = _USUAL_DECAY,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: those that decay, by name and number of dimensions, and those that do not.

    `only` are the names of those to take; None takes all.
    ZeRO-3 shards hide shapes, so the original ones (`ds_shape`) are read where they are.
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (only is None or name in only):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[0 if decays(name, len(shape)) else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


@dataclass(frozen=True, kw_only=True)
class ParameterGroups:
    """What an optimizer trains, in groups whose learning rates may differ."""

    groups: list[dict[str, Any]]
    below_head: list[int]
    """Of each group: 0 behind the layers, 1 in the top layer, `layers` + 1 before them."""
    layers: int
    is_pretrained: list[bool]
    """Of each group, whether its weights are the base's; only told apart where `retain.l2sp` pulls them."""

    @classmethod
    def of(cls, model: torch.nn.Module, spec: RunSpec) -> ParameterGroups:
        """Of a module that is ready to be trained; parts of the model are kept apart where their rates or decays
        differ."""
        decays, layers = method_of(spec.method).decays, 0
        parts: list[set[str]] = [{name for name, _ in model.named_parameters()}]
        if spec.layerwise.is_on:
            depths = depths_of(model)
            layers = max((depth for depth in depths.values() if depth is not None), default=-1) + 1
            below = {name: 0 if depth is None else layers - depth for name, depth in depths.items()}
            parts = [{name for name in below if below[name] == part} for part in range(layers + 2)]
        pulls = spec.retain is not None and spec.retain.l2sp > 0
        pretrained = {name for name, weight in model.named_parameters() if pulls and not weight._is_new}
        groups, below_head, is_pretrained = [], [], []
        for part, names in enumerate(parts):
            for decay, only in ((spec.training.weight_decay, names - pretrained), (0.0, names & pretrained)):
                found = parameter_groups(model, decay, decays=decays, only=only)
                groups += found
                below_head += [part] * len(found)
                is_pretrained += [only <= pretrained] * len(found)
        return cls(groups=groups, below_head=below_head, layers=layers, is_pretrained=is_pretrained)

    def scales(self, layerwise: LayerwiseSpec, *, step: int, steps: int) -> list[float]:
        """What the learning rate of optimizer step `step` (from 0) of `steps` is multiplied by in each group."""
        return [
            layer_scale(layerwise, below_head=part, layers=self.layers, step=step, steps=steps)
            for part in self.below_head
        ]

    def anchors(self, spec: RunSpec) -> tuple[float, list[bool]] | None:
        """(strength of the pull towards the base, which groups it pulls); None without `retain.l2sp`."""
        return None if spec.retain is None or not spec.retain.l2sp else (spec.retain.l2sp, self.is_pretrained)
