"""One MLflow run per training, through restarts. The driver opens and closes it; rank 0 logs metrics to it.

Everything goes by explicit run id through `MlflowClient`: MLflow's process-wide active run is never used, so
trials, restarted workers and a user's own code cannot write into each other's runs.

Driver:

    tracker = open_run(uri, experiment, name, run_id=None, parent_run_id=None, tags=run_tags(spec), params={})
    tracker.log_spec_and_plan(spec_yaml, plan.to_dict())
    ... workers get `tracker.handle` ...
    tracker.close_run("finished")

Worker of rank 0:

    metrics = MetricLog(handle, folder)
    metrics.log(step, {"train/loss": 2.31})
    metrics.close()

`NoTracker` and `MetricLog(None, folder)` stand in when tracking is off.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from orchestrator import __version__
from orchestrator.errors import SpecError, StorageError
from orchestrator.spec import RunSpec
from orchestrator.tracking import outbox, store

if TYPE_CHECKING:
    from mlflow import MlflowClient

RunStatus = Literal["finished", "failed", "killed"]

TAG = "orchestrator."
"""Every tag of this project starts with it."""
PARENT_TAG = "mlflow.parentRunId"
NON_FINITE_TAG = f"{TAG}non_finite"
"""Metric and step of the first value that was infinite or not a number."""
STOP_REASON_TAG = f"{TAG}stop_reason"
"""Why a run ended before its planned length: `budget`, `pruned`, ..."""
BEST_RUN_TAG = f"{TAG}best_run_id"
"""On a search: its best trial."""

PARAMS_PER_BATCH = 100
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
"""Limits of MLflow's `log_batch` (mlflow.utils.validation, 3.17)."""

_HANDLE_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """Names an open run; goes to the workers."""

    run_id: str
    experiment_id: str
    uri: str
    """The store, the same from any working directory."""


