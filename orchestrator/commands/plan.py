"""`plan` as a person meets it: a look at the data, the plan, and of a search or of stages what all take. Nothing is
started.

Loads none of torch, Ray and MLflow (a base that is a finished run's model is looked up in MLflow's store). Where the
data does not lie on this machine, as when a plan is made for another, the plan is made without it, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import console, locations
from orchestrator.data.sources import find_sources
from orchestrator.errors import CapacityError, DataError, SpecError
from orchestrator.load_stages import load_any
from orchestrator.planning.hardware import local_cluster, requested_cluster
from orchestrator.planning.plan import check_follows, make_plan, plan_stage
from orchestrator.planning.run_plan import ClusterShape, RunPlan
from orchestrator.planning.search_plan import SearchPlan, plan_search, trials_at_a_time
from orchestrator.planning.stages_plan import StagesPlan, plan_stages
from orchestrator.planning.throughput import MeasuredSpeed
from orchestrator.planning.views import plan_answer, plan_table, stages_table
from orchestrator.ranking import Measured, check_alike
from orchestrator.scheduling.search.rungs import rung_steps
from orchestrator.search_space import Trial, trials
from orchestrator.spec import RunSpec
from orchestrator.spec_data import DataSpec, SplitName
from orchestrator.spec_stages import Stage, StagedSpec
from orchestrator.tracking.finished_model import with_base_found

if TYPE_CHECKING:
    from rich.console import Group

    from orchestrator.policy.corrections import Corrections
    from orchestrator.samples.forms.data_figures import DataLook


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What `plan` answers."""

    plan: RunPlan
    """Of the training, or of a search's base training."""
    data: DataLook | None
    """None where it does not lie here."""
    why_not: str | None
    """Why the data was not looked at."""
    metrics: tuple[str, ...]
    """Names of what will be logged."""
    search: SearchPlan | None
    """None for a single training."""

    def sentences(self) -> tuple[str, ...]:
        """What the data holds, in words."""
        return (f"not looked at: {self.why_not}",) if self.data is None else tuple(self.data.sentences())

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `plan`: every field of the plan, under names that do not change, and what else is known."""
        return plan_answer(self.plan) | {
            "data": None if self.data is None else self.data.to_dict(),
            "data_not_looked_at": self.why_not,
            "metrics": list(self.metrics),
            "search": None if self.search is None else asdict(self.search),
        }


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a plan is made for; this machine where nothing is given."""

    gpu: str | None
    gpus: int
    nodes: int
    cluster_file: Path | None

    def clusters(self) -> tuple[ClusterShape, ...]:
        """The clusters to try, in this order. Raises SpecError where options contradict each other."""
        if self.cluster_file is None:
            return (local_cluster() if self.gpu is None else requested_cluster(self.gpu, self.gpus, self.nodes),)
        if self.gpu is not None:
            raise SpecError("--cluster says which GPUs there are, and --gpu too", do="give one of both")
        from orchestrator.cluster_files.largest import largest_clusters

        return largest_clusters(self.cluster_file)


def plan_command(path: str, overrides: Sequence[str], *, where: Where, history: str | None, as_json: bool) -> None:
    """Looks, plans and shows. Raises what `load_any`, `look`, `read_history` and `make_plan` raise."""
    loaded = load_any(path, overrides)
    planner = Planner() if history is None else _learnt(history)
    found = preview_on_first(loaded, where.clusters(), planner=planner)
    if as_json:
        console.print_json(found.to_dict())
    elif isinstance(found, StagesPreview):
        console.print_table(found.table())
    else:
        console.print_table(plan_table(found.plan, data=found.sentences(), metrics=found.metrics, search=found.search))


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes plans with what past runs say of a device's speed, where there are some."""

    corrections: Corrections | None = None

    def plan(self, make: Callable[..., RunPlan]) -> RunPlan:
        """What `make` plans where it is told of that speed, as `measured`; of device and size it learns by planning at
        the catalogue's first."""
        first = make()
        if self.corrections is None:
            return first
        found = self.corrections.throughput(
            first.device_name, first.precision, parameters=first.parameters, devices=first.workers
        )
        if not found.runs:
            return replace(first, reasons=(*first.reasons, f"history: {found.reason}"))
        return make(measured=MeasuredSpeed(factor=found.factor, reason=found.reason))


