"""What makes a run this one and no other: its settings, and by content all that it reads."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import locations
from orchestrator.architectures.families import FAMILY_DEFAULTS
from orchestrator.data.contents import digests, hub_commit
from orchestrator.methods.registry import method_of
from orchestrator.samples.prepare import PreparedData
from orchestrator.spec import RunSpec

Met = tuple[RunSpec, PreparedData]
"""A spec, and its data as encoded."""

_CONFIGURATION = ("config.json", "generation_config.json")
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.model", "*.txt", "*.jinja", "*.py")
"""What `from_pretrained` may read in a model's folder: configuration, weights, adapter, tokenizer and code."""
_BESIDE_A_MODEL = ("training_args.bin", "trainer_state.json", "requirements*.txt", "LICENSE*", "NOTICE*")
"""What matches the above and is not read."""


def identity_of(spec: RunSpec, data: PreparedData, trials: Sequence[Met] = ()) -> str:
    """Eight hex digits: equal for equal settings on equal inputs, wherever those lie.

    A search's trials belong to it: another file behind one of them makes it another search.
    Raises DataError when a file of the model cannot be read.
    """
    parts = [[_settings(each), *_data(found), _model(each)] for each, found in ((spec, data), *trials)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _data(data: PreparedData) -> list[str]:
    return [data.fingerprint] if data.retained is None else [data.fingerprint, data.retained.fingerprint]


def _settings(spec: RunSpec) -> dict[str, Any]:
    """The spec without the names of what it reads; the fingerprint of the data covers the tokenizer."""
    settings = spec.identity()
    data, model = ("train", "validation", "chat_template"), ("base", "config", "tokenizer", "adapter")
    for block, names in (("data", data), ("model", model)):
        settings[block] = {key: value for key, value in settings[block].items() if key not in names}
    if settings.get("retain") is not None:
        settings["retain"] = {key: value for key, value in settings["retain"].items() if key != "data"}
    if settings["search"] is not None:  # its points are the trials, which come one by one
        settings["search"] = {key: value for key, value in settings["search"].items() if key != "space"}
    return settings


def _model(spec: RunSpec) -> list[Any]:
    """The files of a base model or a given configuration, by content; else the name and commit it has on the hub."""
    location = str(spec.model.base or spec.model.config)
    if spec.model.base is None and location in FAMILY_DEFAULTS:
        return [location]
    path = Path(locations.resolve(location))
    if path.is_file():
        return digests([path])
    if not path.is_dir():
        return [location, hub_commit(location, "model")]
    if spec.model.base is None:
        return digests([path / "config.json"])
    wanted = _CONFIGURATION if method_of(spec.method).is_from_scratch else _MODEL_FILES
    found = [_files(path, wanted)]
    if spec.model.adapter is not None:
        found.append(_files(Path(locations.resolve(spec.model.adapter)), _MODEL_FILES))
    return found[0] if len(found) == 1 else found


def _files(path: Path, wanted: Sequence[str]) -> list[Any]:
    files = sorted(file for file in path.iterdir() if file.is_file() and _is_read(file.name, wanted))
    return [[file.name, digest] for file, digest in zip(files, digests(files), strict=True)]


def _is_read(name: str, wanted: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in wanted) and not any(
        fnmatch.fnmatch(name, pattern) for pattern in _BESIDE_A_MODEL
    )
