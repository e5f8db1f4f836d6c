"""A spec with a search -> Ray Tune over trainings of the same kind, one nested MLflow run each.

A trial of one worker trains inside Tune's own process, which is kept for the next trial, so imports are paid once; a
trial of several workers starts them through Ray Train. Either way the same loop runs (`trial`). Every evaluation is
kept in the trial's folder: after any stop, the same command replays what ended trials reported and goes on with the
others. Where nodes do not see the search's folder, they exchange it through the run's bucket (`file_exchange`); Tune's
own notes stay in the driver's, and nobody reads them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray import tune
from ray.tune.schedulers import FIFOScheduler

from orchestrator.errors import ClusterError, Interrupted, OrchestratorError, StorageError
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.planning.search_plan import trials_at_a_time
from orchestrator.progress_line import describe_search
from orchestrator.ranking import Goal, Measured, check_alike
from orchestrator.runs.attempts import ATTEMPTS, Attempts, Fence
from orchestrator.runs.file_exchange import Exchange, begin_life, following
from orchestrator.runs.job import BEST, ENDING, OUTCOME, REPORTS, RUNGS, TRIALS
from orchestrator.scheduling.capacity import Capacity, capacity_for, wait_for_room
from orchestrator.scheduling.data_shipping import pack
from orchestrator.scheduling.decisions.next_action import Rules
from orchestrator.scheduling.run_folder import (
    POINTS_OF_TRIALS,
    RESULT,
    fetch_models,
    forget,
    life_of,
    make_folder,
    run_folder_of,
    shared,
)
from orchestrator.scheduling.run_lifecycle import (
    Listener,
    Prepared,
    RunResult,
    answered_earlier,
    end_run,
    keep_result,
    prepare_run,
    remembered_run_id,
    say_held_out,
    shipped,
    tags_of_model,
    tracked,
    what_is_tracked,
)
from orchestrator.scheduling.search.pruning import SuccessiveHalving
from orchestrator.scheduling.search.rungs import Rungs, rungs_of_trials
from orchestrator.scheduling.search.trial import (
    STEP,
    Ending,
    SharedBudget,
    TrialTask,
    ending_of,
    forget_failure,
    last_reported_step,
    left_undone,
    reopen,
    trial_main,
)
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec
from orchestrator.spec_search import SearchSpec
from orchestrator.tracking import run_record
from orchestrator.tracking.mlflow_backend import STOP_REASON_TAG, TAG
from orchestrator.tracking.run_record import HANDLE, OUTBOX
from orchestrator.tracking.tracker import Tracker, note_attempt

_NO_CPU = {"node:__internal_head__": 0.001}
"""A trial whose workers Ray Train places apart holds no core itself, or trials and workers could starve each other."""


def run_search(spec: RunSpec, cluster: ClusterShape, listener: Listener, *, fresh: bool) -> RunResult:
    """Runs all trials; raises ClusterError when none came to an end, Interrupted when asked to stop."""
    assert spec.search is not None
    quiet = replace(listener, say=lambda _: None)
    base = prepare_run(spec, cluster, quiet)
    say_held_out(base.data, listener)
    points = trials(spec)
    plans = [prepare_run(trial.spec, cluster, quiet) for trial in points]
    check_alike({trial.name: _measured(plan) for trial, plan in zip(points, plans, strict=True)}, spec.goal.metric)
    base = replace(base, run_folder=run_folder_of(spec, base.data, [(plan.spec, plan.data) for plan in plans]))
    if fresh:
        forget(spec, base.run_folder)
    earlier = answered_earlier(base.run_folder, spec, listener)
    if earlier is not None:
        return earlier
    parcels = {folders: pack(folders) for folders in {plan.data.folders for plan in plans}}
    tasks = [
        TrialTask(
            trial=trial,
            parcels=parcels[plan.data.folders],
            prepared=replace(plan, run_folder=base.run_folder / TRIALS / trial.name),
            rungs=rungs,
        )
        for trial, plan, rungs in zip(points, plans, _rungs(spec.search, plans), strict=True)
    ]
    with tracked(base, listener) as tracker:
        exchange = shared(spec, base.run_folder)
        exchange.send(f"{OUTBOX}/{HANDLE}", patience_s=PATIENCE_S)
        fence = _taken_up(base.run_folder, exchange)
        tasks = [replace(task, life=life_of(base.run_folder)) for task in tasks]
        for task in tasks:
            _make_room(task, exchange)
        desk = _Desk(tasks, tracker, exchange, fence, listener.say, spec.goal)
        with capacity_for(spec.name) as capacity:
            if capacity is not None:
                _wait_for_a_trial(capacity, spec, cluster, tasks, listener)
            with following(exchange, fetch=(f"{TRIALS}/*/{ATTEMPTS}/*", POINTS_OF_TRIALS)):
                _tune(spec, cluster, tasks, desk, exchange, listener.watcher.stop)
        exchange.fetch(f"{TRIALS}/*/{OUTCOME}", patience_s=PATIENCE_S)
        fetch_models(exchange, base.run_folder, patience_s=PATIENCE_S)
        result = _best(spec, base, tasks)
        end_run(tracker, result, trials=[task.folder for task in tasks])
        if not any(_has_failed(task) for task in tasks) or result.status == "stopped_by_budget":
            keep_result(result, spec)  # else the same command tries the failed trials again
            exchange.send(RESULT, patience_s=PATIENCE_S)
    return shipped(result, tracker)


def _taken_up(folder: Path, exchange: Exchange) -> Fence:
    """The search is this driver's from here on: another one on another machine begins no trial any more."""
    attempts = Attempts(folder, exchange)
    return attempts.fence(attempts.open(workers=0, cause=attempts.cause_of_start()))


