"""Runs of an MLflow experiment side by side: quality against cost, ranked, as values, JSON, curves and a link."""

from __future__ import annotations

import difflib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.credentials import hide
from orchestrator.errors import SpecError
from orchestrator.tasks.base import BITS_PER_BYTE
from orchestrator.tracking import store
from orchestrator.tracking.mlflow_backend import (
    BEST_RUN_TAG,
    NON_FINITE_TAG,
    PARENT_TAG,
    STOP_REASON_TAG,
    TAG,
    last_is_finite,
    search_runs,
)
from orchestrator.tracking.rows import RunRow, rank, with_trials

if TYPE_CHECKING:
    from mlflow import MlflowClient

QUALITY_METRICS = ("eval/accuracy", BITS_PER_BYTE, "eval/loss", "eval/perplexity", "train/loss")
"""Which metric stands for quality when a run does not say, first found first."""
MOST_LINKED_RUNS = 50
"""Runs in a comparison link: MLflow's page gets slow above (a guess), and addresses have limits."""
# Scripts rely on the first line of names; later fields may be added behind them.
JSON_FIELDS = (
    *("run_id", "name", "kind", "method", "metrics", "tokens", "flops", "gpu_hours", "usd", "parent"),
    *("rank", "status", "task", "quality_metric", "quality", "steps", "learning_rate", "start_time_ms"),
    *("trials", "best_run_id", "note", "group_title", "held_out_fingerprint", "tokenizer_fingerprint", "role"),
)


def collect(uri: str, experiment: str) -> list[RunRow]:
    """All runs of an experiment, ranked, in display order; empty when it has none.

    Raises SpecError for an experiment that does not exist, StorageError when the store cannot be read.
    """
    uri = hide(store.absolute(uri))
    store.check_store(uri)
    client = store.client(uri, create=False)
    with store.translated(uri, doing=f"read the experiment {experiment!r}"):
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage == "deleted":
            there = client.search_experiments()
            # MLflow makes one of its own, number 0, which is empty in the stores of most.
            has_runs = any(True for _ in search_runs(client, "0"))
            names = sorted(item.name for item in there if item.experiment_id != "0" or has_runs)
            near = difflib.get_close_matches(experiment, names, n=1)
            named = f"set --experiment {shlex.quote((near or names)[0])}" if near or len(names) == 1 else None
            raise SpecError(
                f"there is no experiment {experiment!r} in {hide(uri)}",
                got=experiment,
                allowed=", ".join(names),
                do=named or "name one of these with --experiment, or another store with --tracking-uri",
            )
        rows = [_row(run) for run in search_runs(client, found.experiment_id)]
    return rank(with_trials(rows))


def to_json(rows: Iterable[RunRow]) -> dict[str, Any]:
    """The answer of `compare --json`: for each run the fields of `RunRow` named in `JSON_FIELDS`."""
    return {"runs": [{name: getattr(row, name) for name in JSON_FIELDS} for row in rows]}


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The losses of one run against the tokens it had seen."""

    run: RunRow
    train: tuple[tuple[float, float], ...]
    """(tokens, loss), by step."""
    evaluation: tuple[tuple[float, float], ...]


def loss_curves(uri: str, rows: Iterable[RunRow]) -> list[LossCurve]:
    """Curves of the runs that logged a loss and their tokens; one request per curve, so give only runs to draw.

    Raises StorageError when the store cannot be read.
    """
    uri = hide(store.absolute(uri))
    client = store.client(uri, create=False)
    curves = []
    with store.translated(uri, doing="read the loss curves"):
        for row in rows:
            # A search repeats the figures of its best trial, which is drawn itself.
            if row.trials or "train/tokens" not in row.metrics:
                continue
            tokens = _history(client, row, "train/tokens")
            curve = LossCurve(
                run=row,
                train=_against_tokens(_history(client, row, "train/loss"), tokens),
                evaluation=_against_tokens(_history(client, row, "eval/loss"), tokens),
            )
            if curve.train or curve.evaluation:
                curves.append(curve)
    return curves


@dataclass(frozen=True, kw_only=True)
class ComparisonLink:
    """Where MLflow shows the runs side by side."""

    url: str
    command: str | None
    """Starts the server behind `url` when the store is a bare database; None when a server runs already."""


def comparison_link(uri: str, rows: Sequence[RunRow]) -> ComparisonLink:
    """MLflow's own comparison of the first `MOST_LINKED_RUNS` rows."""
    shown = rows[:MOST_LINKED_RUNS]
    runs = quote(json.dumps([row.run_id for row in shown], separators=(",", ":")))
    experiments = quote(json.dumps(sorted({row.experiment_id for row in shown}), separators=(",", ":")))
    page = f"#/compare-runs?runs={runs}&experiments={experiments}"
    if uri.startswith("http"):
        return ComparisonLink(url=f"{hide(uri).rstrip('/')}/{page}", command=None)
    # Without the job runner and with one worker: 6 s and 0.5 GB instead of 25 s and 3 GB (measured, MLflow 3.17).
    command = (
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --workers 1 "
        f"--host 127.0.0.1 --port 5000 --backend-store-uri '{hide(store.absolute(uri))}'"
    )
    return ComparisonLink(url=f"http://127.0.0.1:5000/{page}", command=command)


