"""A spec with a search -> Ray Tune over trainings of the same kind, one nested MLflow run each.

A trial of one worker trains inside Tune's own process, which is kept for the next trial, so imports are paid once; a
trial of several workers starts them through Ray Train. Either way the same loop runs. Every evaluation is kept in the
trial's folder: after any stop, the same command replays what ended trials reported and goes on with the others.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from orchestrator.errors import CapacityError, ClusterError, Interrupted, OrchestratorError
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.scheduling.launch import (
    Listener,
    Prepared,
    RunResult,
    earlier_outcome,
    flush,
    forget,
    make_folder,
    open_tracker,
    prepare_run,
    remembered_handle,
)
from orchestrator.scheduling.shipping import Parcel, pack, unpack
from orchestrator.scheduling.train_run import Watcher, run_training
from orchestrator.search_space import Trial, trials
from orchestrator.spec import RunSpec, SearchSpec
from orchestrator.tracking.tracker import STOP_REASON_TAG, MlflowTracker, RunHandle, Tracker
from orchestrator.training.job import Outcome, TrainingJob, WorkerContext

_STEP = "training_step"
_NO_CPU = {"node:__internal_head__": 0.001}
"""A trial whose workers Ray Train places apart holds no core itself, or trials and workers could starve each other."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What one trial needs, wherever Tune places it."""

    trial: Trial
    prepared: Prepared
    parent_run_id: str | None
    parcel: Parcel | None

    @property
    def folder(self) -> Path:
        """The trial's run folder."""
        return self.prepared.run_folder


def run_search(spec: RunSpec, cluster: ClusterShape, listener: Listener, *, fresh: bool) -> RunResult:
    """Runs all trials; raises the first trial's error when none came to an end, Interrupted when asked to stop."""
    assert spec.search is not None
    listener.say("preparing data")
    quiet = replace(listener, say=lambda _: None)
    points = trials(spec)  # every trial's spec is checked here
    base = prepare_run(spec, cluster, quiet)
    plans = [prepare_run(trial.spec, cluster, quiet) for trial in points]
    if fresh:
        forget(base.run_folder)
    make_folder(base.run_folder)
    tracker = open_tracker(base, base.run_folder)
    parent = None if tracker.handle is None else tracker.handle.run_id
    parcels = {plan.data.path: pack(plan.data.path) for plan in plans}
    tasks = [
        TrialTask(
            trial=trial,
            parent_run_id=parent,
            parcel=parcels[plan.data.path],
            prepared=replace(plan, run_folder=base.run_folder / "trials" / trial.name),
        )
        for trial, plan in zip(points, plans, strict=True)
    ]
    try:
        errors = _tune(spec, cluster, tasks, listener)
        result = _best(spec, base, tasks, errors)
    except Interrupted:
        tracker.close_run("killed", tags={"orchestrator.stop_reason": "interrupted"})
        raise
    except OrchestratorError as error:
        tracker.close_run("failed", error=str(error))
        raise
    _close_pruned(tasks)
    flush(base.run_folder)
    if result.best is not None and result.best["mlflow_run_id"]:
        tracker.copy_best(result.best["mlflow_run_id"])
    tracker.close_run("finished", tags={"orchestrator.model_path": str(result.model_path)})
    return replace(result, mlflow_run_id=parent)