def _make_room(task: TrialTask, exchange: Exchange) -> None:
    """A trial's folder on the driver's machine, where its failure is forgotten."""
    make_folder(task.folder)
    if task.exchanged_at is not None:
        begin_life(task.folder, task.life)
    forget_failure(task, exchange)


def _measured(trial: Prepared) -> Measured:
    spec, data = trial.spec, trial.data
    return Measured(
        task=spec.task,
        held_out=data.held_out_fingerprint,
        tokenizer=data.tokenizer_fingerprint,
        masking_rate=spec.training.masking_rate,
    )


def _tune(
    spec: RunSpec,
    cluster: ClusterShape,
    tasks: list[TrialTask],
    desk: _Desk,
    exchange: Exchange,
    stop: threading.Event,
) -> None:
    """Runs the trials; how each ended stands in its folder and on its MLflow run."""
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1")
    assert spec.search is not None
    places = [_trial_resources(task) for task in tasks]
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial_main, tasks=tasks),
            lambda config: tune.PlacementGroupFactory([places[config["trial"]]]),
        ),
        param_space={"trial": tune.grid_search(list(range(len(tasks))))},
        tune_config=tune.TuneConfig(
            # A process whose trial has workers of its own is cheap to start, and ends when they have ended.
            reuse_actors=all(task.prepared.plan.workers == 1 for task in tasks),
            scheduler=_scheduler(spec, tasks, exchange),
            max_concurrent_trials=concurrency(spec.search, cluster, tasks),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tasks[0].folder.parent.parent),
            verbose=0,
            stop=_StopAll(lambda: stop.is_set() or desk.is_over()),
            callbacks=[desk],
            # Only the death of a trial's process counts: `trial_main` raises nothing.
            failure_config=tune.FailureConfig(max_failures=spec.resources.max_failures),
        ),
    )
    failure: list[Exception] = []
    thread = threading.Thread(target=_fit, args=(tuner, failure), name="ray-tune", daemon=True)
    desk.budget.open()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
            desk.budget.tick()
    finally:
        desk.close_the_rest(interrupted=stop.is_set())
    if stop.is_set():
        raise Interrupted("the search was stopped", do="the same command goes on with the trials that had not ended")
    if failure:
        raise _first_of_ours(failure[0]) or ClusterError(
            "Ray Tune could not run the search", got=str(failure[0])[:400]
        ) from failure[0]


