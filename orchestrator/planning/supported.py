"""Which architectures the installed transformers has a model of a task for: read from its source, not imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from orchestrator.tasks.base import LearntTask


def check_supported(config: dict[str, Any], task: LearntTask) -> None:
    """Raises ModelError for an architecture that cannot be trained for a task at all, whatever its sizes are."""
    kind = str(config["model_type"])
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{kind} reads one text and writes another, which no task here trains",
            got=f"is_encoder_decoder in its config.json, and task: {task.name}",
            do="use a decoder such as gpt2 or llama for task: causal-lm, an encoder such as bert for the others",
        )
    known = supported(task)
    if known and kind not in known:
        raise ModelError(
            f"transformers has no model for task: {task.name} of this architecture",
            got=f"model_type {kind}",
            allowed=f"{len(known)} architectures, such as {', '.join(sorted(_FAMILIAR & known))}",
            do="check model_type in its config.json, or use another base",
        )


_FAMILIAR = frozenset(("gpt2", "llama", "bert", "roberta", "qwen3", "modernbert", "gemma3_text"))


@functools.cache
def supported(task: LearntTask) -> frozenset[str]:
    """Model types of a task; empty where transformers' table is not where it was."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return frozenset()
    try:
        source = (Path(found.origin).parent / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
        return _keys(source, task.model_table)
    except (OSError, SyntaxError, ValueError):
        return frozenset()


def _keys(source: str, table: str) -> frozenset[str]:
    """The first strings of the pairs in `table = OrderedDict([(key, value), ...])`."""
    start = source.index(f"\n{table} = ")
    tree = ast.parse(source[start : source.index("\n)\n", start) + 3])
    return frozenset(
        str(node.elts[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant)
    )
