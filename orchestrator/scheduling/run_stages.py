"""Stages one after the other on one Ray session, each a run of its own below the MLflow run of the whole.

`decisions.next_stage` says what comes next. A run is known by the content of its base, so each stage's folder stands
for all that came before it: stages that are over answer at once, and after a change the later ones begin anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator import locations
from orchestrator.atomic_file import read_json, write_json
from orchestrator.planning.plan import check_follows
from orchestrator.planning.plan_to_run import plan_to_run
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.runs.budget_ledger import Cost, Ledger
from orchestrator.samples.stand_in import stand_in_for_base, with_stand_in
from orchestrator.scheduling.decisions.next_stage import (
    Begin,
    DoneStage,
    Over,
    metrics_of_whole,
    next_stage,
)
from orchestrator.scheduling.launch import ONLY_MEMBER, connected_session, known_result, launch, look_ahead
from orchestrator.scheduling.run_folder import (
    check_bucket_of,
    check_storage,
    forget,
    ledger_folder,
    make_folder,
    model_for_all,
    stages_folder_of,
)
from orchestrator.scheduling.run_lifecycle import (
    Listener,
    PartOf,
    RunResult,
    end_run,
    opened,
    remembered_run_id,
    shipped,
    told_of_its_end,
    tracking_uri,
)
from orchestrator.scheduling.session import expected_shape
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import Stage, StagedSpec
from orchestrator.tracking import run_record
from orchestrator.tracking.description import described_stages, tags_of_whole
from orchestrator.tracking.finished_model import with_base_found
from orchestrator.tracking.mlflow_backend import TAG
from orchestrator.tracking.run_record import check_undriven, driving
from orchestrator.tracking.store import check_uri
from orchestrator.tracking.tracker import Tracker

_BEGUN = "stages.json"
"""In the folder of the whole: the run folder of each stage that was begun, by the name of its run, in their order."""


def run_stages(staged: StagedSpec, listener: Listener, *, fresh: bool = False) -> RunResult:
    """Runs all stages to their end, or to that of the budget; the same spec again goes on in the stage it was in.

    `fresh` forgets what earlier runs of these stages have left. Raises what `launch` raises, with the stage's name, and
    before the first begins where it can be known of a later one.
    """
    folder, staged = stages_folder_of(staged), _with_base_found(staged)
    check_storage(staged.first)
    check_undriven(folder)
    is_elsewhere = expected_shape() is None
    _check_all(staged, cluster=None)
    if staged.tracking.enabled:
        check_uri(tracking_uri(staged.first))
    if fresh:
        _forget_all(staged, folder)
    whole = _Whole(staged, folder, listener, fresh=fresh)
    step = whole.pass_over_known()
    if isinstance(step, Over) and whole.is_told():
        return whole.result(step)
    with ExitStack() as stack:
        if isinstance(step, Begin):
            with staged.stages[0].named():
                cluster = stack.enter_context(connected_session(listener, staged.first))
            if is_elsewhere:
                _check_all(staged, cluster=cluster)
        tracker = stack.enter_context(_tracked(staged, folder, listener))
        result = whole.result(whole.run_rest())
        whole.end(tracker, result)
    return shipped(result, tracker)


class _Whole:
    """The stages of a run, and what those that are over have answered."""

    def __init__(self, staged: StagedSpec, folder: Path, listener: Listener, *, fresh: bool) -> None:
        self._staged, self._folder, self._fresh = staged, folder, fresh
        self._listener = listener
        self._results: list[RunResult] = []

    def pass_over_known(self) -> Begin | Over:
        """Takes the answers of the stages that are over already, without Ray; what comes then."""
        while isinstance(step := self._next(), Begin) and not self._fresh:
            with self._stage.named():
                earlier = known_result(step.spec, replace(self._listener, say=lambda _: None))
            if earlier is None:
                break
            place = f"stage {len(self._results) + 1} of {len(self._staged.stages)}"
            self._listener.say(f"{place}: {self._stage.label} is over already; --fresh starts over")
            self._results.append(earlier)
        if isinstance(step, Over):
            self._listener.say(step.reason)
        return step

    def run_rest(self) -> Over:
        """Runs what is left."""
        while isinstance(step := self._next(), Begin):
            self._listener.say(step.reason)
            with self._stage.named():
                result = launch(
                    step.spec,
                    replace(self._listener, opened=self._opened),
                    fresh=self._fresh,
                    part_of=PartOf(run_folder=self._folder, tags=self._tags()),
                )
            self._results.append(result)
        return step

    def result(self, over: Over) -> RunResult:
        """What `run` answers: the last stage's model and figures, and what all have cost."""
        stages = self._staged.stages[: len(self._results)]
        last, each = self._results[-1], list(zip(stages, self._results, strict=True))
        notes = [f"stage {stage.label}: {note}" for stage, result in each for note in result.notes]
        return RunResult(
            status=over.status,
            mlflow_run_id=remembered_run_id(self._folder),
            checkpoint=last.checkpoint,
            model_path=last.model_path,
            metrics=metrics_of_whole([result.metrics for result in self._results]),
            restarts=sum(result.restarts for result in self._results),
            run_folder=str(self._folder),
            notes=(*notes, *([over.reason] if over.status != "finished" else ())),
            stages=tuple(_answer(stage, result) for stage, result in each),
        )

    def is_told(self) -> bool:
        """Whether MLflow was told of the end of the whole with just this last stage, if it is told of anything."""
        record = run_record.read(self._folder)
        if not self._staged.tracking.enabled or record is None:
            return not self._staged.tracking.enabled
        return record.status == "finished" and record.best == os.path.relpath(self._last, self._folder)

    def end(self, tracker: Tracker, result: RunResult) -> None:
        """Tells MLflow how the whole ended: with the last stage's figures and the costs of all."""
        last = run_record.read(self._last)
        if last is not None:
            tracker.tag(tags_of_whole(last.tags))
            tracker.show_best(self._last, [Path(one.run_folder) for one in self._results])
        end_run(tracker, result)

    @property
    def _stage(self) -> Stage:
        """The one that comes next."""
        return self._staged.stages[len(self._results)]

    @property
    def _last(self) -> Path:
        return Path(self._results[-1].run_folder)

    def _next(self) -> Begin | Over:
        done = [
            DoneStage(
                status=result.status,
                model_path=result.model_path and model_for_all(result.model_path, Path(result.run_folder)),
                spent=self._spent(result),
            )
            for result in self._results
        ]
        return next_stage(self._staged, done)

    def _spent(self, result: RunResult) -> float:
        """In the unit of the budget. A stage that had none has no ledger; its hours are at most its device hours."""
        budget = self._staged.budget
        if budget is None:
            return 0.0
        entry = Ledger(ledger_folder(Path(result.run_folder))).entry(ONLY_MEMBER)
        if entry is not None:
            return entry.spent.of(budget)
        gpu_hours, flops, usd = (result.metrics.get(f"cost/{unit}", 0.0) for unit in ("gpu_hours", "flops", "usd"))
        return Cost(hours=gpu_hours, gpu_hours=gpu_hours, flops=flops, usd=usd).of(budget)

    def _tags(self) -> dict[str, str]:
        """The place of the next stage in the whole, and the run whose model it begins with."""
        stage, number = self._stage, len(self._results) + 1
        place = {"stage": stage.name, "stage_number": str(number), "cycle": str(stage.cycle)}
        before = self._results[-1].mlflow_run_id if self._results else None
        if before is not None:
            place["base_run_id"] = before
        return {f"{TAG}{key}": value for key, value in place.items()}

    def _opened(self, run_folder: Path, mlflow_run_id: str | None) -> None:
        """Keeps where the stage lies, for `--fresh` and for what is told of a failure."""
        begun = read_json(self._folder / _BEGUN) or {}
        write_json(self._folder / _BEGUN, {**begun, self._stage.spec.name: str(run_folder)})