def _wait_for_a_trial(
    capacity: Capacity, spec: RunSpec, cluster: ClusterShape, tasks: list[TrialTask], listener: Listener
) -> None:
    """Returns once there is room for the largest trial; what others need more room than that, Tune asks for."""
    assert spec.search is not None
    largest = max((task.prepared for task in tasks), key=lambda prepared: prepared.plan.workers)
    wait_for_room(
        largest.plan,
        lambda room, kept: plan_to_run(largest.spec, room, counts=largest.data.counts, kept=kept),
        capacity,
        Rules.of(spec.resources),
        say=listener.say,
        stop=listener.watcher.stop,
    )
    capacity.start(largest.plan, times=concurrency(spec.search, cluster, tasks))
    capacity.started()


def _fit(tuner: tune.Tuner, failure: list[Exception]) -> None:
    try:
        tuner.fit()
    except Exception as error:  # crosses to the waiting thread, which raises it
        failure.append(error)


def _first_of_ours(error: BaseException | None) -> OrchestratorError | None:
    """Tune wraps what a callback raises."""
    while error is not None and not isinstance(error, OrchestratorError):
        error = error.__cause__ or error.__context__
    return error


def _raised_by(trial: Any) -> OrchestratorError | None:
    """The error of ours that a trial's process ended with, if it lived to raise one."""
    cause = getattr(trial.get_pickled_error(), "cause", None)  # Ray wraps what a process raises
    return cause if isinstance(cause, OrchestratorError) else None


def _rungs(search: SearchSpec, plans: Sequence[Prepared]) -> list[tuple[int, ...]]:
    """For each trial the steps at which it is compared with others."""
    if search.scheduler == "none":
        return [()] * len(plans)
    each = [(plan.spec.training.eval_every_steps, plan.plan.steps or 0) for plan in plans]
    return rungs_of_trials(each, grace=search.grace_steps, reduction_factor=search.reduction_factor)


def _scheduler(spec: RunSpec, tasks: list[TrialTask], exchange: Exchange) -> Any:
    assert spec.search is not None
    if spec.search.scheduler == "none":
        return FIFOScheduler()
    rungs = Rungs(
        tasks[0].folder.parent.parent / RUNGS,
        reduction_factor=spec.search.reduction_factor,
        show=partial(exchange.send, RUNGS, patience_s=PATIENCE_S),
    )
    return SuccessiveHalving(tasks, rungs, spec.goal)


def _trial_resources(task: TrialTask) -> dict[str, float]:
    plan = task.prepared.plan
    if plan.workers > 1:
        return dict(_NO_CPU)
    return {"CPU": float(plan.cpus_per_worker)} | ({"GPU": 1.0} if plan.gpus_per_worker else {})


def concurrency(search: SearchSpec, cluster: ClusterShape, tasks: list[TrialTask]) -> int:
    """Trials that fit at a time beside each other; raises CapacityError when not even one does."""
    most = None if search.max_concurrent == "auto" else search.max_concurrent
    return trials_at_a_time([task.prepared.plan for task in tasks], cluster, most=most)


