"""Spec -> result, on Ray: plan, prepare the data, open the MLflow run, train or search, close. The one place that acts.

What can be refused is refused before Ray starts: `look_ahead` and the checks beside it cost seconds, not a cluster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator import locations
from orchestrator.atomic_file import read_json
from orchestrator.errors import CapacityError, Interrupted, StorageError
from orchestrator.methods.as_is import EVALUATION
from orchestrator.methods.registry import method_of
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.base_fit import model_in
from orchestrator.planning.plan import check_samples
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.runs.attempts import ATTEMPTS
from orchestrator.runs.budget_ledger import LEDGER, Ledger, with_ledger
from orchestrator.runs.file_exchange import Exchange, following
from orchestrator.runs.job import BEST, Outcome, TrainingJob, bucket_of
from orchestrator.samples.metric_names import TEST, check_goal
from orchestrator.samples.prepare import PreparedData, find_prepared
from orchestrator.scheduling.capacity import Capacity, capacity_for
from orchestrator.scheduling.decisions.test_set import measuring_spec, shown
from orchestrator.scheduling.run_folder import (
    RESULT,
    SHARED,
    check_bucket_of,
    check_storage,
    forget,
    ledger_folder,
    life_of,
    model_for_all,
    run_folder_of,
    shared,
)
from orchestrator.scheduling.run_lifecycle import (
    Listener,
    PartOf,
    Prepared,
    RunResult,
    answered_earlier,
    check_stop,
    end_run,
    keep_result,
    prepare_run,
    remembered_run_id,
    shipped,
    tracked,
    tracking_uri,
)
from orchestrator.scheduling.run_training import TrainingResult, run_training
from orchestrator.scheduling.session import (
    expected_shape,
    live_shape,
    machines_to_come,
    placement_groups_given_back,
    ray_session,
)
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec
from orchestrator.tracking.finished_model import with_base_found
from orchestrator.tracking.mlflow_backend import TAG
from orchestrator.tracking.reconcile import flush
from orchestrator.tracking.run_record import HANDLE, OUTBOX, check_undriven, find_runs
from orchestrator.tracking.store import check_uri
from orchestrator.tracking.tracker import TEST_FILE, note_attempt, note_recovery, note_test

_LOOK_S = 1.0
"""Between looks whether machines have joined."""
ONLY_MEMBER = "run"
"""Name in its ledger of a training that is not part of a search."""


def launch(spec: RunSpec, listener: Listener, *, fresh: bool = False, part_of: PartOf | None = None) -> RunResult:
    """Runs a training or a search to its end; the same spec again goes on where it was, or reports what it gave.

    `fresh` forgets an earlier run of this spec; `part_of` is what a training is a stage of. Raises Interrupted when
    asked to stop, and whatever the run raised; its MLflow run is closed truthfully in either case.
    """
    spec = with_base_found(spec)
    check_storage(spec)
    folder = look_ahead(spec).run_folder
    if folder is None or fresh:
        check_bucket_of(spec)
    elif (earlier := answered_earlier(folder, spec, listener)) is not None:
        return _tested(spec, earlier, listener, fresh=False)
    if spec.tracking.enabled:
        check_uri(tracking_uri(spec))
    if folder is not None:
        check_undriven(folder)
    with connected_session(listener, spec) as cluster:
        if spec.search is not None:
            from orchestrator.scheduling.search.run_search import run_search

            return _tested(spec, run_search(spec, cluster, listener, fresh=fresh), listener, fresh=fresh)
        prepared = replace(prepare_run(spec, cluster, listener), part_of=part_of)
        if fresh:
            forget(spec, prepared.run_folder)
        check_stop(listener)
        unasked = folder is None and not fresh
        earlier = answered_earlier(prepared.run_folder, spec, listener) if unasked else None
        return _tested(spec, earlier or _train(prepared, listener), listener, fresh=fresh)


def known_result(spec: RunSpec, listener: Listener) -> RunResult | None:
    """What a training that is over has answered; None for one that `launch` would begin or go on with.

    Raises what `launch` raises before Ray starts.
    """
    spec = with_base_found(spec)
    check_storage(spec)
    folder = look_ahead(spec).run_folder
    result = None if folder is None else answered_earlier(folder, spec, listener)
    if result is None or (test := _test_of(spec, result)) is None:
        return result
    measured = known_result(test, listener)
    return None if measured is None else _with_test(result, measured)


def _test_of(spec: RunSpec, result: RunResult) -> RunSpec | None:
    """What measures the model of a run, or of the best trial of a search, on the test set; None where there is none."""
    if spec.data.test is None or result.model_path is None:
        return None
    folder = Path(result.run_folder)
    if result.best is not None:
        folder, name = Path(result.best["run_folder"]), result.best["trial"]
        spec = next(trial.spec for trial in trials(spec) if trial.name == name)
    data = find_prepared(spec, cache=locations.data_cache())
    columns = {} if data is None else data.columns
    return measuring_spec(spec, model=model_in(model_for_all(result.model_path, folder)), columns=columns)


def _tested(spec: RunSpec, result: RunResult, listener: Listener, *, fresh: bool) -> RunResult:
    """The result with the figures of its model on the test set, which its MLflow run gets too."""
    test = _test_of(spec, result)
    if test is None:
        return result
    listener.say("measuring the model on data.test")
    answer = _with_test(result, launch(test, replace(listener, opened=lambda *_: None), fresh=fresh))
    folder, details = Path(answer.run_folder), json.dumps(answer.evaluation, indent=2)
    (folder / TEST_FILE).write_text(details, encoding="utf-8")
    figures = {name: value for name, value in answer.metrics.items() if name.startswith(TEST)}
    if not note_test(folder, figures, details=details):
        return answer
    notes = [note for shipment in flush(find_runs(folder)) if (note := shipment.note()) is not None]
    return replace(answer, notes=(*answer.notes, *notes))


def _with_test(result: RunResult, measured: RunResult) -> RunResult:
    notes = tuple(f"test set: {note}" for note in measured.notes)
    return replace(
        result,
        metrics=result.metrics | shown(measured.metrics),
        evaluation=measured.evaluation,
        notes=(*result.notes, *notes),
    )


@contextmanager
def connected_session(listener: Listener, spec: RunSpec) -> Iterator[ClusterShape]:
    """A session on Ray for a spec whose placement groups are given back, with a listener that knows of it.

    Raises as `ray_session` does, what `plan_to_run` raises for what the cluster cannot do, before any data is read,
    and Interrupted when it was asked to stop meanwhile.
    """
    listener.connecting()
    with ray_session() as cluster, placement_groups_given_back():
        listener.connected()
        check_stop(listener)
        yield _with_its_machines(cluster, spec, listener)


def _with_its_machines(cluster: ClusterShape, spec: RunSpec, listener: Listener) -> ClusterShape:
    """The cluster as soon as there is room for the spec: after `ray up` on machines of one's own the head is there
    minutes before the others, which nobody has to ask for."""
    patience_s, began_s, told = spec.resources.capacity_timeout_s, time.monotonic(), 0
    while True:
        try:
            plan_to_run(spec, cluster)
        except CapacityError:
            missing = machines_to_come()
            if not missing or time.monotonic() - began_s > patience_s:
                raise
        else:
            return cluster
        if missing != told:
            machines = "1 machine" if missing == 1 else f"{missing} machines"
            listener.say(f"waiting for {machines} of the cluster file to join, {patience_s:g} s at most")
            told = missing
        listener.watcher.stop.wait(_LOOK_S)
        check_stop(listener)
        cluster = live_shape()


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What is known of a run before Ray starts."""

    data: PreparedData | None
    """The spec's data, if it is encoded already."""
    run_folder: Path | None
    """Where the run is kept; None while its data, or that of a trial, is not encoded."""