def _answer(stage: Stage, result: RunResult) -> dict[str, Any]:
    """A stage's part of the answer."""
    own = {key: value for key, value in result.to_dict().items() if key not in ("best", "stages")}
    return {"name": stage.name, "cycle": stage.cycle, **own}


@contextmanager
def _tracked(staged: StagedSpec, folder: Path, listener: Listener) -> Iterator[Tracker]:
    """The MLflow run of the whole, which says how the body failed. Raises ClusterError when another one drives it."""
    make_folder(folder)
    with driving(folder):
        what = described_stages(staged, run_folder=folder)
        tracker = opened(staged.first, folder, name=staged.name, what=what, listener=listener)
        with told_of_its_end(tracker, folder, listener):
            yield tracker


def newest_begun(staged: StagedSpec, folder: Path) -> tuple[RunSpec, Path] | None:
    """(spec, run folder) of the stage that was begun last in a run of stages; None before the first."""
    begun = _begun(staged, folder)
    return begun[-1] if begun else None


def _begun(staged: StagedSpec, folder: Path) -> list[tuple[RunSpec, Path]]:
    found: dict[str, str] = read_json(folder / _BEGUN) or {}
    specs = {stage.spec.name: stage.spec for stage in staged.stages}
    return [(specs[name], Path(path)) for name, path in found.items() if name in specs]


def _forget_all(staged: StagedSpec, folder: Path) -> None:
    """Removes what earlier runs of these stages have left, as far as they were begun from here."""
    check_bucket_of(staged.first)
    for spec, path in _begun(staged, folder):
        forget(spec, path)
    forget(staged.first, folder)


def _with_base_found(staged: StagedSpec) -> StagedSpec:
    first, *others = staged.stages
    return replace(staged, stages=(replace(first, spec=with_base_found(first.spec)), *others))


def _check_all(staged: StagedSpec, *, cluster: ClusterShape | None) -> None:
    """Refuses what cannot work of any stage, before the first begins: its data, and its plan on this machine or, once
    it is known, on a cluster. Raises what `look_ahead` and `plan_to_run` raise, with the stage's name."""
    first, *later = staged.stages

    def check(spec: RunSpec) -> None:
        if cluster is None:
            look_ahead(spec)
        else:
            plan_to_run(spec, cluster)

    with first.named():
        check(first.spec)
    with stand_in_for_base(first.spec, cache=locations.data_cache()) as model:
        for before, stage in pairwise((first, *later)):
            spec = with_stand_in(stage.spec, model)
            with stage.named():
                check_follows(spec, before=before.spec.task)
                check(spec)
