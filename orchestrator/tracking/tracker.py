"""One MLflow run per training, through restarts and absent servers. Nobody here waits for MLflow.

Driver:

    tracker = open_run(folder, uri=..., experiment=..., name=..., what=Description(tags=run_tags(spec)), say=print)
    tracker.end_run("finished")
    tracker.ship()

Worker of rank 0, which only writes to the run's folder:

    metrics = MetricLog(folder, attempt=2, resumed_from=30, holds=fence.holds)
    metrics.log(step, {"train/loss": 2.31})
    metrics.close()

What they want to say lies in the run's folder (`run_record`, `outbox`), and a thread of the driver gives it to MLflow
as soon as that takes it (`reconcile`). `NoTracker` stands in when tracking is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from orchestrator.credentials import hide
from orchestrator.errors import UserError
from orchestrator.tracking import outbox, run_record, store
from orchestrator.tracking.description import flatten, source_tags
from orchestrator.tracking.mlflow_backend import ERROR_TAG, MODEL_STEP_TAG, STOP_REASON_TAG, TAG
from orchestrator.tracking.reconcile import Shipment, Shipper
from orchestrator.tracking.run_record import OUTBOX, Description, DesiredRun, RunHandle

POINTS = f"{OUTBOX}/{outbox.POINTS_FILES}"
"""In a run folder: the points of all attempts."""

RunStatus = Literal["finished", "failed", "killed"]

NOTHING = Description()
FIRST_PASS_S = 10.0
"""How long the start of a command waits for MLflow at most (a new SQLite store takes 3 to 5 s); one that does not
answer is noticed sooner."""
LAST_PASS_S = 30.0
"""How long the end of a command waits while MLflow takes what is left (about 200,000 points at 6,870 a second)."""


TEST_FILE = "test.json"
"""What a model gave on its test set, in its run's folder and among the artifacts."""


