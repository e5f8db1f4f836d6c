"""Spec -> result, on Ray: plan, prepare the data, open the MLflow run, train or search, close. The one place that acts.

What can be refused is refused before Ray starts: `look_ahead` and the checks beside it cost seconds, not a cluster.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from orchestrator import locations
from orchestrator.errors import Interrupted, OrchestratorError, StorageError
from orchestrator.planning.plan import check_samples, plan_to_run
from orchestrator.planning.run_plan import ClusterShape, RunPlan
from orchestrator.quantities import Budget, parse_budget
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.run_folder import (
    RESULT,
    SHARED,
    check_bucket_of,
    check_storage,
    exchanged_at,
    forget,
    ledger_folder,
    make_folder,
    run_folder_of,
    shared,
    take_up,
)
from orchestrator.scheduling.session import expected_shape, placement_groups_given_back, ray_session
from orchestrator.scheduling.tokenize import encode_on_ray
from orchestrator.scheduling.train_run import TrainingResult, run_training
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec
from orchestrator.tracking import desired
from orchestrator.tracking.description import described
from orchestrator.tracking.desired import HANDLE, OUTBOX, driving, find_runs
from orchestrator.tracking.finished_model import with_base_found
from orchestrator.tracking.mlflow_run import STOP_REASON_TAG, TAG
from orchestrator.tracking.store import check_uri
from orchestrator.tracking.sync import flush, flush_left_behind
from orchestrator.tracking.tracker import LAST_PASS_S, NoTracker, Tracker, note_attempt, note_recovery, open_run
from orchestrator.training.attempts import ATTEMPTS
from orchestrator.training.bucket import PATIENCE_S
from orchestrator.training.exchange import Exchange, following
from orchestrator.training.job import Outcome, TrainingJob
from orchestrator.training.ledger import LEDGER, Ledger, with_ledger
from orchestrator.training.prepare import EncodeMany, PreparedData, find_prepared, prepare
from orchestrator.training.tokenization import Chunk
from orchestrator.whole_file import write_json

T = TypeVar("T")

_ONLY_MEMBER = "run"
"""Name in its ledger of a training that is not part of a search."""
_LAST_PASS_INTERRUPTED_S = 5.0
"""How long MLflow may take what is left of a run that was asked to stop: the whole of a stop takes 10 s at most."""


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
    if data is None or fresh:
        check_bucket_of(spec)
    elif (earlier := answered_earlier(run_folder_of(spec, data), spec, listener)) is not None:
        return earlier
    if spec.tracking.enabled:
        check_uri(tracking_uri(spec))
    with ray_session() as cluster, placement_groups_given_back():
        listener.connected()
        check_stop(listener)
        if spec.search is not None:
            from orchestrator.scheduling.search import run_search

            return run_search(spec, cluster, listener, fresh=fresh)
        plan_to_run(spec, cluster)  # refuses what the cluster cannot do before any data is read
        prepared = prepare_run(spec, cluster, listener)
        if fresh:
            forget(spec, prepared.run_folder)
        check_stop(listener)
        unasked = data is None and not fresh
        earlier = answered_earlier(prepared.run_folder, spec, listener) if unasked else None
        return earlier or _train(prepared, listener)


def answered_earlier(folder: Path, spec: RunSpec, listener: Listener) -> RunResult | None:
    """What a training answered that is over, here or on another machine."""
    answer = finished_earlier(folder, spec, listener)
    if answer is None:
        check_bucket_of(spec)
        take_up(spec, folder)
        answer = finished_earlier(folder, spec, listener)
    return answer


def look_ahead(spec: RunSpec) -> PreparedData | None:
    """Refuses plans and data that cannot work, those of a search's trials too; gives the data if it is encoded already.

    Raises what `plan_to_run` and `prepare` raise.
    """
    cluster, cache = expected_shape(), locations.home() / "cache" / "data"
    found: dict[str, PreparedData | None] = {}
    for one in (spec, *(() if spec.search is None else (trial.spec for trial in trials(spec)))):
        if cluster is None:
            check_samples(one)
        else:
            plan_to_run(one, cluster)
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
    plan = plan_to_run(spec, cluster, counts=data.counts)
    return Prepared(spec=spec, plan=plan, data=data, run_folder=run_folder_of(spec, data))


def _until_stopped(listener: Listener) -> EncodeMany:
    """`encode_on_ray` that a wish to stop ends between two chunks."""

    def encode(function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        for encoded in encode_on_ray(function, chunks):
            check_stop(listener)
            yield encoded

    return encode


def _train(prepared: Prepared, listener: Listener) -> RunResult:
    folder = prepared.run_folder
    with tracked(prepared, listener) as tracker:
        exchange = shared(prepared.spec, folder)
        exchange.send(f"{OUTBOX}/{HANDLE}")
        job = TrainingJob(
            spec=with_ledger(prepared.spec, ledger_folder(folder), member=_ONLY_MEMBER),
            plan=prepared.plan,
            data=prepared.data,
            run_folder=folder,
            exchanged_at=exchanged_at(prepared.spec, folder),
        )
        listener.say("starting workers")
        result = _trained(job, exchange, listener)
        tracker.tag({f"{TAG}restarts": str(result.restarts)})
        outcome = result.outcome
        if outcome.status == "interrupted":
            raise Interrupted(
                f"stopped at step {outcome.step} of {outcome.steps}, with a checkpoint",
                got=outcome.checkpoint,
                do="the same command goes on from there",
            )
        answer = _result(folder, outcome, restarts=result.restarts)
        end_run(tracker, answer)
        keep_result(answer, prepared.spec)
        exchange.send(RESULT)
    return shipped(answer, tracker)


def _trained(job: TrainingJob, exchange: Exchange, listener: Listener) -> TrainingResult:
    """The training's end; whatever it was, all of its time is on the budget, and MLflow knows each attempt."""
    folder, flops = job.run_folder, 0.0
    watcher = replace(
        listener.watcher,
        on_attempt=lambda number, text: note_attempt(folder, number, text),
        on_recovery=lambda step, totals: note_recovery(folder, totals, step=step),
    )
    try:
        with following(exchange, fetch=(ATTEMPTS, OUTBOX)):
            result = run_training(
                job, watcher, planner=lambda room, kept: plan_to_run(job.spec, room, counts=job.data.counts, kept=kept)
            )
        flops = result.outcome.metrics.get("cost/flops", 0.0)
        exchange.fetch(*SHARED, patience_s=PATIENCE_S)
    except BaseException:
        with suppress(StorageError):  # what ended the training is told, not this
            exchange.fetch(OUTBOX, LEDGER)
        raise
    finally:
        Ledger(ledger_folder(folder)).settle(_ONLY_MEMBER, job.plan, flops=flops)
        with suppress(StorageError):  # it is kept here; only a driver elsewhere would count less as spent
            exchange.send(LEDGER)
    return result


