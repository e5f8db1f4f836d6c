"""Base model + method -> a module with the right parameters trainable, and back to a plain Hugging Face folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from orchestrator.errors import ModelError
from orchestrator.locations import resolve
from orchestrator.planning.model_shape import DEFAULT_LORA_TARGETS, model_config
from orchestrator.planning.run_plan import RunPlan
from orchestrator.spec import RunSpec
from orchestrator.training.prepare import PreparedData

_HEAD_MODULES = ("classifier", "score", "pre_classifier", "pooler")
"""What transformers' sequence classifiers put behind the backbone; BERT's pooler is the dense layer of its head."""


def build_model(spec: RunSpec, plan: RunPlan, data: PreparedData) -> torch.nn.Module:
    """The module to train, on the CPU in fp32 (DeepSpeed casts and moves it), seeded by `training.seed`.

    Raises ModelError when the base model cannot be loaded for the task, or an adapter's target is not there.
    """
    torch.manual_seed(spec.training.seed)
    with _sharded_construction(plan):
        model = _new_weights(spec, data) if _is_new(spec) else _pretrained(spec, data)
    if plan.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if spec.method == "head":
        freeze_backbone(model)
    if spec.method == "lora":
        model = add_lora(model, spec)
    return model


def _is_new(spec: RunSpec) -> bool:
    return spec.model.base is None or spec.method == "scratch"


@contextlib.contextmanager
def _sharded_construction(plan: RunPlan) -> Iterator[None]:
    """Under ZeRO-3, transformers builds each weight already sharded while this configuration object is alive."""
    if plan.zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(plan.deepspeed)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _auto_class(spec: RunSpec) -> Any:
    return AutoModelForSequenceClassification if spec.task == "text-classification" else AutoModelForCausalLM


def _task_settings(spec: RunSpec, data: PreparedData) -> dict[str, Any]:
    """Configuration values that follow from the data: special tokens, and the classes by name."""
    settings: dict[str, Any] = {}
    if data.pad_id is not None:
        settings["pad_token_id"] = data.pad_id
    if spec.task == "text-classification":
        names = data.label_names or ()
        settings["num_labels"] = len(names)
        settings["id2label"] = dict(enumerate(names))
        settings["label2id"] = {name: index for index, name in enumerate(names)}
    return settings


def _new_weights(spec: RunSpec, data: PreparedData) -> torch.nn.Module:
    values = model_config(
        spec.model,
        vocab_size=data.counts.vocab_size if spec.model.base is None else None,
        sequence_length=spec.data.sequence_length,
    )
    values = {**values, **_task_settings(spec, data)}
    if spec.model.base is None:
        values |= {"bos_token_id": data.eos_id, "eos_token_id": data.eos_id}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model: torch.nn.Module = _auto_class(spec).from_config(config)
    return model.float()


def _pretrained(spec: RunSpec, data: PreparedData) -> torch.nn.Module:
    base = resolve(str(spec.model.base))
    try:
        model: torch.nn.Module = _auto_class(spec).from_pretrained(
            base, dtype=torch.float32, **_task_settings(spec, data)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the base model cannot be loaded for task: {spec.task}",
            got=f"{spec.model.base} ({' '.join(str(error).split())[:300]})",
            do="give a folder with config.json and model.safetensors whose architecture supports the task",
        ) from error
    return model


def freeze_backbone(model: torch.nn.Module) -> None:
    """Leaves only the task's head trainable: the modules behind the backbone."""
    trainable = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in _HEAD_MODULES for part in name.split("."))
        trainable += parameter.requires_grad
    if not trainable:
        raise ModelError(
            "method: head found no head to train in this architecture",
            got=type(model).__name__,
            allowed=f"a module named {', '.join(_HEAD_MODULES)}",
            do="use method: lora or full",
        )


def add_lora(model: torch.nn.Module, spec: RunSpec) -> torch.nn.Module:
    """The model with low-rank adapters on the given or the architecture's usual projections."""
    from peft import LoraConfig, TaskType, get_peft_model

    model_type = str(model.config.model_type)
    targets = spec.lora.targets or DEFAULT_LORA_TARGETS.get(model_type)
    if targets is None:
        raise ModelError(
            f"no usual adapter targets are known for the architecture {model_type!r}",
            allowed=", ".join(sorted(DEFAULT_LORA_TARGETS)),
            do="name the modules in lora.targets",
        )
    task_type = TaskType.SEQ_CLS if spec.task == "text-classification" else TaskType.CAUSAL_LM
    config = LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        target_modules=list(targets),
        task_type=task_type,
        fan_in_fan_out=model_type == "gpt2",  # GPT-2's Conv1D keeps its weights transposed
    )
    try:
        adapted: torch.nn.Module = get_peft_model(model, config)
    except ValueError as error:
        leaves = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")}
        )
        raise ModelError(
            "lora.targets names no module of this model", got=", ".join(targets), allowed=", ".join(leaves)
        ) from error
    return adapted


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, biases and normalisation weights do not.

    ZeRO-3 shards hide shapes, so the original ones (`ds_shape`) are read where they are.
    """
    decay: list[Any] = []
    plain: list[Any] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decay if len(shape) >= 2 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def export(state: dict[str, torch.Tensor], spec: RunSpec, plan: RunPlan, data: PreparedData, folder: Path) -> None:
    """Writes weights, configuration and tokenizer so that `from_pretrained(folder)` needs nothing of this project.

    `state` is the full state dict of the trained module on one rank; adapters are merged into the base weights. The
    folder appears complete or not at all.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    unsharded = contextlib.nullcontext() if plan.zero_stage < 3 else _without_sharding()
    with unsharded:
        model = _new_weights(spec, data) if _is_new(spec) else _pretrained(spec, data)
        if spec.method == "lora":
            model = add_lora(model, spec)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=spec.method != "lora")
    if spec.method == "lora":
        model = model.merge_and_unload()
    if plan.precision == "bf16":
        model = model.to(torch.bfloat16)
    elif plan.precision == "fp16":
        model = model.to(torch.float16)
    model.save_pretrained(temporary)
    for file in data.tokenizer_folder.iterdir():
        shutil.copy2(file, temporary / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@contextlib.contextmanager
def _without_sharding() -> Iterator[None]:
    """Modules built here are whole, though the process trains under ZeRO-3."""
    from deepspeed.runtime.zero.partition_parameters import shutdown_init_context

    shutdown_init_context()
    yield
