"""Specs that tests start from, as plain mappings, so that each test changes only what it is about."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from orchestrator.data.held_out import HeldOut
from orchestrator.load_spec import parse_spec, set_path
from orchestrator.spec import RunSpec

PRETRAIN: dict[str, Any] = {
    "name": "tiny",
    "kind": "pretrain",
    "model": {"config": "gpt2", "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 2}, "vocab_size": 512},
    "data": {"train": "corpus", "sequence_length": 32, "validation_fraction": 0.2},
    "training": {"steps": 6, "global_batch": 8, "learning_rate": 1e-3},
}

HELD_OUT = HeldOut(
    unit="documents", examples=8, bytes=2048, share=0.2, asked=0.2, fingerprint="0123456789abcdef", repeated=1
)
"""Of no data in particular."""

CLASSIFY: dict[str, Any] = {
    "name": "tiny-classifier",
    "kind": "finetune",
    "model": {"base": "base"},
    "task": "text-classification",
    "data": {"train": "rows.csv", "label_column": "label", "sequence_length": 16, "validation_fraction": 0.25},
    "training": {"steps": 6, "global_batch": 8, "learning_rate": 1e-3},
}


def raw(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with dotted paths set; `training__steps=3` sets `training.steps`."""
    value = copy.deepcopy(base)
    for path, change in changes.items():
        set_path(value, path.replace("__", "."), change)
    return value


def spec(base: dict[str, Any], **changes: Any) -> RunSpec:
    """The typed spec of `raw`."""
    return parse_spec(raw(base, **changes))


def write_corpus(folder: Path, *, documents: int = 40) -> Path:
    """Text files with enough repetition for a small model to learn something."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "the",
        "model",
        "reads",
        "a",
        "line",
        "and",
        "the",
        "next",
        "line",
        "follows",
        "from",
        "the",
        "one",
        "before",
        "it",
    ]
    for number in range(documents):
        lines = [" ".join(words[(number + i + j) % len(words)] for j in range(12)) for i in range(20)]
        (folder / f"document-{number:03d}.txt").write_text("\n".join(lines) + f"\nend of document {number}\n")
    return folder
