"""A YAML file to a mapping: YAML 1.1 as PyYAML reads it, with the exceptions that people expect."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import SpecError


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C nine times as fast
    """YAML 1.1 as PyYAML reads it, with `1e-4` as a number (YAML 1.2), and duplicate keys refused."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping_without_duplicates(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_pairs(node, deep=True))


Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises SpecError when there is none."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        folder = file.parent
        nearby = sorted(p.name for p in folder.glob("*.y*ml"))[:8] if folder.is_dir() else []
        raise SpecError(
            "the spec file cannot be read",
            got=f"{file} ({getattr(error, 'strerror', None) or error})",
            allowed=f"YAML files here: {', '.join(nearby)}" if nearby else None,
            do="give the path of a spec; configs/ holds some that run as they are",
        ) from error
    try:
        raw = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{file} is not valid YAML", got=" ".join(str(error).split())) from error
    if not isinstance(raw, dict):
        raise SpecError(
            f"{file} holds no spec",
            got="an empty file" if raw is None else type(raw).__name__,
            do="start from configs/",
        )
    return raw