def _row(run: Any) -> RunRow:
    """An MLflow run as a row."""
    tags: dict[str, str] = run.data.tags
    points = [point for point in run.data.to_proto().metrics if math.isfinite(point.value)]
    metrics = {point.key: point.value for point in points}
    quality_metric = tags.get(f"{TAG}quality_metric") or next((key for key in QUALITY_METRICS if key in metrics), None)
    evaluated = next((point for point in points if point.key == quality_metric), None)
    steps = max((point.step for point in points if point.key.startswith("train/")), default=None)
    params = run.data.params
    return RunRow(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name or tags.get(f"{TAG}name", run.info.run_id),
        status=_status(run.info.status, tags.get(STOP_REASON_TAG), steps),
        start_time_ms=run.info.start_time,
        kind=tags.get(f"{TAG}kind"),
        method=tags.get(f"{TAG}method"),
        task=tags.get(f"{TAG}task"),
        metrics=metrics,
        quality_metric=quality_metric,
        quality_mode=tags.get(f"{TAG}quality_mode"),
        quality=evaluated.value if evaluated is not None and last_is_finite(evaluated, tags) else None,
        held_out_fingerprint=tags.get(f"{TAG}held_out_fingerprint"),
        tokenizer_fingerprint=tags.get(f"{TAG}tokenizer_fingerprint"),
        masking_rate=_number(params.get("training.masking_rate")),
        tokens=metrics.get("train/tokens"),
        flops=metrics.get("cost/flops"),
        gpu_hours=metrics.get("cost/gpu_hours"),
        usd=metrics.get("cost/usd"),
        steps=steps,
        learning_rate=_number(params.get("training.learning_rate")) or None,  # 0 where nothing is trained
        parent=tags.get(PARENT_TAG),
        role=tags.get(f"{TAG}role"),
        trials=int(_number(tags.get(f"{TAG}stages")) or 0),
        best_run_id=tags.get(BEST_RUN_TAG),
        note=_note(tags),
    )


def _history(client: MlflowClient, row: RunRow, key: str) -> list[tuple[int, float]]:
    """Finite (step, value) pairs in order of steps; nothing for a metric the run has not logged.

    Of two points at the last step the newer one is of the model, which an earlier step gave.
    """
    if key not in row.metrics:
        return []
    points = sorted(client.get_metric_history(row.run_id, key), key=lambda point: point.timestamp, reverse=True)
    return sorted({point.step: point.value for point in points if math.isfinite(point.value)}.items())


def _against_tokens(
    points: Sequence[tuple[int, float]], tokens: Sequence[tuple[int, float]]
) -> tuple[tuple[float, float], ...]:
    """(tokens, value) for (step, value): evaluations may lie between two logged steps."""
    import numpy as np

    steps_seen, tokens_seen = zip((0, 0.0), *tokens, strict=True)
    return tuple((float(np.interp(step, steps_seen, tokens_seen)), value) for step, value in points)


def _status(status: str, stop_reason: str | None, steps: int | None) -> str:
    if stop_reason is None:
        return status.lower()
    early = {"pruned": "stopped early", "interrupted": "interrupted"}.get(stop_reason, f"stopped by {stop_reason}")
    return early if steps is None else f"{early} at step {steps}"


def _note(tags: Mapping[str, str]) -> str | None:
    error = tags.get(f"{TAG}error")
    return tags.get(NON_FINITE_TAG) or (error.splitlines()[0] if error else None)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
