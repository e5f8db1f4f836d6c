"""Trained weights -> a plain Hugging Face folder, which is compared with what was trained before it counts.

Comes in: the full state dict, and logits that the trained model gave for held-out samples. Goes out: a folder that
`from_pretrained` loads without this project, or the reason why it is not the trained model. Called by rank 0's loop.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from orchestrator.architectures.families import CONFIG
from orchestrator.atomic_file import write_json
from orchestrator.errors import ModelError
from orchestrator.locations import resolve
from orchestrator.methods.base import Method
from orchestrator.methods.peft_method import PeftMethod
from orchestrator.methods.registry import method_of
from orchestrator.planning.run_plan import RunPlan
from orchestrator.samples.batches import Samples
from orchestrator.samples.prepare import PreparedData
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of
from orchestrator.worker.models import DTYPES, auto_class, blank_model, build_model, load_base
from orchestrator.worker.objectives import Batch, logits_of
from orchestrator.worker.step_data import tensors

DIFFERENT = "model-differs"
"""Beside the model's folder: one that does not compute what was trained."""
_ROWS, _COLUMNS = 4, 64
"""Most held-out samples and tokens of each that are compared: every weight takes part in each of them (a guess)."""
_MOST_FLOPS = 1e12
"""Of one forward pass on a CPU, some seconds; larger models are compared on fewer tokens (a guess)."""
_LEAST_COLUMNS = 8
_ROUNDINGS = 4.0
"""How far the exported model may be from the trained one, in steps of its number format in every weight at random."""
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configurations call the number of a layer's experts."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a model gives for some held-out samples."""

    batch: Batch
    logits: Tensor
    """On the CPU in fp32 or fp64."""


