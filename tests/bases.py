"""Folders of base models without torch: a config.json, and weights of which only the header is on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def write_base(folder: Path, config: Mapping[str, Any], shapes: Shapes | None = None) -> Path:
    """A base model's folder; without `shapes` its weights are a token table alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("dim")
    table = {"embeddings.word_embeddings.weight": (config["vocab_size"], hidden)}
    write_weights(folder / "model.safetensors", table if shapes is None else shapes)
    return folder
