"""Spec -> result, on Ray: plan, prepare the data, open the MLflow run, train or search, close. The one place that acts.

What can be refused is refused before Ray starts: `look_ahead` and the checks beside it cost seconds, not a cluster.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from orchestrator import locations
from orchestrator.errors import Interrupted, OrchestratorError, SpecError, StorageError
from orchestrator.planning.plan import check_samples, make_plan
from orchestrator.planning.run_plan import ClusterShape, RunPlan
from orchestrator.quantities import Budget, parse_budget
from orchestrator.scheduling.session import expected_shape, placement_groups_given_back, ray_session
from orchestrator.scheduling.tokenize import encode_on_ray
from orchestrator.scheduling.train_run import TrainingResult, Watcher, run_training
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec
from orchestrator.tracking.finished_model import with_base_found
from orchestrator.tracking.store import check_store
from orchestrator.tracking.tracker import (
    STOP_REASON_TAG,
    MlflowTracker,
    NoTracker,
    RunHandle,
    Tracker,
    find_outboxes,
    flush_outbox,
    open_run,
    run_tags,
)
from orchestrator.training.job import Outcome, TrainingJob
from orchestrator.training.ledger import Ledger, with_ledger
from orchestrator.training.prepare import EncodeMany, PreparedData, find_prepared, prepare
from orchestrator.training.tokenization import Chunk

T = TypeVar("T")

_RESULT = "result.json"
"""In a run folder: what the run answered, and its budget; it is over, or over until it is given a larger budget."""
CLOSED = "closed"
"""In a run folder: its MLflow run says how it ended."""
_LEDGER = "ledger"
"""In a run folder: what was spent of its budget."""
_ONLY_MEMBER = "run"
"""Name in its ledger of a training that is not part of a search."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What `orchestrator run` answers; the fields are a contract."""

    status: str
    """`finished`, `stopped_by_budget` or `failed`."""
    mlflow_run_id: str | None
    checkpoint: str | None
    model_path: str | None
    metrics: dict[str, float]
    restarts: int
    run_folder: str
    notes: tuple[str, ...] = ()
    best: dict[str, Any] | None = field(default=None)
    """The best trial of a search: its overrides, MLflow run and folder."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Listener:
    """What a face shows while a run goes on."""

    watcher: Watcher
    say: Callable[[str], None]
    """Shows one line about a phase."""
    connected: Callable[[], None] = lambda: None
    """Called once Ray is up, which replaces the process's SIGTERM handler."""
    opened: Callable[[Path, str | None], None] = lambda run_folder, mlflow_run_id: None
    """Called with the run's folder and its MLflow run, if it is tracked, once they are there."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A spec that has met its data and its cluster."""

    spec: RunSpec
    plan: RunPlan
    data: PreparedData
    run_folder: Path


def launch(spec: RunSpec, listener: Listener, *, fresh: bool = False) -> RunResult:
    """Runs a training or a search to its end; the same spec again goes on where it was, or reports what it gave.

    `fresh` forgets an earlier run of this spec. Raises Interrupted when asked to stop, and whatever the run raised;
    its MLflow run is closed truthfully in either case.
    """
    spec = with_base_found(spec)
    check_storage(spec)
    data = look_ahead(spec)
    if data is not None and not fresh:
        earlier = finished_earlier(run_folder_of(spec, data), spec, listener)
        if earlier is not None:
            return earlier
    if spec.tracking.enabled:
        check_store(tracking_uri(spec))
    with ray_session() as cluster, placement_groups_given_back():
        listener.connected()
        check_stop(listener)
        if spec.search is not None:
            from orchestrator.scheduling.search import run_search

            return run_search(spec, cluster, listener, fresh=fresh)
        make_plan(spec, cluster)  # refuses what the cluster cannot do before any data is read
        prepared = prepare_run(spec, cluster, listener)
        if fresh:
            forget(prepared.run_folder)
        check_stop(listener)
        return finished_earlier(prepared.run_folder, spec, listener) or _train(prepared, listener)


def look_ahead(spec: RunSpec) -> PreparedData | None:
    """Refuses plans and data that cannot work, those of a search's trials too; gives the data if it is encoded already.

    Raises what `make_plan` and `prepare` raise.
    """
    cluster, cache = expected_shape(), locations.home() / "cache" / "data"
    found: dict[str, PreparedData | None] = {}
    for one in (spec, *(() if spec.search is None else (trial.spec for trial in trials(spec)))):
        if cluster is None:
            check_samples(one)
        else:
            make_plan(one, cluster)
        key = one.model_dump_json(include={"data": True, "model": True, "task": True, "training": {"seed"}})
        if key not in found:
            found[key] = find_prepared(one, cache=cache)
    return next(iter(found.values()))


