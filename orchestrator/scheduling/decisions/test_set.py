"""A training's test set: the spec that measures its model once, and what of that is shown as the training's. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.load_spec import parse_spec
from orchestrator.method_names import EVALUATE
from orchestrator.samples.metric_names import of_test_set
from orchestrator.spec import RunSpec
from orchestrator.tasks.registry import task_of

_AS_IN_TRAINING = (
    *("sequence_length", "exclude", "format", "text_column", "label_column", "delimiter", "incomplete_rows"),
    "too_long",
)
"""Fields of `data` that say how examples are read."""


def measuring_spec(spec: RunSpec, *, model: Mapping[str, str], columns: Mapping[str, str]) -> RunSpec:
    """What measures the model of a finished training on its `data.test`; `columns` are those that it has trained on,
    by what they hold. Without an MLflow run of its own: the figures are the training's."""
    assert spec.data.test is not None
    data: dict[str, Any] = {name: getattr(spec.data, name) for name in _AS_IN_TRAINING}
    named = {f"{holds}_column": column for holds, column in columns.items() if holds in ("text", "label")}
    training: dict[str, Any] = {"seed": spec.training.seed, "precision": spec.training.precision}
    if task_of(spec.task).hides_tokens:
        training["masking_rate"] = spec.training.masking_rate
    return parse_spec(
        {
            "name": f"{spec.name[:94]}-test",
            "kind": EVALUATE,
            "model": dict(model),
            "task": spec.task,
            "data": {**data, **named, "validation": spec.data.test, "validation_split": spec.data.test_split},
            "training": training,
            "resources": spec.resources.model_dump(),
            "checkpoint": {"storage": spec.checkpoint.storage},
            "tracking": {"enabled": False},
        },
        source="data.test",
    )


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of the test set among the training's: `eval/accuracy` is `test/accuracy`; costs are left out."""
    return {of_test_set(name): value for name, value in metrics.items() if name.startswith("eval/")}