@contextmanager
def tracked(prepared: Prepared, listener: Listener) -> Iterator[Tracker]:
    """The MLflow run of a training or a search, which says how the body ended, if not at once then later.

    A body that raises nothing ends the run itself. Raises ClusterError when another command drives the run.
    """
    folder = prepared.run_folder
    make_folder(folder)
    with driving(folder):
        tracker = _opened(prepared, listener)
        listener.opened(folder, tracker.run_id)
        try:
            yield tracker
        except BaseException as error:
            try:
                _say_how_it_failed(tracker, error, listener)
            except StorageError as unsaid:
                listener.say(f"MLflow is not told how the run ended: {unsaid.what} ({unsaid.got})")
            listener.opened(folder, tracker.run_id)
            raise


def _say_how_it_failed(tracker: Tracker, error: BaseException, listener: Listener) -> None:
    patience_s = _LAST_PASS_INTERRUPTED_S
    if isinstance(error, Interrupted):
        tracker.end_run("killed", tags={STOP_REASON_TAG: "interrupted"})
    elif isinstance(error, OrchestratorError):
        tracker.end_run("failed", error=str(error))
        patience_s = LAST_PASS_S
    else:
        tracker.end_run("killed", error="the driver was ended")
    shipment = tracker.ship(patience_s=patience_s)
    if shipment is not None and (note := shipment.note()):
        listener.say(note)