def check_stop(listener: Listener) -> None:
    """Raises Interrupted when the user asked to stop before there was anything to save."""
    if listener.watcher.stop.is_set():
        raise Interrupted("stopped before the training began", do="the same command starts it")


def prepare_run(spec: RunSpec, cluster: ClusterShape, listener: Listener) -> Prepared:
    """Data from the cache or tokenised on the cluster, and the plan that has met it."""
    listener.say("preparing data")
    cache = locations.home() / "cache" / "data"
    data = prepare(spec, cache=cache, encode=_until_stopped(listener))
    plan = make_plan(spec, cluster, counts=data.counts)
    return Prepared(spec=spec, plan=plan, data=data, run_folder=run_folder_of(spec, data))


def _until_stopped(listener: Listener) -> EncodeMany:
    """`encode_on_ray` that a wish to stop ends between two chunks."""

    def encode(function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        for encoded in encode_on_ray(function, chunks):
            check_stop(listener)
            yield encoded

    return encode


def run_folder_of(spec: RunSpec, data: PreparedData) -> Path:
    """The folder of a run: the same for the same spec on the same data."""
    identity = hashlib.sha256(f"{spec.fingerprint()} {data.fingerprint}".encode()).hexdigest()[:8]
    storage = (
        Path(spec.checkpoint.storage).expanduser().absolute() if spec.checkpoint.storage else locations.home() / "runs"
    )
    return storage / f"{spec.name}-{identity}"


def _train(prepared: Prepared, listener: Listener) -> RunResult:
    make_folder(prepared.run_folder)
    tracker = open_tracker(prepared, prepared.run_folder)
    handle = tracker.handle
    listener.opened(prepared.run_folder, None if handle is None else handle.run_id)
    job = TrainingJob(
        spec=with_ledger(prepared.spec, ledger_folder(prepared.run_folder), member=_ONLY_MEMBER),
        plan=prepared.plan,
        data=prepared.data,
        run_folder=prepared.run_folder,
        handle=handle,
    )
    listener.say("starting workers")
    try:
        result = _trained(job, listener)
    except Interrupted:
        tracker.close_run("killed", tags={STOP_REASON_TAG: "interrupted"})
        raise
    except OrchestratorError as error:
        with suppress(OSError, OrchestratorError):  # the disk that failed the run fails this too; the points stay
            flush(prepared.run_folder)
        tracker.close_run("failed", error=str(error))
        raise
    except BaseException:
        tracker.close_run("killed", error="the driver was ended")
        raise
    outcome = result.outcome
    if outcome.status == "interrupted":
        flush(prepared.run_folder)
        tracker.close_run(
            "killed", tags={**_run_tags(prepared.run_folder, result.restarts), STOP_REASON_TAG: "interrupted"}
        )
        raise Interrupted(
            f"stopped at step {outcome.step} of {outcome.steps}, with a checkpoint",
            got=outcome.checkpoint,
            do="the same command goes on from there",
        )
    answer = _result(prepared.run_folder, outcome, handle=handle, restarts=result.restarts)
    keep_result(answer, prepared.spec)
    close_ended(answer, tracker)
    return answer


def _trained(job: TrainingJob, listener: Listener) -> TrainingResult:
    """The training's end; whatever it was, all of its time is on the budget."""
    flops = 0.0
    try:
        result = run_training(job, listener.watcher)
        flops = result.outcome.metrics.get("cost/flops", 0.0)
    finally:
        Ledger(ledger_folder(job.run_folder)).settle(_ONLY_MEMBER, job.plan, flops=flops)
    return result


def ledger_folder(run_folder: Path) -> Path:
    """Where a training, or a search for all its trials, keeps what was spent of its budget."""
    return run_folder / _LEDGER


def open_tracker(prepared: Prepared, folder: Path, *, parent_run_id: str | None = None) -> MlflowTracker | NoTracker:
    """The MLflow run of a run folder: a new one, or the one the folder remembers, which has not ended any more."""
    spec = prepared.spec
    for name in (CLOSED, _RESULT):
        (folder / name).unlink(missing_ok=True)
    if not spec.tracking.enabled:
        return NoTracker()
    tracker = open_run(
        tracking_uri(spec),
        spec.tracking.experiment,
        spec.name if parent_run_id is None else folder.name,
        run_id=remembered_run_id(folder),
        parent_run_id=parent_run_id,
        tags=run_tags(spec, data_fingerprint=prepared.data.fingerprint),
    )
    assert tracker.handle is not None
    (folder / "mlflow.json").write_text(json.dumps(asdict(tracker.handle)))
    tracker.log_spec_and_plan(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False), prepared.plan.to_dict())
    return tracker


