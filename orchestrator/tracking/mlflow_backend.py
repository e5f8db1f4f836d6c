"""One run in MLflow's store: found or created, told what it is, given its metrics, ended. Each step may be repeated.

Everything goes by explicit run id through `MlflowClient`: MLflow's process-wide active run is never used, so trials,
restarted workers and a user's own code cannot write into each other's runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SpecError
from orchestrator.tracking.outbox import Metric
from orchestrator.tracking.run_record import DesiredRun, RunHandle, StoredRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "orchestrator."
"""Every tag of this project starts with it."""
KEY_TAG = f"{TAG}key"
"""The same run under any id: how a run is found again whose creator died before it knew the id."""
PARENT_TAG = "mlflow.parentRunId"
NON_FINITE_TAG = f"{TAG}non_finite"
"""Metric and step of the first value that was infinite or not a number; with `.METRIC` behind it, of an evaluation's
metric the step of the last such value."""
STOP_REASON_TAG = f"{TAG}stop_reason"
"""Why a run ended before its planned length: `budget`, `pruned`, ..."""
ERROR_TAG = f"{TAG}error"
MODEL_STEP_TAG = f"{TAG}model_step"
"""The step that the run's model is from, where that is not its last."""
BEST_RUN_TAG = f"{TAG}best_run_id"
"""On a search: its best trial; on a run of stages: the last."""

PARAMS_PER_BATCH = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
"""Limits of MLflow's `log_batch` (mlflow.utils.validation, 3.17)."""


def find(client: MlflowClient, handle: RunHandle, experiment_id: str) -> StoredRun | None:
    """The run of a handle, if the store knows it; of several the one that `create` would have left."""
    found = [run.info.run_id for run in search_runs(client, experiment_id, f"tags.`{KEY_TAG}` = '{handle.key}'")]
    return StoredRun(run_id=min(found), experiment_id=experiment_id, uri=handle.uri) if found else None


def newest_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """By metric, the highest step that the store has."""
    keys = client.get_run(run_id).data.metrics
    return {key: max(point.step for point in client.get_metric_history(run_id, key)) for key in keys}


def create(client: MlflowClient, run: DesiredRun, experiment_id: str, *, parent_run_id: str | None) -> StoredRun:
    """Creates the run that `find` has not found, once: a request that was answered too late is repeated by MLflow's
    client, and what that leaves is deleted."""
    handle = run.handle
    tags = {key: value for key, value in run.tags.items() if value is not None} | {KEY_TAG: handle.key}
    if parent_run_id is not None:
        tags[PARENT_TAG] = parent_run_id
    client.create_run(experiment_id, start_time=handle.created_ms, tags=_shortened(tags), run_name=handle.name)
    made = find(client, handle, experiment_id)
    assert made is not None, "MLflow says that it has created the run"
    for twin in search_runs(client, experiment_id, f"tags.`{KEY_TAG}` = '{handle.key}'"):
        if twin.info.run_id != made.run_id:
            client.delete_run(twin.info.run_id)
    return made


def describe(client: MlflowClient, run_id: str, wanted: DesiredRun, *, known_artifacts: Mapping[str, str]) -> None:
    """Tags, parameters and artifacts that differ from what is wanted; a run that goes on is running again.

    `known_artifacts` are digests of those that the store has. Raises SpecError when the run was deleted.
    """
    run = _existing(client, run_id, uri=wanted.handle.uri)
    own = {KEY_TAG: wanted.handle.key, **wanted.tags}
    wanted_tags = _shortened({key: value for key, value in own.items() if value is not None})
    for stale in [key for key, value in own.items() if value is None and key in run.data.tags]:
        client.delete_tag(run_id, stale)
    _set_tags(client, run_id, {key: value for key, value in wanted_tags.items() if run.data.tags.get(key) != value})
    _log_new_params(client, run_id, wanted.params, known=run.data.params)
    for name, text in wanted.artifacts.items():
        if known_artifacts.get(name) != digest(text):
            client.log_text(run_id, text, name)
    if wanted.status == "running" and run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")


def digest(text: str) -> str:
    """What an artifact's text is known by."""
    return hashlib.sha256(text.encode()).hexdigest()


