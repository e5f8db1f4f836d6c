"""An edited spec starts a new run: says which unfinished run of the same name it leaves, and how to go on with that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.atomic_file import read_json, write_json
from orchestrator.runs.attempts import Attempts
from orchestrator.scheduling.run_folder import RESULT
from orchestrator.spec import RunSpec
from orchestrator.tracking.description import flatten

_IDENTITY = "identity.json"
"""In a run folder: the part of the spec that makes it this run and no other."""
_SHOWN_CHANGES = 4


def keep_identity(spec: RunSpec, folder: Path) -> None:
    """Writes down which spec a run folder belongs to."""
    write_json(folder / _IDENTITY, spec.identity())


def note_on_unfinished(spec: RunSpec, folder: Path) -> str | None:
    """What to tell of the newest unfinished run of this name and another spec; None without one, and where the spec's
    own run has begun already."""
    if Attempts(folder).newest() or not folder.parent.is_dir():
        return None
    name = re.compile(re.escape(spec.name) + "-[0-9a-f]{8}")
    begun = [path for path in folder.parent.iterdir() if name.fullmatch(path.name) and _is_unfinished(path)]
    for other in sorted(begun, key=lambda path: (path / _IDENTITY).stat().st_mtime, reverse=True):
        earlier = read_json(other / _IDENTITY)
        if earlier is not None:
            return describe_unfinished(other.name, earlier, spec.identity())
    return None


def _is_unfinished(folder: Path) -> bool:
    return (folder / _IDENTITY).is_file() and not (folder / RESULT).is_file()


def describe_unfinished(name: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The note for a run whose identity was `earlier`. Pure; values are shown as `key=value` takes them."""
    before, after = flatten(_as_texts(earlier)), flatten(_as_texts(now))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if not changed:
        return (
            f"an unfinished run of this name, {name}, has seen other data or another base model: this is a new run; "
            "with those back in place the same command goes on with it"
        )
    back = [f"{key}={before.get(key, 'null')}" for key in changed]
    what = ", ".join(changed[:_SHOWN_CHANGES]) + (f" and {len(changed) - _SHOWN_CHANGES} more" * (len(changed) > 4))
    return (
        f"an unfinished run of this name, {name}, has another {what}: this is a new run; "
        f"to go on with that one, add {' '.join(back)}"
    )


def _as_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves as JSON, which `key=value` reads; null stays out."""
    return {
        key: _as_texts(value) if isinstance(value, Mapping) else None if value is None else json.dumps(value)
        for key, value in values.items()
    }
