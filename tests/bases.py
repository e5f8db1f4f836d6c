"""Folders of base models without torch: a config.json, and weights of which only the header is on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.architectures.families import DECODERS, model_shape
from orchestrator.architectures.weight_names import HEAD_MODULES, KNOWN
from orchestrator.tasks.registry import task_of

Shapes = Mapping[str, tuple[int, ...]]


def header_of(shapes: Shapes) -> tuple[bytes, int]:
    """(a safetensors header of fp32 tensors with its length before it, bytes of the tensors)."""
    entries: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text, at


def write_weights(file: Path, shapes: Shapes) -> Path:
    """A safetensors file of zeros, which take no room on the disk."""
    header, size = header_of(shapes)
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + size)
    return file


def body_of(config: Mapping[str, Any]) -> Shapes:
    """The weights that any model of an architecture has, without those of a head that a task may bring."""
    kind = str(config["model_type"])
    if kind not in KNOWN:
        hidden = config.get("hidden_size") or config.get("n_embd") or config.get("dim")
        return {"embeddings.word_embeddings.weight": (config["vocab_size"], hidden)}
    if kind in DECODERS:
        return model_shape(dict(config), task=task_of("causal-lm")).weights
    whole = model_shape(dict(config), task=task_of("text-classification")).weights
    return {name: size for name, size in whole.items() if not set(name.split(".")) & set(HEAD_MODULES[kind])}


def write_base(folder: Path, config: Mapping[str, Any], more: Shapes | None = None) -> Path:
    """A base model's folder; `more` are weights beside those of its body, or in place of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", {**body_of(config), **(more or {})})
    return folder