def _tune(spec: RunSpec, cluster: ClusterShape, tasks: list[TrialTask], listener: Listener) -> list[str]:
    """Runs the trials and returns the messages of those that failed."""
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1")
    assert spec.search is not None
    metric, mode = _goal(spec)
    longest = max(task.prepared.plan.steps or 1 for task in tasks)
    stop = listener.watcher.stop
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial_main, tasks=tasks), tune.PlacementGroupFactory([_trial_resources(tasks[0])])
        ),
        param_space={"trial": tune.grid_search(list(range(len(tasks))))},
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=mode,
            reuse_actors=True,
            scheduler=_scheduler(spec.search, spec, longest),
            max_concurrent_trials=concurrency(spec.search, cluster, tasks),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tasks[0].folder.parent.parent),
            verbose=0,
            stop=_StopAll(stop),
            callbacks=[_Narrator(tasks, listener.say, metric)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(_fit(tuner)), name="ray-tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if stop.is_set():
        raise Interrupted("the search was stopped", do="the same command goes on with the trials that had not ended")
    if isinstance(outcome[0], BaseException):
        raise ClusterError("Ray Tune could not run the search", got=str(outcome[0])[:400]) from outcome[0]
    return [str(error) for error in outcome[0].errors]


def _fit(tuner: tune.Tuner) -> Any:
    try:
        return tuner.fit()
    except Exception as error:  # crosses to the waiting thread, which raises it
        return error


def _goal(spec: RunSpec) -> tuple[str, str]:
    """(metric, mode) that ranks trials."""
    assert spec.search is not None
    metric = spec.search.metric or spec.quality_metric
    mode = spec.search.mode if spec.search.mode != "auto" else "max" if metric == "eval/accuracy" else "min"
    return metric, mode


def _scheduler(search: SearchSpec, spec: RunSpec, longest: int) -> Any:
    if search.scheduler == "none":
        return FIFOScheduler()
    grace = search.grace_steps or spec.training.eval_every_steps or 1
    # One beyond the longest run: Tune must not cut a trial at its last step, before it has written its model.
    return ASHAScheduler(
        time_attr=_STEP, max_t=max(longest, grace) + 1, grace_period=grace, reduction_factor=search.reduction_factor
    )


def _trial_resources(task: TrialTask) -> dict[str, float]:
    plan = task.prepared.plan
    if plan.workers > 1:
        return dict(_NO_CPU)
    return {"CPU": float(plan.cpus_per_worker)} | ({"GPU": 1.0} if plan.gpus_per_worker else {})


def concurrency(search: SearchSpec, cluster: ClusterShape, tasks: list[TrialTask]) -> int:
    """Trials that fit at a time beside each other; raises CapacityError when not even one does."""
    plans = [task.prepared.plan for task in tasks]
    by_cpu = cluster.cpus // max(plan.workers * plan.cpus_per_worker for plan in plans)
    gpus = max(plan.workers * plan.gpus_per_worker for plan in plans)
    fitting = min(by_cpu, cluster.gpus // gpus) if gpus else by_cpu
    if fitting < 1:
        raise CapacityError(
            "not even one trial fits this cluster",
            got=f"{cluster.cpus} cores, {cluster.gpus} GPUs",
            do="lower resources.workers or resources.cpus_per_worker",
        )
    return fitting if search.max_concurrent == "auto" else min(fitting, search.max_concurrent)


class _StopAll(tune.Stopper):  # type: ignore[misc]
    """Ends the search when the driver was asked to stop."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stop.is_set()

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its state with the stopper in it; an event of this process means nothing elsewhere."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._stop = threading.Event()


class _Narrator(tune.Callback):  # type: ignore[misc]
    """Says what each trial reports, in the driver."""

    def __init__(self, tasks: list[TrialTask], say: Callable[[str], None], metric: str) -> None:
        self._names = [task.trial.name for task in tasks]
        self._points = [", ".join(f"{k.split('.')[-1]} {v}" for k, v in task.trial.overrides.items()) for task in tasks]
        self._say, self._metric = say, metric
        self._ended = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        index = trial.config["trial"]
        self._say(f"trial {self._names[index]} starts: {self._points[index]}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        value = result.get(self._metric)
        if value is not None:
            self._say(f"trial {self._names[trial.config['trial']]} step {result[_STEP]}: {self._metric} {value:.4g}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended += 1
        self._say(f"trial {self._names[trial.config['trial']]} ends ({self._ended} of {len(self._names)})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended += 1
        self._say(f"trial {self._names[trial.config['trial']]} failed ({self._ended} of {len(self._names)})")

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles callbacks into its snapshot; the terminal stays here."""
        return {**self.__dict__, "_say": print}


# -- inside a trial ------------------------------------------------------------------------------------------------


def trial_main(config: dict[str, Any], *, tasks: list[TrialTask]) -> None:
    """What Tune runs for one point; Tune stops it by raising SystemExit out of a report."""
    task = tasks[config["trial"]]
    if task.parcel is not None:
        unpack(task.parcel)
    task.folder.mkdir(parents=True, exist_ok=True)
    reports = _Reports(task)
    reports.replay()
    if earlier_outcome(task.folder) is not None or reports.was_pruned():
        return
    tracker = open_tracker(task.prepared, task.folder, parent_run_id=task.parent_run_id)
    try:
        outcome = _train(task, tracker.handle, reports)
    except SystemExit:
        _end_pruned(task, tracker, reports)
        raise
    except OrchestratorError as error:
        tracker.close_run("failed", error=str(error))
        raise
    tracker.close_run("finished", tags={"orchestrator.model_path": str(outcome.model_path)})
    reports.release()


def _train(task: TrialTask, handle: RunHandle | None, reports: _Reports) -> Outcome:
    plan, spec = task.prepared.plan, task.prepared.spec
    job = TrainingJob(
        spec=spec,
        plan=plan,
        data=task.prepared.data,
        run_folder=task.folder,
        handle=handle,
        final_checkpoint=spec.checkpoint.every_steps is not None,
    )
    if plan.workers > 1:
        stop = threading.Event()
        try:
            return run_training(job, Watcher(on_report=reports.add, stop=stop)).outcome
        finally:
            stop.set()
    from orchestrator.training.loop import train

    return train(job, WorkerContext(report=reports.add))


class _Reports:
    """A trial's evaluations: in its folder, and to Tune."""

    def __init__(self, task: TrialTask) -> None:
        self._file = task.folder / "reports.jsonl"
        self._pruned = task.folder / "pruned"
        self._final_step = task.prepared.plan.steps
        self._held: tuple[int, Mapping[str, float]] | None = None
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        self._earlier = [json.loads(line) for line in lines]
        self.last_step = max((item["step"] for item in self._earlier), default=0)

    def replay(self) -> None:
        """Tells Tune what an earlier attempt reported."""
        for item in self._earlier:
            _to_tune(item["step"], item["metrics"])

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps and reports an evaluation, the last one only when the trial has ended (`release`)."""
        if step <= self.last_step:
            return
        self.last_step = step
        with self._file.open("a") as stream:
            stream.write(json.dumps({"step": step, "metrics": dict(metrics)}) + "\n")
        if step == self._final_step:
            self._held = (step, metrics)
        else:
            _to_tune(step, metrics)

    def release(self) -> None:
        """Reports the last evaluation; Tune may stop the trial on it, which has nothing left to lose."""
        if self._held is not None:
            _to_tune(*self._held)

    def mark_pruned(self) -> None:
        """Remembers that the scheduler ended this trial."""
        self._pruned.touch()

    def was_pruned(self) -> bool:
        """Whether the scheduler ended this trial in an earlier attempt."""
        return self._pruned.exists()


def _to_tune(step: int, metrics: Mapping[str, float]) -> None:
    tune.report({**metrics, _STEP: step})


# -- afterwards ----------------------------------------------------------------------------------------------------


def _close_pruned(tasks: list[TrialTask]) -> None:
    """Ends the MLflow runs of trials whose process Tune took away before they could say that they were stopped."""
    for task in tasks:
        handle = remembered_handle(task.folder)
        if handle is not None and earlier_outcome(task.folder) is None and not _Reports(task).was_pruned():
            _end_pruned(task, MlflowTracker(handle), _Reports(task))


def _end_pruned(task: TrialTask, tracker: Tracker, reports: _Reports) -> None:
    reports.mark_pruned()
    tags = {STOP_REASON_TAG: "pruned", "orchestrator.stopped_at_step": str(reports.last_step)}
    tracker.close_run("finished", tags=tags)


def _best(spec: RunSpec, base: Prepared, tasks: list[TrialTask], errors: list[str]) -> RunResult:
    """The finished trial with the best last metric."""
    metric, mode = _goal(spec)
    ended = [(task, outcome) for task in tasks if (outcome := earlier_outcome(task.folder)) is not None]
    if not ended:
        raise ClusterError(
            "no trial of the search came to its end",
            got=errors[0][-400:] if errors else "all were stopped early",
            do=f"see the trials' folders below {base.run_folder}",
        )
    sign = 1 if mode == "max" else -1
    best, outcome = max(ended, key=lambda pair: sign * pair[1].metrics[metric])
    notes = (f"{len(errors)} of {len(tasks)} trials failed",) if errors else ()
    return RunResult(
        status="finished",
        mlflow_run_id=None,
        checkpoint=outcome.checkpoint,
        model_path=outcome.model_path,
        metrics=outcome.metrics,
        restarts=0,
        run_folder=str(base.run_folder),
        notes=notes,
        best={
            "trial": best.trial.name,
            "overrides": best.trial.overrides,
            "run_folder": str(best.folder),
            "mlflow_run_id": None if (handle := remembered_handle(best.folder)) is None else handle.run_id,
        },
    )
