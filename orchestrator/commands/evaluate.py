"""`evaluate` as a person meets it: a model and data to the spec that `run` takes, then as `run` shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from orchestrator import locations
from orchestrator.architectures.families import ENCODERS, model_config, model_shape
from orchestrator.commands.run import answering_failures, run_spec
from orchestrator.errors import ModelError, SpecError
from orchestrator.load_spec import apply_override, inline_deepspeed_file, parse_spec
from orchestrator.method_names import EVALUATE
from orchestrator.planning.base_fit import model_in, saved_as_classifier
from orchestrator.spec import ModelSpec
from orchestrator.spec_data import DataSpec
from orchestrator.tasks.names import LABELLED_TEXT, TrainedTask, raw_text_task
from orchestrator.tasks.registry import LEARNT, task_of
from orchestrator.tracking.finished_model import found_base, spec_behind

HELD_OUT = "held-out"
"""The split that a training on the data would hold out."""
SPLITS = ("train", "validation", "test", HELD_OUT)
_SAMPLES = 64
"""Batches of each worker that the plan counts as one."""
_OF_THE_DATA = ("text_column", "label_column", "delimiter", "format", "exclude", "incomplete_rows", "too_long")
"""Fields of `data` that say how it is read: a run's are taken for the data that it was trained on."""
_OF_THE_SPLIT = ("validation_fraction", "split_seed", "max_train_examples", "max_validation_examples", "validation")
"""Those that say what is held out of it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was typed, beside key=value."""

    model: str
    data: str
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    split: str | None = None
    workers: int | None = None
    batch: int | None = None


def evaluate_command(options: Options, overrides: Sequence[str], *, fresh: bool, as_json: bool) -> None:
    """Measures, and shows the result; a failure ends the process with its exit code."""
    with answering_failures(as_json=as_json) as known:
        folder = model_folder(found_base(options.model))
        model, trained = model_in(folder), spec_behind(Path(locations.resolve(folder)))
        raw = evaluation(options, model=model, config=model_config(ModelSpec(**model)), trained=trained)
        for override in overrides:
            apply_override(raw, override)
        inline_deepspeed_file(raw, Path())
        run_spec(parse_spec(raw, source="evaluate"), fresh=fresh, as_json=as_json, known=known)


def model_folder(location: str) -> str:
    """A model's location; of a run folder the model in it. Raises ModelError for what surely is none."""
    path = Path(locations.resolve(location))
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "model" / "config.json").is_file():
            return str(path / "model")
        if (path / "adapter_config.json").is_file():
            return location
        if (path / "model" / "adapter_config.json").is_file():
            return str(path / "model")
        raise ModelError(
            "there is no model in this folder",
            got=f"{location} without config.json",
            allowed="a folder that transformers loads, a run's folder, runs:/ID, runs:/EXPERIMENT/NAME, or a hub name",
            do="`orchestrator compare --json` lists runs; the folder of a finished one holds model/",
        )
    if path.is_file() or (not path.exists() and (location.startswith(("/", ".", "~")) or "://" in location)):
        raise ModelError(
            "this is no model's folder", got=location, do="give the folder that holds config.json and model.safetensors"
        )
    return location


def evaluation(
    options: Options, *, model: Mapping[str, str], config: Mapping[str, Any], trained: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The spec, as a plain mapping. `config` is the model's; `trained` is the spec of the run that left it, if one did:
    what it says of lengths, columns and the held-out share is taken over. Pure.

    Raises SpecError for a task or a split that there is none of.
    """
    if options.split is not None and options.split not in SPLITS:
        raise SpecError("there is no such split", got=f"--split {options.split}", allowed=", ".join(SPLITS))
    before: Mapping[str, Any] = trained or {}
    task = _task(options.task, config, before)
    name = str(before.get("name") or Path(model.get("adapter", model["base"])).name)
    raw: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-on-{_stem(options.data)}").lstrip("._-")[:100],
        "kind": EVALUATE,
        "model": dict(model),
        "task": task,
        "data": _data(options, task, config, before),
        "training": {},
        "resources": {},
        "tracking": {k: v for k, v in (before.get("tracking") or {}).items() if v is not None},
    }
    if task_of(task).hides_tokens and "masking_rate" in (before.get("training") or {}):
        raw["training"]["masking_rate"] = before["training"]["masking_rate"]
    if options.workers is not None:
        raw["resources"]["workers"] = options.workers
    if options.batch is not None:
        raw["training"]["micro_batch"] = options.batch
        raw["training"]["global_batch"] = options.batch * _SAMPLES * max(1, options.workers or 1)
    return raw


def _task(asked: str | None, config: Mapping[str, Any], before: Mapping[str, Any]) -> TrainedTask:
    """As asked, as the run was that left the model, or as the model was saved."""
    named = asked or before.get("task")
    if named is None:
        is_encoder = config.get("model_type") in ENCODERS
        named = LABELLED_TEXT if saved_as_classifier(config) else raw_text_task(is_encoder=is_encoder)
    found = next((name for name in get_args(TrainedTask) if name == named), None)
    if found is None:
        raise SpecError("no model can be measured for this task", got=f"--task {named}", allowed=", ".join(LEARNT))
    task: TrainedTask = found
    return task


def _data(options: Options, task: TrainedTask, config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    trained = before.get("data") or {}
    length = trained.get("sequence_length")
    if length is None:
        context = model_shape(dict(config), task=task_of(task)).context
        length = min(DataSpec.model_fields["sequence_length"].default, context or 1 << 62)
    data: dict[str, Any] = {"sequence_length": length}
    same = options.data in (trained.get("train"), trained.get("validation"))
    taken = _OF_THE_DATA if same else ()
    if options.split == HELD_OUT:
        data["train"] = options.data
        taken = (*taken, *_OF_THE_SPLIT)
    else:
        data["validation"] = options.data
        if options.split is not None:
            data["validation_split"] = options.split
    data |= {name: trained[name] for name in taken if trained.get(name) is not None and name not in data}
    asked = {"text_column": options.text_column, "label_column": options.label_column}
    data |= {name: column for name, column in asked.items() if column is not None}
    if options.label_column is not None and task_of(task).models_language:
        raise SpecError("--label-column is for classification", got=f"task {task}", do="remove it, or set --task")
    return data


def _stem(location: str) -> str:
    return Path(location.rpartition("://")[2].rstrip("/*")).name.partition(".")[0] or "data"
