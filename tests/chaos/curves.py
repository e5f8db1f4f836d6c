"""What MLflow has of a run, and how it differs from the run that nobody disturbed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestrator.tracking import store

COMPARED = (
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens",
    "cost/flops",
    "eval/loss",
    "eval/perplexity",
    "eval/bits_per_byte",
)
"""Figures that a disturbed run shares bit for bit with the undisturbed one; times and prices differ."""
LOSSES = ("train/loss", "eval/loss")
"""What agrees within floating-point reduction order where the world size has changed."""
_KEPT = ("train/", "eval/", "cost/")
_OF = ": "


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of one metric."""

    step: int
    value: float
    at_s: float
    """When it was measured, seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """All MLflow runs of one name."""

    run_ids: tuple[str, ...]
    status: str
    """Of the newest run, and others that its trials have; empty when there is none."""
    tags: Mapping[str, str]
    metrics: Mapping[str, tuple[Point, ...]]
    """Points of the newest run by metric, in the order of steps; those of a search's trials as `00: train/loss`."""
    trials: tuple[str, ...] = ()
    """Names of the runs below the newest one."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run against its reference."""

    largest: float
    """Of any compared value at the same step, in units of the reference's value; 0 is bit for bit, infinite is nothing
    to compare."""
    where: str
    """Metric and step of the largest difference; empty when there is none."""
    missing: int
    """Points of the reference that the run lacks."""
    twice: int
    """Points whose step is there already."""


def tracked(uri: str, experiment: str, name: str) -> Tracked:
    """Reads all runs of a name. Raises what MLflow raises when the store cannot be read."""
    client = store.client(uri, create=False)
    found = client.get_experiment_by_name(experiment)
    runs = [] if found is None else client.search_runs([found.experiment_id], f"attributes.run_name = '{name}'")
    if not runs:
        return Tracked(run_ids=(), status="", tags={}, metrics={})
    newest = runs[0]
    below = client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'")
    names = sorted(run.info.run_name for run in below)
    metrics, tags = {} if below else _curves(client, newest, ""), dict(newest.data.tags)
    for run in below:
        metrics |= _curves(client, run, f"{run.info.run_name}{_OF}")
        tags |= {f"{run.info.run_name}{_OF}{key}": value for key, value in run.data.tags.items()}
    statuses = {newest.info.status, *(run.info.status for run in below)}
    return Tracked(
        run_ids=tuple(run.info.run_id for run in runs),
        status=", ".join(sorted(statuses)),
        tags=tags,
        metrics=metrics,
        trials=tuple(names),
    )


def _curves(client: Any, run: Any, prefix: str) -> dict[str, tuple[Point, ...]]:
    metrics = {}
    for key in sorted(run.data.metrics):
        if key.startswith(_KEPT):
            points = client.get_metric_history(run.info.run_id, key)
            in_order = sorted(points, key=lambda point: (point.step, point.timestamp))
            metrics[f"{prefix}{key}"] = tuple(
                Point(step=p.step, value=p.value, at_s=p.timestamp / 1000) for p in in_order
            )
    return metrics


def losses(run: Tracked) -> list[tuple[Point, ...]]:
    """The training losses of a run, or of each trial of a search. Pure."""
    return [points for key, points in run.metrics.items() if key.endswith("train/loss")]


def difference(run: Tracked, reference: Tracked, *, compared: Sequence[str] = COMPARED) -> Difference:
    """Which points of the reference are there, and how far those of the `compared` metrics are apart. Pure."""
    largest, where, missing, twice = 0.0, "", 0, 0
    for key, points in reference.metrics.items():
        own = {point.step: point.value for point in run.metrics.get(key, ())}
        twice += len(run.metrics.get(key, ())) - len(own)
        for point in points:
            if point.step not in own:
                missing += 1
            elif key.rpartition(_OF)[2] in compared and own[point.step] != point.value:
                apart = abs(own[point.step] - point.value) / max(abs(point.value), 1e-12)
                if not apart <= largest:  # also where it is not a number
                    largest, where = (apart if apart == apart else math.inf), f"{key} at step {point.step}"
    if not run.metrics:
        largest, where = math.inf, "nothing was tracked"
    return Difference(largest=largest, where=where, missing=missing, twice=twice)


def out_of_order(run: Tracked) -> list[str]:
    """Metrics of which a later step was measured before an earlier one. Pure."""
    return [key for key, points in run.metrics.items() if any(a.at_s > b.at_s for a, b in pairwise(points))]


def longest_pause_s(points: tuple[Point, ...], *, after_s: float, within_s: float) -> float:
    """Seconds from a fault at `after_s` until the first step that is new after it, the steps being a pause apart.

    Of all times between two steps of which one ends after the fault and which begins at most `within_s` after it, the
    longest; a step that was under way may still come after the fault. 0 when no step came after it. Pure.
    """
    times = sorted(point.at_s for point in points)
    pauses = [
        (end - begin, end - max(begin, after_s))
        for begin, end in pairwise(times)
        if end > after_s and begin < after_s + within_s
    ]
    return max(pauses)[1] if pauses else 0.0