class Tracker(Protocol):
    """The driver's view of one run."""

    @property
    def handle(self) -> RunHandle | None:
        """What rank 0 logs to; None logs to the run's folder only."""

    def log_spec_and_plan(self, spec_yaml: str, plan: Mapping[str, Any]) -> None:
        """Keep what was asked for and what it was planned to take."""

    def copy_best(self, best_run_id: str) -> None:
        """Show the best trial's figures on this run, a search."""

    def close_run(self, status: RunStatus, *, error: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Say how the run ended."""


class NoTracker:
    """Tracking is off: results stay in the run's folder."""

    handle: RunHandle | None = None

    def log_spec_and_plan(self, spec_yaml: str, plan: Mapping[str, Any]) -> None:
        """Nothing to keep it in."""

    def copy_best(self, best_run_id: str) -> None:
        """Nothing to show it on."""

    def close_run(self, status: RunStatus, *, error: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Nothing was opened."""


class MlflowTracker:
    """A run that `open_run` has opened. Every method raises StorageError when the store fails."""

    def __init__(self, handle: RunHandle) -> None:
        self.handle = handle
        self._client = store.client(handle.uri, create=False)

    def log_spec_and_plan(self, spec_yaml: str, plan: Mapping[str, Any]) -> None:
        """Both as artifacts, and flattened to parameters so that MLflow can filter and compare by them.

        A resumed run keeps its first parameters; the artifact `plan.json` is the plan carried out last.
        """
        params = flatten(yaml.safe_load(spec_yaml)) | flatten(
            {"plan": {key: value for key, value in plan.items() if key not in ("deepspeed", "reasons")}}
        )
        with store.translated(self.handle.uri, doing="store the spec and the plan"):
            self._client.log_text(self.handle.run_id, spec_yaml, "spec.yaml")
            self._client.log_text(self.handle.run_id, json.dumps(plan, indent=2), "plan.json")
            _log_new_params(self._client, self.handle.run_id, params)

    def copy_best(self, best_run_id: str) -> None:
        """The best trial's last metrics and parameters (as `best.KEY`); `cost/` metrics are summed over all trials."""
        from mlflow.entities import Metric

        with store.translated(self.handle.uri, doing="copy the best trial's figures to its search"):
            trial = self._client.get_run(best_run_id)
            figures = {key: value for key, value in trial.data.metrics.items() if math.isfinite(value)}
            now_ms = time.time_ns() // 1_000_000
            # All at step 0: MLflow shows the value of the highest step, and a later best trial may have fewer.
            metrics = [Metric(key, value, now_ms, 0) for key, value in (figures | self._costs_of_trials()).items()]
            self._client.log_batch(self.handle.run_id, metrics=metrics, synchronous=True)
            own = self._client.get_run(self.handle.run_id).data.params
            changed = {f"best.{key}": value for key, value in trial.data.params.items() if own.get(key) != value}
            _log_new_params(self._client, self.handle.run_id, changed)
            _set_tags(self._client, self.handle.run_id, {BEST_RUN_TAG: best_run_id})

    def close_run(self, status: RunStatus, *, error: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Set MLflow's status, and the tag `orchestrator.error` when there is a message."""
        extra = dict(tags or {}) | ({} if error is None else {f"{TAG}error": error})
        with store.translated(self.handle.uri, doing="close the run"):
            _set_tags(self._client, self.handle.run_id, extra)
            self._client.set_terminated(self.handle.run_id, status=status.upper())

    def _costs_of_trials(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for run in search_runs(
            self._client, self.handle.experiment_id, f"tags.`{PARENT_TAG}` = '{self.handle.run_id}'"
        ):
            for key, value in run.data.metrics.items():
                if key.startswith("cost/"):
                    totals[key] = totals.get(key, 0.0) + value
        return totals


def open_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> MlflowTracker:
    """Create a run, or open the one of `run_id` again: it is running once more and keeps the parameters it has.

    Raises SpecError for an unusable store, experiment or run id, StorageError when the store does not work.
    """
    uri = store.absolute(uri)
    store.check_store(uri)
    client = store.client(uri)
    all_tags = {**_source_tags(Path.cwd()), **(tags or {})}
    if parent_run_id is not None:
        all_tags[PARENT_TAG] = parent_run_id
    if run_id is None:
        in_experiment = store.experiment_id(client, uri, experiment)
        with store.translated(uri, doing=f"create the run {name!r}"):
            run = client.create_run(in_experiment, run_name=name, tags=_shortened(all_tags))
            run_id = run.info.run_id
    else:
        in_experiment = _reopen(client, uri, run_id, all_tags)
    with store.translated(uri, doing="store the run's parameters"):
        _log_new_params(client, run_id, flatten(params or {}))
    return MlflowTracker(RunHandle(run_id=run_id, experiment_id=in_experiment, uri=uri))


def run_tags(spec: RunSpec, *, data_fingerprint: str | None = None) -> dict[str, str]:
    """The tags that every run carries and `compare` reads."""
    values = {
        "kind": spec.kind,
        "method": spec.method,
        "task": spec.task,
        "name": spec.name,
        "spec_fingerprint": spec.fingerprint(),
        "data_fingerprint": data_fingerprint,
        "quality_metric": spec.quality_metric,
        "role": None if spec.search is None else "search",
        "version": __version__,
    }
    return {f"{TAG}{key}": value for key, value in values.items() if value is not None}


class MetricLog:
    """Rank 0's side: metrics go to an outbox in the run's folder, and from there to MLflow in the background."""

    def __init__(self, handle: RunHandle | None, folder: Path) -> None:
        self._folder = folder / "metrics" / (handle.run_id if handle else "untracked")
        self._outbox = outbox.Outbox(self._folder)
        if handle is not None:
            _write_handle(self._folder, handle)
            self._outbox.start(_Sender(handle))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of an optimizer step; never waits for the store. Steps already logged are ignored."""
        self._outbox.append(metrics, step=step)

    def close(self, *, timeout_s: float = 30.0) -> int:
        """Send what is left, for at most `timeout_s`; returns the points still waiting (`flush_outbox` sends them)."""
        waiting = self._outbox.close(timeout_s=timeout_s)
        return waiting if (self._folder / _HANDLE_FILE).exists() else 0


def flush_outbox(folder: Path) -> int:
    """Send what a dead worker left in `folder` (one of `find_outboxes`); returns the number of points sent.

    The driver calls it before it closes a run, since a worker on another machine may not reach a SQLite store.
    Raises StorageError when the store does not take them; they stay where they are.
    """
    if not (folder / _HANDLE_FILE).exists():
        return 0
    handle = RunHandle(**json.loads((folder / _HANDLE_FILE).read_text()))
    send = _Sender(handle)
    if not outbox.count_waiting(folder):
        return 0
    store.check_store(handle.uri)
    return outbox.flush_folder(folder, send)


def find_outboxes(root: Path) -> list[Path]:
    """Folders below `root` with metrics of tracked runs, for `flush_outbox`."""
    return [folder for folder in outbox.find_outboxes(root) if (folder / _HANDLE_FILE).exists()]


def flatten(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b.c: text`; lists as JSON; None left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{path}.")
        elif value is not None:
            flat[path] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def search_runs(client: MlflowClient, experiment_id: str, where: str = "") -> Iterator[Any]:
    """All runs of an experiment that match, page by page."""
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], filter_string=where, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


class _Sender:
    """Gives batches to one run. Connects, and imports mlflow, at the first batch.

    MLflow stores an infinite value as 1.8e308, which flattens every chart it is on: values that are not finite
    become a tag instead, which names the first one.
    """

    def __init__(self, handle: RunHandle) -> None:
        self._handle = handle
        self._client: MlflowClient | None = None

    def __call__(self, batch: Sequence[outbox.Metric]) -> None:
        if self._client is None:
            # A worker on another machine than a SQLite store must not start a second store there.
            self._client = store.client(self._handle.uri, create=False)
        from mlflow.entities import Metric

        finite = [Metric(m.key, m.value, m.timestamp_ms, m.step) for m in batch if math.isfinite(m.value)]
        run_id, client = self._handle.run_id, self._client
        with store.translated(self._handle.uri, doing="take metrics"):
            client.log_batch(run_id, metrics=finite, synchronous=True)
            first = next((m for m in batch if not math.isfinite(m.value)), None)
            if first is not None and NON_FINITE_TAG not in client.get_run(run_id).data.tags:
                client.set_tag(run_id, NON_FINITE_TAG, f"{first.key} is {first.value} at step {first.step}")


def _reopen(client: MlflowClient, uri: str, run_id: str, tags: Mapping[str, str]) -> str:
    """Set an existing run running again; returns its experiment's id."""
    from mlflow.exceptions import MlflowException

    with store.translated(uri, doing=f"open the run {run_id} again"):
        try:
            run = client.get_run(run_id)
        except MlflowException as exc:
            if exc.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            raise SpecError(
                "the run to go on with is not in the MLflow store, or was deleted there",
                got=f"run {run_id} in {store.redacted(uri)}",
                do="set tracking.uri to the store the run was started with, or give the run another name",
            )
        client.update_run(run_id, status="RUNNING")
        # What the first attempt ended with is not true of this one.
        for stale in (f"{TAG}error", STOP_REASON_TAG):
            if stale in run.data.tags:
                client.delete_tag(run_id, stale)
        _set_tags(client, run_id, tags)
    return str(run.info.experiment_id)


def _log_new_params(client: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Log the parameters the run lacks; MLflow refuses to change one, and a resumed run may differ in some."""
    from mlflow.entities import Param

    if not params:
        return
    known = client.get_run(run_id).data.params
    new = iter([Param(key, _cut(value, LONGEST_PARAM)) for key, value in params.items() if key not in known])
    while batch := list(islice(new, PARAMS_PER_BATCH)):
        client.log_batch(run_id, params=batch, synchronous=True)


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    if tags:
        batch = [RunTag(key, value) for key, value in _shortened(tags).items()]
        client.log_batch(run_id, tags=batch, synchronous=True)


def _shortened(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value, LONGEST_TAG) for key, value in tags.items()}


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _source_tags(folder: Path) -> dict[str, str]:
    """Who started the run and from which revision; the revision is left out when `folder` is no git checkout."""
    tags = {"mlflow.source.name": "orchestrator"}
    with suppress(KeyError, OSError):  # a container may run under a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
    changes = _git(folder, "status", "--porcelain")
    if changes is not None:
        tags[f"{TAG}git_dirty"] = "true" if changes else "false"
    return tags


def _git(folder: Path, *command: str) -> str | None:
    """A git command's output; None without git, outside a checkout, or when it takes over 5 s."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _write_handle(folder: Path, handle: RunHandle) -> None:
    """Lets `flush_outbox` find the run later. Only the owner may read it: a database URI may hold a password."""
    path = folder / _HANDLE_FILE
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w") as stream:
            json.dump(asdict(handle), stream)
    except OSError as exc:
        raise StorageError("the run's folder cannot be written", got=f"{folder}: {exc.strerror}") from exc