def _learnt(history: str) -> Planner:
    from orchestrator.policy.corrections import corrections
    from orchestrator.tracking.past_runs import read_history

    return Planner(corrections=corrections(read_history(history).records))


def preview_on_first(
    loaded: RunSpec | StagedSpec, clusters: Sequence[ClusterShape], *, planner: Planner | None = None
) -> Preview | StagesPreview:
    """The plan on the first of some clusters that has room for it.

    Raises what `preview` raises, of the first where none has room.
    """
    short: CapacityError | None = None
    planner = planner or Planner()
    for cluster in clusters:
        try:
            if isinstance(loaded, StagedSpec):
                return preview_stages(loaded, cluster, planner)
            return preview(with_base_found(loaded), cluster, planner)
        except CapacityError as error:
            short = short or error
    raise short or CapacityError("the cluster can have no node but its head", do="raise max_workers in its file")


def preview(spec: RunSpec, cluster: ClusterShape, planner: Planner) -> Preview:
    """The plan of a spec on a cluster, made after a look at its data."""
    from orchestrator.samples.metric_names import check_goal, logged_metrics

    check_goal(spec)
    make_plan(spec, cluster)  # what is wrong without the data is refused before it is read
    eyes = _Eyes()
    data, why_not = eyes.look(spec)
    counts = None if data is None else data.counts
    return Preview(
        plan=planner.plan(partial(make_plan, spec, cluster, counts=counts)),
        data=data,
        why_not=why_not,
        metrics=logged_metrics(spec),
        search=None if spec.search is None else _search(spec, cluster, eyes, planner),
    )


@dataclass(frozen=True, kw_only=True)
class StagesPreview:
    """What `plan` answers of a spec with stages."""

    staged: StagedSpec
    whole: StagesPlan
    stages: tuple[Preview, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `plan`: of the whole what can be added up, and in `stages` what it answers of each."""
        each = zip(self.staged.stages, self.stages, strict=True)
        return self.whole.to_dict() | {
            "stages": [
                {"name": stage.name, "cycle": stage.cycle, "task": stage.spec.task, "method": stage.spec.method}
                | found.to_dict()
                for stage, found in each
            ]
        }

    def table(self) -> Group:
        """For a person."""
        stages = self.staged.stages
        return stages_table(
            self.whole,
            labels=[stage.label for stage in stages],
            tasks=[stage.spec.task for stage in stages],
            data=[found.sentences() for found in self.stages],
        )


def preview_stages(staged: StagedSpec, cluster: ClusterShape, planner: Planner) -> StagesPreview:
    """The plans of all stages on a cluster, each made after a look at its data.

    Raises what `preview` raises, with the stage that it is about.
    """
    from orchestrator.samples.stand_in import stand_in_for_base, with_stand_in

    eyes, first = _Eyes(), with_base_found(staged.first)
    with staged.stages[0].named():
        found = [preview(first, cluster, planner)]
        is_known = first.model.base is not None or found[0].data is not None
        base = stand_in_for_base(first, cache=locations.data_cache()) if is_known else nullcontext(first.model)
    with base as model:
        for before, stage in pairwise(staged.stages):
            spec = with_stand_in(stage.spec, model)
            with stage.named():
                check_follows(spec, before=before.spec.task)
                looked = eyes.look(spec) if is_known else (None, "it needs the tokenizer of the first stage's data")
                found.append(_planned_stage(spec, before, cluster, planner, looked))
    plans = [one.plan for one in found]
    return StagesPreview(staged=staged, whole=plan_stages(staged, plans), stages=tuple(found))


def _planned_stage(
    spec: RunSpec, before: Stage, cluster: ClusterShape, planner: Planner, looked: tuple[DataLook | None, str | None]
) -> Preview:
    from orchestrator.samples.metric_names import check_goal, logged_metrics

    check_goal(spec)
    data, why_not = looked
    begins_with = f"base: the model that stage {before.label} leaves; here its architecture alone is known"
    counts = None if data is None else data.counts
    plan = planner.plan(partial(plan_stage, spec, cluster, counts=counts, begins_with=begins_with))
    return Preview(plan=plan, data=data, why_not=why_not, metrics=logged_metrics(spec), search=None)


class _Eyes:
    """Looks at data, once for all specs that share it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[DataLook | None, str | None]] = {}

    def look(self, spec: RunSpec) -> tuple[DataLook | None, str | None]:
        """(what the data holds, or None and why it was not looked at)."""
        if spec.data_key not in self._seen:
            self._seen[spec.data_key] = _look(spec)
        return self._seen[spec.data_key]