def flush(run_folder: Path) -> None:
    """Ships metrics that dead workers, or workers that do not reach the store, left in a run's folder."""
    for outbox in find_outboxes(run_folder):
        flush_outbox(outbox)


def remembered_handle(folder: Path) -> RunHandle | None:
    """The MLflow run that a run folder belongs to, if it was tracked."""
    file = folder / "mlflow.json"
    return RunHandle(**json.loads(file.read_text())) if file.is_file() else None


def remembered_run_id(folder: Path) -> str | None:
    """Its id."""
    handle = remembered_handle(folder)
    return None if handle is None else handle.run_id


def finished_earlier(folder: Path, spec: RunSpec, listener: Listener) -> RunResult | None:
    """What a training or a search answered that is over, or that has spent all of a budget which has not grown.

    Ends its MLflow run where an earlier driver was killed before that.
    """
    file = folder / _RESULT
    if not file.is_file():
        return None
    value = json.loads(file.read_text())
    result = RunResult(**{**value["result"], "notes": tuple(value["result"]["notes"])})
    if result.status == "stopped_by_budget":
        if not is_spent(spec.parsed_budget, parse_budget(value["budget"])):
            return None
        listener.say(f"this run has spent its budget of {value['budget']}; with a larger one it goes on")
    else:
        listener.say("this run is already finished; --fresh starts over, training.seed=N makes another")
    handle = remembered_handle(folder)
    if handle is not None and not (folder / CLOSED).exists():
        close_ended(result, MlflowTracker(handle))
    return result


def is_spent(budget: Budget | None, spent: Budget) -> bool:
    """Whether a budget leaves nothing where `spent` was not enough. Pure; other units say nothing of each other."""
    return budget is not None and budget.unit == spent.unit and budget.amount <= spent.amount


def keep_result(result: RunResult, spec: RunSpec) -> None:
    """Remembers the result of a training or search in its folder."""
    file = Path(result.run_folder) / _RESULT
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"result": result.to_dict(), "budget": spec.budget}, indent=1))
    temporary.rename(file)


def close_ended(result: RunResult, tracker: Tracker) -> None:
    """Says on the MLflow run of a training or a search how it ended; may be repeated."""
    folder = Path(result.run_folder)
    flush(folder)
    tags = {**_run_tags(folder, result.restarts), "orchestrator.model_path": str(result.model_path)}
    if result.status == "stopped_by_budget":
        tags[STOP_REASON_TAG] = "budget"
    if result.best is not None and result.best["mlflow_run_id"]:
        tracker.copy_best(result.best["mlflow_run_id"])
    tracker.close_run("finished", tags=tags)
    (folder / CLOSED).touch()


def _run_tags(folder: Path, restarts: int) -> dict[str, str]:
    return {"orchestrator.restarts": str(restarts), "orchestrator.run_folder": str(folder)}


def tracking_uri(spec: RunSpec) -> str:
    """The store of a spec, or the default one."""
    return spec.tracking.uri or locations.default_tracking_uri()


def check_storage(spec: RunSpec) -> None:
    """Refuses a storage folder that is a file; raises SpecError."""
    storage = spec.checkpoint.storage
    if storage is not None and Path(storage).expanduser().is_file():
        raise SpecError("checkpoint.storage is a file", got=storage, do="give a folder, new or existing")


def make_folder(folder: Path) -> None:
    """Creates a run folder; raises StorageError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "the run's folder cannot be created", got=f"{folder} ({error.strerror})", do="set checkpoint.storage"
        ) from error


def forget(folder: Path) -> None:
    """Removes an earlier run's folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _result(folder: Path, outcome: Outcome, *, handle: RunHandle | None, restarts: int) -> RunResult:
    return RunResult(
        status=outcome.status,
        mlflow_run_id=None if handle is None else handle.run_id,
        checkpoint=outcome.checkpoint,
        model_path=outcome.model_path,
        metrics=outcome.metrics,
        restarts=restarts,
        run_folder=str(folder),
        notes=outcome.notes,
    )