class _StopAll(tune.Stopper):  # type: ignore[misc]
    """Ends the search when the driver was asked to stop, or when the budget leaves nothing to begin."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._is_over()

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its state with the stopper in it; an event of this process means nothing elsewhere."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._is_over = lambda: False


class _Desk(tune.Callback):  # type: ignore[misc]
    """The driver's side of all trials: says what each reports, opens its MLflow run and ends it truthfully."""

    def __init__(
        self,
        tasks: list[TrialTask],
        parent: Tracker,
        exchange: Exchange,
        fence: Fence,
        say: Callable[[str], None],
        goal: Goal,
    ) -> None:
        """`exchange` is that of the search's folder; `fence` tells whether the search is still this driver's."""
        self._tasks, self._parent, self._exchange, self._say, self._goal = tasks, parent, exchange, say, goal
        self._fence = fence
        self.budget = SharedBudget(tasks[0].prepared.spec.parsed_budget, tasks[0].open_ledger())
        self._open: dict[int, Tracker] = {}
        self._ended: set[int] = set()
        self._since_s, self._ran = time.monotonic(), 0
        self._usd: dict[str, float] = {}
        """What each trial had cost at its newest evaluation."""
        self._left_out: set[int] = set()

    def is_over(self) -> bool:
        """Whether the budget let a trial not begin, and no other runs that could give something back."""
        return bool(self._left_out) and not self._open

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called before the trial's function runs, which finds the MLflow run in its folder."""
        self._fence.check()
        index = trial.config["trial"]
        task = self._tasks[index]
        ending = ending_of(task.folder)
        if ending is not None and ending.status != "stopped_by_budget":
            return
        if index not in self._open:  # else its process has died, and it holds its part of the budget
            decision = self.budget.admit(task)
            if not decision.go_on:
                self._left_out.add(index)
                return
            reopen(task, self._exchange)
        point = ", ".join(f"{path.split('.')[-1]} {value}" for path, value in task.trial.overrides.items())
        self._say(f"trial {task.trial.name} starts: {point}")
        self._open[index] = self._opened(task)

    def _opened(self, task: TrialTask) -> Tracker:
        described = what_is_tracked(task.prepared, self._goal)
        tracker = self._parent.open_trial(task.folder, name=task.trial.name, what=described)
        self._exchange.send(task.part(f"{OUTBOX}/{HANDLE}"), patience_s=PATIENCE_S)
        return tracker

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        task, value = self._tasks[trial.config["trial"]], result.get(self._goal.metric)
        self._usd[task.trial.name] = result.get("cost/usd", 0.0)
        _note_attempts(task)
        if value is not None:
            self._say(f"trial {task.trial.name} step {result[STEP]}: {self._goal.metric} {value:.4g}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"trial {self._tasks[trial.config['trial']].trial.name} lost its process and goes on in another")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial has returned, and when the scheduler takes it away."""
        if trial.config["trial"] in self._left_out:
            return
        self._end(trial.config["trial"], otherwise="pruned")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called when a trial's process died too often, or could keep nothing."""
        self._end(trial.config["trial"], otherwise="failed", error=_raised_by(trial))

    def close_the_rest(self, *, interrupted: bool) -> None:
        """Ends the MLflow runs of trials that Tune said nothing more about."""
        with suppress(StorageError):  # what ended the search is told, not this; `flush` looks again
            self._exchange.fetch(f"{TRIALS}/*/{ENDING}", f"{TRIALS}/*/{ATTEMPTS}/*", POINTS_OF_TRIALS)
        for index in list(self._open):
            if interrupted and ending_of(self._tasks[index].folder) is None:
                self._open.pop(index).end_run("killed", tags={STOP_REASON_TAG: "interrupted"})
            else:
                self._end(index, otherwise="failed")
        for task in self._tasks:
            _note_attempts(task)
            ending, tracker = ending_of(task.folder), self._parent.left_open(task.folder)
            if ending is not None and run_record.read(task.folder) is None:  # it ended under a driver elsewhere
                tracker = self._opened(task)
            if ending is not None and tracker is not None:
                _say_ending(ending, tracker)

    def _end(
        self, index: int, *, otherwise: Literal["pruned", "failed"], error: OrchestratorError | None = None
    ) -> None:
        task = self._tasks[index]
        self._fence.check()
        self._exchange.fetch(*map(task.part, (REPORTS, ENDING, ATTEMPTS, OUTBOX)), patience_s=PATIENCE_S)
        _note_attempts(task)
        ending = ending_of(task.folder)
        if ending is None:
            died = str(error or "the trial's process died") if otherwise == "failed" else None
            ending = Ending(status=otherwise, step=last_reported_step(task.folder), error=died)
            ending.write(task.folder)
            self._exchange.send(task.part(ENDING), patience_s=PATIENCE_S)
            if otherwise == "pruned":
                with suppress(StorageError):  # not needed any more, and the trial has ended all the same
                    self._exchange.remove(task.part(BEST))
        self._ended.add(index)
        self._say(
            f"trial {task.trial.name} {ending.status.replace('_', ' ')} at step {ending.step} "
            f"({len(self._ended)} of {len(self._tasks)})"
        )
        if index in self._open:
            _say_ending(ending, self._open.pop(index))
            self._ran += 1
            with suppress(StorageError):  # it is for people alone
                self._say(self._totals())

    def _totals(self) -> str:
        """Where the search stands; trials to come are taken to last as those that have ended, as many at a time."""
        left, budget = len(self._tasks) - len(self._ended), self._tasks[0].prepared.spec.parsed_budget
        spent = self.budget.spent()
        return describe_search(
            len(self._ended),
            len(self._tasks),
            eta_s=(time.monotonic() - self._since_s) / self._ran * left,
            spent=sum(self._usd.values()) if spent is None else spent,
            unit="usd" if budget is None else budget.unit,
            budget=None if budget is None else str(budget),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles callbacks into its snapshot; the terminal and the store stay here."""
        return {}


def _note_attempts(task: TrialTask) -> None:
    """MLflow shows what the trial's processes have told of its attempts."""
    for number, text in Attempts(task.folder).told().items():
        note_attempt(task.folder, number, text)


def _has_failed(task: TrialTask) -> bool:
    ending = ending_of(task.folder)
    return ending is not None and ending.status == "failed"


def _say_ending(ending: Ending, tracker: Tracker) -> None:
    if ending.status == "failed":
        tracker.end_run("failed", error=ending.error, at_ms=ending.at_ms)
        return
    tags: dict[str, str] = {}
    if ending.outcome is not None:
        outcome = ending.outcome
        tracker.show_model(outcome.metrics, step=outcome.step, model_step=outcome.model_step, at_ms=ending.at_ms)
        if outcome.model_path is not None:
            tags |= tags_of_model(outcome.model_path)
    if ending.status != "finished":
        tags[STOP_REASON_TAG] = ending.status.removeprefix("stopped_by_")
        tags[f"{TAG}stopped_at_step"] = str(ending.step)
    tracker.end_run("finished", tags=tags, at_ms=ending.at_ms)


def _best(spec: RunSpec, base: Prepared, tasks: list[TrialTask]) -> RunResult:
    """The trial that came to its end, or its budget's, with the best figures there: those of the model it has left."""
    endings = [(task, ending) for task in tasks if (ending := ending_of(task.folder)) is not None]
    failed = [f"trial {task.trial.name}: {ending.error}" for task, ending in endings if ending.status == "failed"]
    ended = [(task, ending.outcome) for task, ending in endings if ending.outcome is not None]
    undone = left_undone(spec.parsed_budget, {task.trial.name: ending_of(task.folder) for task in tasks})
    if not ended:
        raise ClusterError(
            "no trial of the search came to its end",
            got=failed[0] if failed else undone or "all were stopped early",
            do="raise the budget" if undone else f"see the trials' folders below {base.run_folder}",
        )
    best, outcome = ended[spec.goal.best_of([outcome.metrics.get(spec.goal.metric) for _, outcome in ended])]
    failures = f"{len(failed)} of {len(tasks)} trials failed; the first: {failed[0]}" if failed else None
    return RunResult(
        status="stopped_by_budget" if undone else "finished",
        mlflow_run_id=remembered_run_id(base.run_folder),
        checkpoint=outcome.checkpoint,
        model_path=outcome.model_path,
        metrics=outcome.metrics,
        restarts=0,
        run_folder=str(base.run_folder),
        notes=tuple(note for note in (undone, failures) if note),
        best={
            "trial": best.trial.name,
            "overrides": best.trial.overrides,
            "run_folder": str(best.folder),
            "mlflow_run_id": remembered_run_id(best.folder),
        },
    )
