"""What trainings, searches and rehearsals have in common between spec and result: their data and plan, their MLflow
run, and how they end. Nothing here trains."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from orchestrator import locations
from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import Interrupted, OrchestratorError, StorageError
from orchestrator.method_names import EVALUATE
from orchestrator.methods.registry import method_of
from orchestrator.planning.plan import about_length
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import ClusterShape, RunPlan
from orchestrator.quantities import Budget, parse_budget
from orchestrator.ranking import Goal
from orchestrator.samples.forms.base import EncodeMany
from orchestrator.samples.prepare import PreparedData, prepare
from orchestrator.samples.tokenization import Chunk
from orchestrator.scheduling.attempt import Watcher
from orchestrator.scheduling.installations import ask_nodes_what_they_have, needs_of
from orchestrator.scheduling.run_folder import (
    RESULT,
    check_bucket_of,
    make_folder,
    model_for_all,
    run_folder_of,
    take_up,
)
from orchestrator.scheduling.tokenize import encode_on_ray
from orchestrator.scheduling.unfinished import keep_identity, note_on_unfinished
from orchestrator.spec import RunSpec
from orchestrator.tracking import run_record
from orchestrator.tracking.description import described
from orchestrator.tracking.mlflow_backend import STOP_REASON_TAG, TAG
from orchestrator.tracking.reconcile import flush, flush_left_behind
from orchestrator.tracking.run_record import Description, driving, find_runs
from orchestrator.tracking.tracker import LAST_PASS_S, NoTracker, Tracker, open_run

T = TypeVar("T")


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
    evaluation: dict[str, Any] | None = field(default=None)
    """Of a model that was measured, what was found beyond the metrics: rows, and for classes each by itself."""
    stages: tuple[dict[str, Any], ...] | None = field(default=None)
    """Of a run of stages, what each that was begun has answered, with its name and cycle."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Listener:
    """What a face shows while a run goes on."""

    watcher: Watcher
    say: Callable[[str], None]
    """Shows one line about a phase."""
    connecting: Callable[[], None] = lambda: None
    """Called before Ray starts: from here on a stop has something to save or to clear away."""
    connected: Callable[[], None] = lambda: None
    """Called once Ray is up, which replaces the process's SIGTERM handler."""
    opened: Callable[[Path, str | None], None] = lambda run_folder, mlflow_run_id: None
    """Called with the run's folder and its MLflow run, if it is tracked, once they are there."""


@dataclass(frozen=True, kw_only=True)
class PartOf:
    """What a training is a stage of."""

    run_folder: Path
    """Of the whole, whose MLflow run it lies below."""
    tags: Mapping[str, str]
    """What MLflow shows of its place in the whole."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A spec that has met its data and its cluster."""

    spec: RunSpec
    plan: RunPlan
    data: PreparedData
    run_folder: Path
    part_of: PartOf | None = None


def answered_earlier(folder: Path, spec: RunSpec, listener: Listener) -> RunResult | None:
    """What a training answered that is over, here or on another machine."""
    answer = finished_earlier(folder, spec, listener)
    if answer is None:
        check_bucket_of(spec)
        take_up(spec, folder)
        answer = finished_earlier(folder, spec, listener)
    return answer


def check_stop(listener: Listener) -> None:
    """Raises Interrupted when the user asked to stop before there was anything to save."""
    if listener.watcher.stop.is_set():
        raise Interrupted("stopped before the training began", do="the same command starts it")


def prepare_run(spec: RunSpec, cluster: ClusterShape, listener: Listener) -> Prepared:
    """Data from the cache or tokenised on the cluster, and the plan that has met it."""
    listener.say("preparing data")
    nodes = ask_nodes_what_they_have()
    cache = locations.data_cache()
    data = prepare(spec, cache=cache, encode=_until_stopped(listener), pause=functools.partial(check_stop, listener))
    say_held_out(data, listener)
    plan = plan_to_run(spec, cluster, counts=data.counts)
    for line in about_length(spec, data.counts):
        listener.say(line)
    if nodes is not None:
        nodes.refuse_unfit(needs_of(spec, plan, data))
    return Prepared(spec=spec, plan=plan, data=data, run_folder=run_folder_of(spec, data))