def first_batch(samples: Samples) -> Batch:
    """What a model is given for the first held-out samples; the same on every rank."""
    indices = np.arange(min(_ROWS, len(samples)))
    batch = tensors(samples.batch(indices, pad_to=samples.padded_length(indices)))
    return {name: batch[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in batch}


def check_batch(samples: Samples, plan: RunPlan, *, whole: bool = False) -> Batch:
    """The first held-out samples, cut to as many tokens as their comparison is worth unless they are wanted whole."""
    batch = first_batch(samples)
    most = _MOST_FLOPS / (2 * plan.parameters * len(batch["input_ids"]))
    columns = None if whole else int(min(_COLUMNS, max(_LEAST_COLUMNS, most)))
    return {name: values[:, :columns] for name, values in batch.items()}


def export(
    state: Mapping[str, Tensor], spec: RunSpec, plan: RunPlan, data: PreparedData, folder: Path, *, trained: Sample
) -> ModelError | None:
    """Writes what loads without this project: by `from_pretrained(folder)`, or an adapter beside the base by peft.

    `state` is the full state dict of the trained module, adapters included. The folder appears complete or not at all.
    Where it does not compute what was `trained`, it gets another name (`DIFFERENT`), and the error says by how much
    they differ.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _write(state, spec, plan, data, temporary)
    gc.collect()  # before the folder's own weights are in memory beside them
    difference = _difference(temporary, spec, plan, data, trained)
    place = folder if difference is None else folder.with_name(DIFFERENT)
    shutil.rmtree(place, ignore_errors=True)
    temporary.rename(place)
    if difference is None:
        return None
    return ModelError(
        "the exported model does not compute what was trained",
        got=f"{difference}; the folder is {place}",
        allowed="logits of held-out samples that differ by rounding alone",
        do="use neither folder nor result; the checkpoint is kept: change model.base, task or method, or report this",
    )


def adapter_folder(spec: RunSpec, folder: Path) -> Path | None:
    """Where the adapter lies: beside a merged model in a folder of its own; None where none is left."""
    method = method_of(spec.method)
    if not method.saves_adapter(spec):
        return None
    return folder / "adapter" if method.saves_merged(spec) else folder


def _write(state: Mapping[str, Tensor], spec: RunSpec, plan: RunPlan, data: PreparedData, folder: Path) -> None:
    method, model = method_of(spec.method), _adapted(spec, plan, data)
    config = model.config
    _load(model, state, method)
    folder.mkdir(parents=True)
    if (place := adapter_folder(spec, folder)) is not None:
        assert isinstance(method, PeftMethod), "others have no adapter to save"
        method.save_adapter(model.to(DTYPES[plan.precision]), place, base=resolve(str(spec.model.base)))
        config.save_pretrained(place / CONFIG)
        _load(model.float(), state, method)  # merged in fp32, as without an adapter
    if method.saves_merged(spec):
        _write_merged(method.merged(model).to(DTYPES[plan.precision]), spec, folder)
        _stop_at(data.turn_ends, folder)
    for file in data.tokenizer_folder.iterdir():
        shutil.copy2(file, folder / file.name)


def _adapted(spec: RunSpec, plan: RunPlan, data: PreparedData) -> torch.nn.Module:
    """A module that trained weights fit into."""
    method = method_of(spec.method)
    if method.cost.is_quantised:  # only the base itself gives the same weights of 4 bits again
        return build_model(spec, replace(plan, activation_checkpointing=False), data)
    model = blank_model(spec, data)
    model.tie_weights()
    return method.adapt(model, spec)


def _load(model: torch.nn.Module, state: Mapping[str, Tensor], method: Method) -> None:
    """Trained weights, and of a base that is not quantised the others too."""
    if method.cost.is_quantised:
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data.copy_(state[name])
    else:
        model.load_state_dict(state, strict=True)


def _write_merged(model: torch.nn.Module, spec: RunSpec, folder: Path) -> None:
    model.save_pretrained(folder)
    if task_of(spec.task).generates and spec.model.base is not None and not method_of(spec.method).is_from_scratch:
        with contextlib.suppress(OSError):  # many bases have none
            # Written past `save_pretrained`, which refuses a changed one whose settings contradict each other, as those
            # of published models do: a temperature without do_sample.
            GenerationConfig.from_pretrained(resolve(spec.model.base)).to_json_file(folder / "generation_config.json")


def _stop_at(ends: tuple[int, ...], folder: Path) -> None:
    """Has `generate` stop at the tokens by which answers were trained to end, besides where it did before.

    A base whose end-of-text token is another, as under ChatML, would else go on and speak for the user too.
    """
    file = folder / "generation_config.json"
    if not ends or not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    before = settings.get("eos_token_id")
    stops = [before] if isinstance(before, int) else list(before or ())
    if more := [end for end in ends if end not in stops]:
        settings["eos_token_id"] = [*stops, *more]
        write_json(file, settings)


def _difference(folder: Path, spec: RunSpec, plan: RunPlan, data: PreparedData, trained: Sample) -> str | None:
    """What a plainly loaded folder has else than the trained model; None where they are the same."""
    dtype, place = DTYPES[plan.precision], adapter_folder(spec, folder)
    if place is not None:
        method = method_of(spec.method)
        assert isinstance(method, PeftMethod), "others leave no adapter"
        base, _ = load_base(spec, data, dtype=torch.float32 if method.cost.is_quantised else dtype, new_head=True)
        found = _apart_from(method.load_adapter(base, place).to(dtype), plan, trained)
        if found is not None:
            return f"beside the base the adapter gives {found}"
    if not method_of(spec.method).saves_merged(spec):
        return None
    model, report = auto_class(spec.task).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = [f"{kind.replace('_', ' ')}: {', '.join(map(str, names))[:200]}" for kind, names in report.items() if names]
    if wrong:
        return f"from_pretrained reports {'; '.join(wrong)}"
    return _apart_from(model, plan, trained)


def _apart_from(model: torch.nn.Module, plan: RunPlan, trained: Sample) -> str | None:
    """How a model's logits differ from the trained one's by more than rounding; None where they do not."""
    dtype = DTYPES[plan.precision]
    found = logits_of(model, trained.batch)
    if found.shape != trained.logits.shape:
        return f"logits of shape {tuple(found.shape)} instead of {tuple(trained.logits.shape)}"
    apart = _apart(found, trained.logits)
    if dtype != torch.float32 and any(getattr(model.config, name, 0) for name in _ROUTED):
        apart = apart.median()  # rounding sends a token now and then to other experts
    _move_by_a_step(model)
    rounding = _apart(found, logits_of(model, trained.batch))
    largest = float(trained.logits.abs().nan_to_num().max())
    allowed = _ROUNDINGS * float(rounding.max()) + largest * torch.finfo(dtype).eps
    if bool((apart <= allowed).all()):
        return None
    return (
        f"logits up to {float(apart.max()):.3g} apart, of at most {largest:.3g}, where rounding explains {allowed:.3g}"
    )


def _move_by_a_step(model: torch.nn.Module) -> None:
    """Every weight up or down to about the next number of its format, which shows what rounding does to this model.

    Quantised ones stay: they are numbers of a table.
    """
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in filter(torch.is_floating_point, model.parameters()):
            up = torch.randint(2, weight.shape, generator=chance, dtype=torch.int8)
            weight += weight * torch.finfo(weight.dtype).eps * (2 * up - 1)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The largest distance of two logits at each position; what is no number on one side alone is none here."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one.double() - other.double()).abs()).amax(-1)