def send(client: MlflowClient, run: StoredRun, batch: Sequence[Metric]) -> None:
    """Gives points to a run. Raises SpecError when the run was deleted.

    MLflow stores an infinite value as 1.8e308, which flattens every chart it is on: values that are not finite
    become a tag instead, which names the first one.
    """
    from mlflow.entities import Metric as Point
    from mlflow.exceptions import MlflowException

    finite = [Point(m.key, m.value, m.timestamp_ms, m.step) for m in batch if math.isfinite(m.value)]
    try:
        client.log_batch(run.run_id, metrics=finite, synchronous=True)
    except MlflowException as exc:
        if exc.error_code != "INTERNAL_ERROR":  # so are connections that fail
            _existing(client, run.run_id, uri=run.uri)
        raise
    rest = [m for m in batch if not math.isfinite(m.value)]
    if not rest:
        return
    tags = {f"{NON_FINITE_TAG}.{m.key}": str(m.step) for m in rest if m.key.startswith("eval/")}
    if NON_FINITE_TAG not in client.get_run(run.run_id).data.tags:
        tags[NON_FINITE_TAG] = f"{rest[0].key} is {rest[0].value} at step {rest[0].step}"
    _set_tags(client, run.run_id, tags)


def last_is_finite(point: Any, tags: Mapping[str, str]) -> bool:
    """Whether a metric's last finite value is its last one: no later evaluation gave what is no number."""
    return int(tags.get(f"{NON_FINITE_TAG}.{point.key}", "-1")) <= int(point.step)


def end(client: MlflowClient, run_id: str, wanted: DesiredRun) -> None:
    """Sets how and when the run ended."""
    client.set_terminated(run_id, status=wanted.status.upper(), end_time=wanted.ended_ms)


def copy_best(
    client: MlflowClient, search: StoredRun, best_run_id: str, *, trials: Sequence[str] = (), at_ms: int
) -> None:
    """The best trial's last metrics and parameters (as `best.KEY`); `cost/` metrics are summed over all trials, those
    of `trials` included that lie below another run: stages that an earlier run has finished."""
    from mlflow.entities import Metric as Point

    trial = client.get_run(best_run_id)
    last = [point for point in trial.data.to_proto().metrics if math.isfinite(point.value)]
    figures = {point.key: point.value for point in last if last_is_finite(point, trial.data.tags)}
    # All at step 0: MLflow shows the value of the highest step, and a later best trial may have fewer.
    figures |= _costs_of_trials(client, search, trials)
    points = [Point(key, value, at_ms, 0) for key, value in figures.items()]
    client.log_batch(search.run_id, metrics=points, synchronous=True)
    own = client.get_run(search.run_id).data.params
    changed = {f"best.{key}": value for key, value in trial.data.params.items() if own.get(key) != value}
    _log_new_params(client, search.run_id, changed, known=own)
    _set_tags(client, search.run_id, {BEST_RUN_TAG: best_run_id})


def search_runs(client: MlflowClient, experiment_id: str, where: str = "") -> Iterator[Any]:
    """All runs of an experiment that match, page by page."""
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], filter_string=where, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _existing(client: MlflowClient, run_id: str, *, uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as exc:
        if exc.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage == "deleted":
        raise SpecError(
            "the run to go on with is not in the MLflow store, or was deleted there",
            got=f"run {run_id} in {uri}",
            do="set tracking.uri to the store the run was started with, or give the run another name",
        )
    return run


def _costs_of_trials(client: MlflowClient, search: StoredRun, trials: Sequence[str]) -> dict[str, float]:
    totals: dict[str, float] = {}
    below = list(search_runs(client, search.experiment_id, f"tags.`{PARENT_TAG}` = '{search.run_id}'"))
    known = {run.info.run_id for run in below}
    for run in (*below, *(client.get_run(run_id) for run_id in trials if run_id not in known)):
        if run.info.lifecycle_stage == "deleted":
            continue
        for key, value in run.data.metrics.items():
            if key.startswith("cost/"):
                totals[key] = totals.get(key, 0.0) + value
    return totals


def _log_new_params(client: MlflowClient, run_id: str, params: Mapping[str, str], *, known: Mapping[str, str]) -> None:
    """Logs the parameters the run lacks; MLflow refuses to change one, and a resumed run may differ in some."""
    from mlflow.entities import Param

    new = iter([Param(key, _cut(value, LONGEST_PARAM)) for key, value in params.items() if key not in known])
    while batch := list(islice(new, PARAMS_PER_BATCH)):
        client.log_batch(run_id, params=batch, synchronous=True)


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    wanted = iter([RunTag(key, value) for key, value in _shortened(tags).items()])
    while batch := list(islice(wanted, PARAMS_PER_BATCH)):
        client.log_batch(run_id, tags=batch, synchronous=True)


def _shortened(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value, LONGEST_TAG) for key, value in tags.items()}


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