def look_ahead(spec: RunSpec) -> Foreseen:
    """Refuses plans and data that cannot work, those of a search's trials too; finds what is encoded already.

    Raises what `plan_to_run` and `prepare` raise.
    """
    check_goal(spec)
    cluster, cache = expected_shape(), locations.data_cache()
    found: dict[str, PreparedData | None] = {}
    specs = [spec, *(() if spec.search is None else (trial.spec for trial in trials(spec)))]
    each: list[PreparedData | None] = []
    for one in specs:
        method_of(one.method).check_installed()
        if cluster is None:
            check_samples(one)
        else:
            plan_to_run(one, cluster)
        if one.data_key not in found:
            found[one.data_key] = find_prepared(one, cache=cache)
        each.append(found[one.data_key])
    met = [(one, data) for one, data in zip(specs, each, strict=True) if data is not None]
    whole = len(met) == len(specs)
    return Foreseen(data=each[0], run_folder=run_folder_of(*met[0], met[1:]) if whole else None)


def _train(prepared: Prepared, listener: Listener) -> RunResult:
    folder = prepared.run_folder
    with tracked(prepared, listener) as tracker:
        exchange = shared(prepared.spec, folder)
        exchange.send(f"{OUTBOX}/{HANDLE}")
        job = TrainingJob(
            spec=with_ledger(prepared.spec, ledger_folder(folder), member=ONLY_MEMBER),
            plan=prepared.plan,
            data=prepared.data,
            run_folder=folder,
            exchanged_at=bucket_of(prepared.spec, folder),
            life=life_of(folder),
        )
        with capacity_for(prepared.spec.name) as capacity:
            result = _trained(job, exchange, listener, capacity)
        tracker.tag({f"{TAG}restarts": str(result.restarts)})
        outcome = result.outcome
        if outcome.status == "interrupted":
            trains = outcome.steps or method_of(prepared.spec.method).asks_in_prompts
            reached = f"at step {outcome.step} of {outcome.steps}, with a checkpoint" if outcome.steps else "on the way"
            raise Interrupted(
                f"stopped {reached}",
                got=outcome.checkpoint,
                do="the same command goes on from there" if trains else "the same command begins anew",
            )
        answer = _result(folder, outcome, restarts=result.restarts)
        if answer.evaluation is not None:
            tracker.attach(EVALUATION, json.dumps(answer.evaluation, indent=2))
        tracker.show_model(outcome.metrics, step=outcome.step, model_step=outcome.model_step)
        end_run(tracker, answer)
        keep_result(answer, prepared.spec)
        exchange.send(RESULT)
        if answer.status == "finished":
            exchange.remove(BEST)
    return shipped(answer, tracker)


def _trained(job: TrainingJob, exchange: Exchange, listener: Listener, capacity: Capacity | None) -> TrainingResult:
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
                job,
                watcher,
                planner=lambda room, kept: plan_to_run(job.spec, room, counts=job.data.counts, kept=kept),
                capacity=capacity,
            )
        flops = result.outcome.metrics.get("cost/flops", 0.0)
        exchange.fetch(*SHARED, patience_s=PATIENCE_S)
    except BaseException:
        with suppress(StorageError):  # what ended the training is told, not this
            exchange.fetch(OUTBOX, LEDGER)
        raise
    finally:
        Ledger(ledger_folder(folder)).settle(ONLY_MEMBER, job.plan, flops=flops)
        with suppress(StorageError):  # it is kept here; only a driver elsewhere would count less as spent
            exchange.send(LEDGER)
    return result


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
        evaluation=read_json(folder / EVALUATION) if outcome.status == "finished" else None,
    )