class Tracker(Protocol):
    """The driver's view of one run."""

    @property
    def handle(self) -> RunHandle | None:
        """What rank 0 logs to; None logs to the run's folder only."""

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, once MLflow knows it."""

    def open_trial(self, folder: Path, *, name: str, what: Description = NOTHING) -> Tracker:
        """The run of a trial of this search."""

    def left_open(self, folder: Path) -> Tracker | None:
        """The run of a trial that an earlier driver opened and did not end; None where there is no such run."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add to what the run says of itself."""

    def attach(self, name: str, text: str) -> None:
        """Add a text file to the run's artifacts."""

    def show_best(self, best: Path, trials: Sequence[Path]) -> None:
        """Show the best trial's figures on this run, a search, when it ends."""

    def show_model(
        self, metrics: Mapping[str, float], *, step: int, model_step: int | None, at_ms: int | None = None
    ) -> None:
        """Where the model is of an earlier step than the last: show its evaluation as the run's newest. `at_ms` is when
        the training ended, where drivers on two machines may tell of it; None: now."""

    def end_run(
        self,
        status: RunStatus,
        *,
        error: str | None = None,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        """Say how the run ended, and when, if not now; it is shipped in the background."""

    def ship(self, *, patience_s: float = LAST_PASS_S) -> Shipment | None:
        """Send what is left; says what still waits. Called once, last."""


class NoTracker:
    """Tracking is off: results stay in the run's folder."""

    handle: RunHandle | None = None
    run_id: str | None = None

    def open_trial(self, folder: Path, *, name: str, what: Description = NOTHING) -> NoTracker:
        """Nor are the trials of a search tracked."""
        return self

    def left_open(self, folder: Path) -> None:
        """Nothing was opened."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Nothing to tag."""

    def attach(self, name: str, text: str) -> None:
        """Nothing to add it to."""

    def show_best(self, best: Path, trials: Sequence[Path]) -> None:
        """Nothing to show it on."""

    def show_model(
        self, metrics: Mapping[str, float], *, step: int, model_step: int | None, at_ms: int | None = None
    ) -> None:
        """Nothing to show it on."""

    def end_run(
        self,
        status: RunStatus,
        *,
        error: str | None = None,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        """Nothing was opened."""

    def ship(self, *, patience_s: float = LAST_PASS_S) -> None:
        """Nothing to send."""


class MlflowTracker:
    """A run that `open_run` has opened. Its methods raise StorageError when the run's folder cannot be written."""

    def __init__(self, folder: Path, handle: RunHandle, shipper: Shipper) -> None:
        self._folder, self._shipper = folder, shipper
        self.handle = handle

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, once MLflow knows it."""
        run = run_record.stored_run(self._folder)
        return None if run is None else run.run_id

    def open_trial(self, folder: Path, *, name: str, what: Description = NOTHING) -> MlflowTracker:
        """A run nested below this one, shipped with it."""
        parent = os.path.relpath(self._folder, folder)
        uri, experiment = self.handle.uri, self.handle.experiment
        run = _wanted(folder, uri=uri, experiment=experiment, name=name, parent=parent, what=what)
        run_record.put(folder, run)
        run_record.note_handle(folder, run.handle)
        self._shipper.add(folder)
        return MlflowTracker(folder, run.handle, self._shipper)

    def left_open(self, folder: Path) -> MlflowTracker | None:
        """The run of a trial that an earlier driver opened and did not end; None where there is no such run."""
        run = run_record.read(folder)
        self._shipper.add(folder)
        if run is None or run.status != "running":
            return None
        return MlflowTracker(folder, run.handle, self._shipper)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Adds to the run's tags."""
        run_record.change(self._folder, lambda run: run_record.with_tags(run, tags))

    def attach(self, name: str, text: str) -> None:
        """Adds to the run's artifacts."""
        run_record.change(self._folder, lambda run: replace(run, artifacts={**run.artifacts, name: text}))

    def show_best(self, best: Path, trials: Sequence[Path]) -> None:
        """The best trial's last metrics and parameters (as `best.KEY`); `cost/` metrics are summed over all trials."""
        tracked = tuple(os.path.relpath(trial, self._folder) for trial in trials if run_record.read(trial) is not None)
        chosen = os.path.relpath(best, self._folder)
        run_record.change(self._folder, lambda run: replace(run, best=chosen, trials=tracked))

    def show_model(
        self, metrics: Mapping[str, float], *, step: int, model_step: int | None, at_ms: int | None = None
    ) -> None:
        """Its evaluation once more at the last step, after that step's own: MLflow lists the newest point of a run."""
        if model_step is not None:
            self.tag({MODEL_STEP_TAG: str(model_step)})
            figures = {name: value for name, value in metrics.items() if name.startswith("eval/")}
            outbox.note_totals(self._folder / OUTBOX, figures, step=step, at_ms=at_ms)

    def end_run(
        self,
        status: RunStatus,
        *,
        error: str | None = None,
        tags: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        """MLflow's status, and the tag `orchestrator.error` when there is a message."""
        extra = dict(tags or {}) | ({} if error is None else {ERROR_TAG: error})
        ended_ms = run_record.now_ms() if at_ms is None else at_ms
        run_record.change(self._folder, lambda run: run_record.ended(run, status, tags=extra, ended_ms=ended_ms))

    def ship(self, *, patience_s: float = LAST_PASS_S) -> Shipment:
        """Sends what is left, for at most so many seconds; says what still waits, which `flush` sends."""
        return self._shipper.close(patience_s=patience_s)


def open_run(
    folder: Path,
    *,
    uri: str,
    experiment: str,
    name: str,
    what: Description = NOTHING,
    parent: Path | None = None,
    say: Callable[[str], None],
    patience_s: float = FIRST_PASS_S,
) -> MlflowTracker:
    """The run of a folder: a new one, or the folder's own, which is running once more and keeps the parameters it has.

    `parent` is the folder of the run that a new one is nested below. MLflow knows the run when this returns, unless it
    does not answer: then `say` is told, and it will know it later.
    Raises SpecError for an unusable store, experiment or run, StorageError when the folder cannot be written.
    """
    uri = hide(store.absolute(uri))
    store.check_uri(uri)
    store.keep_credentials(uri)
    before = run_record.read(folder)
    above = None if parent is None else os.path.relpath(parent, folder)
    run = _wanted(folder, uri=uri, experiment=experiment, name=name, parent=above, what=what)
    run_record.put(folder, run)
    run_record.note_handle(folder, run.handle)
    shipper = Shipper(folder, say=say)
    try:
        shipper.start(patience_s=patience_s)
    except UserError:
        run_record.put(folder, before)
        raise
    return MlflowTracker(folder, run.handle, shipper)


def note_attempt(folder: Path, number: int, text: str) -> None:
    """Shows on the run of a folder what an attempt was and how it ended; a later text replaces an earlier one.

    May be called from any process that sees the folder; does nothing for a run that is not tracked.
    """
    run_record.change(folder, lambda run: run_record.with_tags(run, {f"{TAG}attempt.{number}": text}))


def note_recovery(folder: Path, totals: Mapping[str, float], *, step: int) -> None:
    """Logs totals so far (fields of `train_run.Recovery`) as metrics `recovery/...` of a run."""
    if run_record.read(folder) is not None:
        outbox.note_totals(folder / OUTBOX, {f"recovery/{key}": total for key, total in totals.items()}, step=step)


def note_test(folder: Path, metrics: Mapping[str, float], *, details: str) -> bool:
    """Shows on the run of a folder, also when it has ended, what its model gave on its test set; `details` become an
    artifact. Whether that is new; nothing is for a run that is not tracked."""
    run = run_record.read(folder)
    if run is None or run.artifacts.get(TEST_FILE) == details:
        return False
    outbox.note_totals(folder / OUTBOX, metrics, step=0)
    run_record.change(folder, lambda run: replace(run, artifacts={**run.artifacts, TEST_FILE: details}))
    return True


class MetricLog:
    """Rank 0's side: metrics go to a points file of this attempt in the run's folder. The driver ships them."""

    def __init__(
        self,
        folder: Path,
        *,
        attempt: int = 1,
        resumed_from: int = 0,
        holds: Callable[[], bool] = lambda: True,
    ) -> None:
        self._folder, self._holds = folder / OUTBOX, holds
        self._points = outbox.Outbox(self._folder, attempt=attempt, resumed_from=resumed_from)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes the metrics of an optimizer step; never waits for the store. Nothing, once a newer attempt exists.

        Raises StorageError when the disk takes no more.
        """
        if self._holds():
            self._points.append(metrics, step=step)

    def rewind(self, step: int) -> None:
        """Training goes on from an earlier step: what was logged beyond it does not count unless it has been sent."""
        self._points.rewind(step)

    def close(self) -> None:
        """Lets go of the file."""
        self._points.close()


def _wanted(
    folder: Path,
    *,
    uri: str,
    experiment: str,
    name: str,
    parent: str | None,
    what: Description,
) -> DesiredRun:
    """A run that is running: a new one, or the folder's own, of which nothing that it ended with is true any more."""
    before = run_record.read(folder)
    if before is None:
        handle = run_record.known_handle(folder, uri=uri) or run_record.new_handle(
            uri=uri, experiment=experiment, name=name, parent=parent
        )
        before = DesiredRun(handle=handle, tags=source_tags(Path.cwd()))
    return replace(
        before,
        handle=replace(before.handle, uri=uri),
        status="running",
        ended_ms=None,
        tags={**before.tags, **what.tags, ERROR_TAG: None, STOP_REASON_TAG: None, MODEL_STEP_TAG: None},
        params={**flatten(what.params), **before.params},
        artifacts={**before.artifacts, **what.artifacts},
        best=None,
        trials=(),
    )
