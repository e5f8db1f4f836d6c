"""Finished runs of a store -> the `RunRecord`s that `policy.corrections` learns from. Nothing is written.

A run's tags say what it was, its parameters what was planned, its metrics what came out (`worker.measurement` logs
predicted beside measured at the end of a run).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.credentials import hide
from orchestrator.policy.corrections import History, RunRecord
from orchestrator.tasks.names import PACKED
from orchestrator.tasks.registry import LEARNT
from orchestrator.tracking import store
from orchestrator.tracking.mlflow_backend import TAG, last_is_finite, search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

_OURS = f"attributes.status = 'FINISHED' AND tags.`{TAG}kind` LIKE '%'"
_ROLES = ("search", "stages")
"""Of runs that repeat the figures of a trial or a stage, which is a run itself."""

_WHOLE = ("workers", "parameters", "trainable_parameters", "sequence_length", "tokens_per_step")
_PLANNED = (*_WHOLE, "flops_per_step")
"""Figures among the parameters `plan.FIELD`, and which of them are whole numbers."""
_PACKED = {name for name, task in LEARNT.items() if task.form in PACKED}
"""Tasks whose samples have no padding."""
_COUNTED = {
    "measured_steps": "measured/steps",
    "train_samples": "data/train_samples",
    "train_tokens": "data/train_tokens",
    "tokens_seen": "train/tokens",
}
_MEASURED = {
    name: name.replace("_", "/", 1)
    for side in ("predicted", "measured")
    for name in (f"{side}_tokens_per_second", f"{side}_peak_gib", f"{side}_gpu_hours")
}
"""Field of a record -> metric."""


def read_history(uri: str) -> History:
    """Every finished run of this project, over all experiments of a store; a search counts by its trials, stages
    each by itself.

    Raises SpecError for a kind of store that is not supported, StorageError for one that is not there or does not
    answer.
    """
    uri = hide(store.absolute(uri))
    store.check_store(uri)
    client = store.client(uri, create=False)
    records: list[RunRecord] = []
    passed_over = 0
    with store.translated(uri, doing="read the finished runs"):
        for experiment_id in _experiment_ids(client):
            for run in search_runs(client, experiment_id, _OURS):
                if run.data.tags.get(f"{TAG}role") in _ROLES:
                    continue
                record = _record(run)
                if record is None:
                    passed_over += 1
                else:
                    records.append(record)
    return History(records=tuple(records), passed_over=passed_over)


def _experiment_ids(client: MlflowClient) -> Iterator[str]:
    """All experiments that are not deleted, page by page."""
    token: str | None = None
    while True:
        page = client.search_experiments(page_token=token)
        yield from (experiment.experiment_id for experiment in page)
        token = page.token
        if not token:
            return


def _record(run: Any) -> RunRecord | None:
    """A run as a record; None when it lacks a figure or has one that cannot be."""
    tags, params = run.data.tags, run.data.params
    points = {point.key: point for point in run.data.to_proto().metrics if math.isfinite(point.value)}
    metrics = {key: point.value for key, point in points.items() if last_is_finite(point, tags)}
    planned = {field: _number(params, field) for field in _PLANNED}
    figures = planned | {field: metrics.get(key, 0.0) for field, key in (_COUNTED | _MEASURED).items()}
    names: dict[str, Any] = {field: tags.get(f"{TAG}{field}") for field in ("kind", "method", "task")}
    names |= {field: params.get(f"plan.{field}") for field in ("device_name", "precision")}
    if min(figures.values()) <= 0 or not all(names.values()):
        return None
    if names["task"] not in _PACKED and not _number(params, "padded_tokens_per_step"):
        return None  # from when rows were planned as if all were as long as the cut-off
    whole = {field: int(figures[field]) for field in (*_WHOLE, *_COUNTED)}
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        steps=points["measured/steps"].step,
        base_model=params.get("model.base"),
        data_source=params.get("data.train"),
        data_fingerprint=tags.get(f"{TAG}data_fingerprint"),
        eval_loss=metrics.get("eval/loss"),
        eval_accuracy=metrics.get("eval/accuracy"),
        **(names | figures | whole),
    )


def _number(params: Mapping[str, str], field: str) -> float:
    """A planned figure; 0, which no plan has, where it is missing or no number."""
    try:
        value = float(params.get(f"plan.{field}", "0"))
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