def say_held_out(data: PreparedData, listener: Listener) -> None:
    """Tells which columns were chosen, what a run is measured on, and where that is not what was asked."""
    for line in (*data.notes, data.held_out.sentence(), *data.held_out.notes):
        listener.say(line)
    if (general := data.retained) is not None:
        for line in (*general.notes, general.held_out.sentence(), *general.held_out.notes):
            listener.say(f"general data: {line}")


def _until_stopped(listener: Listener) -> EncodeMany:
    """`encode_on_ray` that a wish to stop ends within a second."""

    def encode(function: Callable[[Chunk], T], chunks: Iterable[Chunk]) -> Iterator[T]:
        return encode_on_ray(function, chunks, pause=functools.partial(check_stop, listener))

    return encode


@contextmanager
def tracked(prepared: Prepared, listener: Listener) -> Iterator[Tracker]:
    """The MLflow run of a training or a search, which says how the body ended, if not at once then later.

    A body that raises nothing ends the run itself. Raises ClusterError when another command drives the run.
    """
    folder = prepared.run_folder
    if (note := note_on_unfinished(prepared.spec, folder)) is not None:
        listener.say(f"note: {note}")
    make_folder(folder)
    with driving(folder):
        keep_identity(prepared.spec, folder)
        with told_of_its_end(_opened(prepared, listener), folder, listener) as tracker:
            yield tracker


@contextmanager
def told_of_its_end(tracker: Tracker, folder: Path, listener: Listener) -> Iterator[Tracker]:
    """Tells the listener of the MLflow run of a folder, and MLflow how the body failed, if it does."""
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
    parent = None if prepared.part_of is None else prepared.part_of.run_folder
    tracker = opened(spec, folder, name=spec.name, what=what_is_tracked(prepared), listener=listener, parent=parent)
    if tracker.run_id is not None:  # else nor would the store take what earlier runs have left
        threading.Thread(target=_ship_left_behind, args=(folder, listener.say), daemon=True).start()
    return tracker


def opened(
    spec: RunSpec, folder: Path, *, name: str, what: Description, listener: Listener, parent: Path | None = None
) -> Tracker:
    """The MLflow run of a folder where the spec's runs are tracked, below that of a folder `parent` if one is given."""
    if not spec.tracking.enabled:
        return NoTracker()
    uri, experiment = tracking_uri(spec), spec.tracking.experiment
    return open_run(folder, uri=uri, experiment=experiment, name=name, what=what, parent=parent, say=listener.say)


def what_is_tracked(prepared: Prepared, goal: Goal | None = None) -> Description:
    """What MLflow shows of a run besides its metrics; `goal` is that of the search that a trial belongs to."""
    what = described(
        prepared.spec,
        prepared.plan,
        data_fingerprint=prepared.data.fingerprint,
        held_out=prepared.data.held_out,
        tokenizer_fingerprint=prepared.data.tokenizer_fingerprint,
        run_folder=prepared.run_folder,
        goal=goal,
    )
    tags = {} if prepared.part_of is None else prepared.part_of.tags
    model = prepared.spec.model
    if prepared.spec.kind == EVALUATE and (run_id := remembered_run_id(Path(model.adapter or str(model.base)).parent)):
        tags = {**tags, f"{TAG}base_run_id": run_id}
    return replace(what, tags={**what.tags, **tags})


def _ship_left_behind(run_folder: Path, say: Callable[[str], None]) -> None:
    """Gives MLflow what killed drivers and absent servers left of other runs in the same storage."""
    done = [run.name for run in flush_left_behind(run_folder.parent, but=run_folder) if run.why is None]
    if done:
        say(f"MLflow has now what earlier runs had left for it: {', '.join(done)}")