def _opened(prepared: Prepared, listener: Listener) -> Tracker:
    """The MLflow run of a run folder: a new one, or the folder's own, which has not ended any more."""
    spec, folder = prepared.spec, prepared.run_folder
    (folder / RESULT).unlink(missing_ok=True)
    if not spec.tracking.enabled:
        return NoTracker()
    tracker = open_run(
        folder,
        uri=tracking_uri(spec),
        experiment=spec.tracking.experiment,
        name=spec.name,
        **what_is_tracked(prepared),
        say=listener.say,
    )
    if tracker.run_id is not None:  # else nor would the store take what earlier runs have left
        threading.Thread(target=_ship_left_behind, args=(folder, listener.say), daemon=True).start()
    return tracker


def what_is_tracked(prepared: Prepared) -> dict[str, Any]:
    """What MLflow shows of a run besides its metrics."""
    return described(
        prepared.spec, prepared.plan, data_fingerprint=prepared.data.fingerprint, run_folder=prepared.run_folder
    )


def _ship_left_behind(run_folder: Path, say: Callable[[str], None]) -> None:
    """Gives MLflow what killed drivers and absent servers left of other runs in the same storage."""
    done = [run.name for run in flush_left_behind(run_folder.parent, but=run_folder) if run.why is None]
    if done:
        say(f"MLflow has now what earlier runs had left for it: {', '.join(done)}")


def remembered_run_id(folder: Path) -> str | None:
    """Its id, if MLflow knows it."""
    run = desired.stored_run(folder)
    return None if run is None else run.run_id


def finished_earlier(folder: Path, spec: RunSpec, listener: Listener) -> RunResult | None:
    """What a training or a search answered that is over, or that has spent all of a budget which has not grown.

    Tells MLflow what it could not be told before.
    """
    file = folder / RESULT
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
    for note in filter(None, (shipment.note() for shipment in flush(find_runs(folder)))):
        listener.say(note)
    return with_run_ids(result)


def is_spent(budget: Budget | None, spent: Budget) -> bool:
    """Whether a budget leaves nothing where `spent` was not enough. Pure; other units say nothing of each other."""
    return budget is not None and budget.unit == spent.unit and budget.amount <= spent.amount


def keep_result(result: RunResult, spec: RunSpec) -> None:
    """Remembers the result of a training or search in its folder."""
    write_json(Path(result.run_folder) / RESULT, {"result": result.to_dict(), "budget": spec.budget})


def end_run(tracker: Tracker, result: RunResult, *, trials: Sequence[Path] = ()) -> None:
    """Says how a training, or a search with its trials, ended."""
    tags = {f"{TAG}restarts": str(result.restarts), f"{TAG}model_path": str(result.model_path)}
    if result.status == "stopped_by_budget":
        tags[STOP_REASON_TAG] = "budget"
    if result.best is not None:
        tracker.show_best(Path(result.best["run_folder"]), trials)
    tracker.end_run("finished", tags=tags)


def shipped(result: RunResult, tracker: Tracker) -> RunResult:
    """The result with what MLflow calls its run, or how MLflow will get to know it."""
    shipment = tracker.ship()
    note = None if shipment is None else shipment.note()
    return with_run_ids(replace(result, notes=(*result.notes, *([note] if note else []))))


def with_run_ids(result: RunResult) -> RunResult:
    """The result with what MLflow calls its run, and a search's best trial, by now."""
    best = result.best and {**result.best, "mlflow_run_id": remembered_run_id(Path(result.best["run_folder"]))}
    run_id = remembered_run_id(Path(result.run_folder)) or result.mlflow_run_id  # the latter of another machine
    return replace(result, mlflow_run_id=run_id, best=best)


def tracking_uri(spec: RunSpec) -> str:
    """The store of a spec, or the default one."""
    return spec.tracking.uri or locations.default_tracking_uri()


def _result(folder: Path, outcome: Outcome, *, restarts: int) -> RunResult:
    return RunResult(
        status=outcome.status,
        mlflow_run_id=remembered_run_id(folder),
        checkpoint=outcome.checkpoint,
        model_path=outcome.model_path,
        metrics=outcome.metrics,
        restarts=restarts,
        run_folder=str(folder),
        notes=outcome.notes,
    )