def _look(spec: RunSpec) -> tuple[DataLook | None, str | None]:
    general = spec.of_general_data
    read: tuple[tuple[DataSpec, str | tuple[str, ...] | None, SplitName], ...] = (
        (spec.data, spec.data.train, "train"),
        (spec.data, spec.data.validation, spec.data.validation_split),
        (spec.data, spec.data.test, spec.data.test_split),
        *(() if general is None else ((general.data, general.data.train, "train"),)),
    )
    for data, location, split in read:
        try:
            sources = (
                ()
                if location is None
                else find_sources(location, exclude=data.exclude, data_format=data.format, split=split)
            )
        except DataError as error:
            if not error.what.endswith(("does not exist", "matches no file")):
                raise
            return None, f"{error.what} on this machine, where `run` would refuse it ({error.got}; {error.do})"
        if any(source.reader == "hub" for source in sources):
            return None, f"{location} is on the hub: `run` downloads it, and the same plan then knows it"
    from orchestrator.samples.data_look import look

    return look(spec, cache=locations.data_cache()), None


def _search(spec: RunSpec, cluster: ClusterShape, eyes: _Eyes, planner: Planner) -> SearchPlan:
    assert spec.search is not None
    points = trials(spec)
    looks = [eyes.look(trial.spec)[0] for trial in points]
    check_alike(
        {trial.name: _measured(trial.spec, data) for trial, data in zip(points, looks, strict=True) if data},
        spec.goal.metric,
    )
    plans = [
        planner.plan(partial(make_plan, trial.spec, cluster, counts=None if data is None else data.counts))
        for trial, data in zip(points, looks, strict=True)
    ]
    asked = spec.search.max_concurrent
    return plan_search(
        plans,
        names=[trial.name for trial in points],
        rungs=_rungs(spec, points, plans),
        reduction_factor=spec.search.reduction_factor,
        at_a_time=trials_at_a_time(plans, cluster, most=None if asked == "auto" else asked),
        budget=spec.parsed_budget,
    )


def _measured(spec: RunSpec, data: DataLook) -> Measured:
    """How a trial will be measured, as far as that is known before its tokenizer is read."""
    model = spec.model
    is_new = model.base is None and model.tokenizer == "auto"
    return Measured(
        task=spec.task,
        held_out=data.held_out.fingerprint,
        tokenizer=str(model.vocab_size) if is_new else None,
        masking_rate=spec.training.masking_rate,
    )


def _rungs(spec: RunSpec, points: Sequence[Trial], plans: Sequence[RunPlan]) -> tuple[int, ...]:
    """Steps at which ASHA compares trials."""
    assert spec.search is not None
    every = [trial.spec.training.eval_every_steps for trial in points if spec.search.scheduler == "asha"]
    return rung_steps(
        grace=spec.search.grace_steps,
        intervals=[steps for steps in every if steps is not None],
        reduction_factor=spec.search.reduction_factor,
        longest=max((plan.steps or 0 for plan in plans), default=0),
    )