def remembered_run_id(folder: Path) -> str | None:
    """Its id, if MLflow knows it."""
    run = run_record.stored_run(folder)
    return None if run is None else run.run_id


def finished_earlier(folder: Path, spec: RunSpec, listener: Listener) -> RunResult | None:
    """What a training or a search answered that is over, or that has spent all of a budget which has not grown.

    Tells MLflow what it could not be told before.
    """
    value = read_json(folder / RESULT)
    if value is None:
        return None
    result = RunResult(**_moved({**value["result"], "notes": tuple(value["result"]["notes"])}, folder))
    if result.status == "stopped_by_budget":
        if not is_spent(spec.parsed_budget, parse_budget(value["budget"])):
            return None
        listener.say(f"this run has spent its budget of {value['budget']}; with a larger one it goes on")
    else:
        another = ", training.seed=N makes another" if method_of(spec.method).trains else ""
        listener.say(f"this run is already finished; --fresh starts over{another}")
    for note in filter(None, (shipment.note() for shipment in flush(find_runs(folder)))):
        listener.say(note)
    return with_run_ids(result)


def _moved(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A kept result whose paths below the run's folder follow that folder, which may have been moved since."""
    before = result["run_folder"]

    def follow(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: follow(item) for key, item in value.items()}
        if isinstance(value, str) and Path(value).is_relative_to(before):
            return str(folder / Path(value).relative_to(before))
        return value

    return {key: follow(item) for key, item in result.items()}


def is_spent(budget: Budget | None, spent: Budget) -> bool:
    """Whether a budget leaves nothing where `spent` was not enough. Pure; other units say nothing of each other."""
    return budget is not None and budget.unit == spent.unit and budget.amount <= spent.amount


def keep_result(result: RunResult, spec: RunSpec) -> None:
    """Remembers the result of a training or search in its folder."""
    write_json(Path(result.run_folder) / RESULT, {"result": result.to_dict(), "budget": spec.budget})


def end_run(tracker: Tracker, result: RunResult, *, trials: Sequence[Path] = ()) -> None:
    """Says how a training, or a search with its trials, ended."""
    tags = {f"{TAG}restarts": str(result.restarts)}
    if result.model_path is not None:
        tags |= tags_of_model(result.model_path)
    if result.status == "stopped_by_budget":
        tags[STOP_REASON_TAG] = "budget"
    if result.best is not None:
        tracker.show_best(Path(result.best["run_folder"]), trials)
    tracker.end_run("finished", tags=tags)


def tags_of_model(model_path: str) -> dict[str, str]:
    """By which `model.base: runs:/ID` finds a model, on this machine and on others."""
    return {f"{TAG}model_path": model_path, f"{TAG}model_uri": model_for_all(model_path, Path(model_path).parent)}


def shipped(result: RunResult, tracker: Tracker) -> RunResult:
    """The result with what MLflow calls its run, or how MLflow will get to know it."""
    shipment = tracker.ship()
    note = None if shipment is None else shipment.note()
    return with_run_ids(replace(result, notes=(*result.notes, *([note] if note else []))))


def with_run_ids(result: RunResult) -> RunResult:
    """The result with what MLflow calls its run, and a search's best trial, by now."""
    best, run_id = result.best, remembered_run_id(Path(result.run_folder))
    if best is not None:
        known = remembered_run_id(Path(best["run_folder"])) or best["mlflow_run_id"]  # the latter of another machine
        best = {**best, "mlflow_run_id": known}
    run_id = run_id or result.mlflow_run_id
    return replace(result, mlflow_run_id=run_id, best=best)


def tracking_uri(spec: RunSpec) -> str:
    """The store of a spec, or the default one."""
    return spec.tracking.uri or locations.default_tracking_uri()
