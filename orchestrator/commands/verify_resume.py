"""`verify-resume`: proves exact resume on a user's own spec, by a real death.

Two trainings of the same first steps of the same plan: one undisturbed, one in which a worker is killed after a
checkpoint and which the normal retry resumes. Then every figure of every step and every tensor of the checkpoints is
compared, bit by bit. Where they differ, a third training, undisturbed too, tells whether the training repeats itself.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator import console
from orchestrator.commands.run import listening
from orchestrator.errors import ClusterError, SpecError
from orchestrator.load_spec import load_spec
from orchestrator.methods.registry import method_of
from orchestrator.search_space import trials
from orchestrator.spec import RunSpec

if TYPE_CHECKING:
    from orchestrator.planning.run_plan import RunPlan
    from orchestrator.scheduling.rehearsal import Rehearsal, Rehearsed
    from orchestrator.scheduling.run_lifecycle import Listener

DEFAULT_STEPS = 8
FEWEST_STEPS = 4
"""A checkpoint in the middle and a death two steps later."""
_FIGURES = ("train/tokens", "train/learning_rate", "train/loss", "train/grad_norm")
"""What a step logs that must repeat: its data, its rate, and what came of them. In the order of cause."""

Cause = Literal["resume", "training"]


@dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """Where two trainings part."""

    what: str
    """`metric`, or the kind of tensor: `weights`, `fp32 masters`, `first moments`, ..."""
    name: str
    """The metric, or the parameter's name in the model."""
    step: int
    largest_absolute: float
    """Not a number where one side is, or is missing."""
    largest_relative: float
    """To the larger of both magnitudes, so at most 2."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric over some steps, or one kind of tensor of one checkpoint."""

    label: str
    unit: Literal["steps", "tensors"]
    compared: int
    different: int
    first: FirstDifference | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verify-resume` answers; the fields up to `zero_stage` are a contract."""

    identical: bool
    steps: int
    resumed_from: int
    first_difference: FirstDifference | None
    """The earliest in time; None when there is none."""
    restarts: int
    workers: int
    zero_stage: int
    cause: Cause | None
    """When they differ: `training` where two undisturbed trainings differ too, else `resume`."""
    killed: str
    """Which process died after which step."""
    folder: str | None
    """The trainings, kept for a look when they differ."""
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def verify_command(path: str, overrides: Sequence[str] = (), *, steps: int = DEFAULT_STEPS, as_json: bool) -> int:
    """Verifies a spec file and shows the verdict; the exit code: 0 identical, 1 different. Raises as `verify` does."""
    spec = load_spec(path, overrides)
    check_request(spec, steps)
    with listening(console.ProgressLine()) as listener:
        verdict = verify(spec, listener, steps=steps)
    if as_json:
        console.print_json(verdict.to_dict())
    else:
        console.print_lines(*describe(verdict))
    return 0 if verdict.identical else 1


def check_request(spec: RunSpec, steps: int) -> None:
    """Refuses what can be known wrong from the spec alone; raises SpecError."""
    if not method_of(spec.method).trains:
        raise SpecError(
            "verify-resume compares two trainings, and this method trains nothing",
            got=f"method: {spec.method}",
            do="give a spec with another method",
        )
    if spec.search is not None:
        point = trials(spec)[0].overrides.items()
        raise SpecError(
            "verify-resume takes one training, and this spec is a search",
            got=f"search over {', '.join(spec.search.space)}",
            do=f"verify one of its trainings: add search=null {' '.join(f'{k}={json.dumps(v)}' for k, v in point)}",
        )
    if steps < FEWEST_STEPS:
        raise SpecError(
            "too few steps for a checkpoint in the middle, a death after it and a resume",
            got=f"--steps {steps}",
            allowed=f"{FEWEST_STEPS} or more",
        )


def verify(spec: RunSpec, listener: Listener, *, steps: int = DEFAULT_STEPS) -> Verdict:
    """Rehearses and compares on the cluster that `run` would take; what was trained stays only where it differs.

    Raises what `launch` raises before a training starts and what a training raises, Interrupted when asked to stop,
    and ClusterError when the killed training did not go on from its checkpoint.
    """
    from orchestrator.planning.plan_to_run import plan_to_run
    from orchestrator.scheduling.launch import connected_session, look_ahead
    from orchestrator.scheduling.rehearsal import Rehearsal
    from orchestrator.scheduling.run_folder import check_storage, make_folder
    from orchestrator.scheduling.run_lifecycle import prepare_run
    from orchestrator.scheduling.session import expected_shape
    from orchestrator.tracking.finished_model import with_base_found

    check_request(spec, steps)
    spec = with_base_found(spec)
    check_storage(spec)
    data, shape = look_ahead(spec).data, expected_shape()
    if shape is not None:
        _check_length(plan_to_run(spec, shape, counts=None if data is None else data.counts), steps)
    with connected_session(listener, spec) as cluster:
        prepared = prepare_run(spec, cluster, listener)
        _check_length(prepared.plan, steps)
        storage = prepared.run_folder.parent
        make_folder(storage)
        folder = Path(tempfile.mkdtemp(prefix=f"verify-{spec.name}-", dir=storage))
        verdict: Verdict | None = None
        try:
            verdict = _verdict(Rehearsal(prepared=prepared, steps=steps, folder=folder), listener)
        finally:
            if verdict is None or verdict.identical:
                shutil.rmtree(folder, ignore_errors=True)
    return verdict


def _check_length(plan: RunPlan, steps: int) -> None:
    if plan.steps is not None and steps > plan.steps:
        raise SpecError(
            "the training is shorter than what should be verified",
            got=f"--steps {steps}",
            allowed=f"{FEWEST_STEPS} to {plan.steps}, the plan's steps",
            do="lower --steps" if plan.steps >= FEWEST_STEPS else "give the training more steps",
        )


def _verdict(rehearsal: Rehearsal, listener: Listener) -> Verdict:
    """Two trainings and, where they differ, a third."""
    from orchestrator.scheduling.rehearsal import STEPS_LOST, rehearse

    steps, middle, plan = rehearsal.steps, rehearsal.middle, rehearsal.prepared.plan
    listener.say(f"training 1: {steps} steps, undisturbed")
    undisturbed = rehearse(rehearsal, listener, name="undisturbed")
    listener.say(f"training 2: a checkpoint at step {middle}, and a worker is killed after step {middle + STEPS_LOST}")
    killed = rehearse(rehearsal, listener, name="killed", with_death=True)
    _check_resumed(killed, middle)
    comparisons = tuple(_compare(rehearsal, undisturbed, killed))
    first = next((comparison.first for comparison in _in_time(comparisons)), None)
    cause: Cause | None = None
    if first is not None:
        listener.say("training 3: they differ; does the training repeat itself, undisturbed?")
        again = rehearse(rehearsal, listener, name="again")
        cause = "training" if _in_time(_compare(rehearsal, undisturbed, again)) else "resume"
    return Verdict(
        identical=first is None,
        steps=steps,
        resumed_from=middle,
        first_difference=first,
        restarts=killed.restarts,
        workers=plan.workers,
        zero_stage=plan.zero_stage,
        cause=cause,
        killed=f"{killed.killed}, after step {middle + STEPS_LOST}",
        folder=None if first is None else str(rehearsal.folder),
        comparisons=comparisons,
    )


def _check_resumed(killed: Rehearsed, middle: int) -> None:
    """Two equal trainings prove nothing unless one of them was resumed; raises ClusterError."""
    resumed_from = resumed_step(read_points(killed.run_folder))
    if killed.killed is None or resumed_from != middle:
        raise ClusterError(
            f"the killed training did not go on from its checkpoint of step {middle}",
            got="no worker was killed" if killed.killed is None else f"it went on from step {resumed_from}",
            do="try again; if it stays so, `orchestrator doctor` looks at disks and versions",
        )


# -- comparing -------------------------------------------------------------------------------------------------------

Point = tuple[int, str, float]
"""Step, metric and value, in the order of writing."""
Figures = Mapping[tuple[int, str], Sequence[float]]
"""Every value of a metric at a step: more than one where the step was taken again."""


def _compare(rehearsal: Rehearsal, one: Rehearsed, other: Rehearsed) -> Iterator[Comparison]:
    """In time: the steps up to the resume and their checkpoint, then those after it and theirs."""
    mine, theirs = (collect(read_points(each.run_folder)) for each in (one, other))
    for steps in (range(1, rehearsal.middle + 1), range(rehearsal.middle + 1, rehearsal.steps + 1)):
        yield from compare_figures(mine, theirs, steps=steps)
        yield from _compare_checkpoints(one, other, step=steps[-1])


def read_points(run_folder: Path) -> list[Point]:
    """What a run has logged, attempt after attempt; the one place here that knows how the outbox writes it."""
    files = sorted((run_folder / "outbox").rglob("*.jsonl"), key=lambda file: (len(file.name), file.name))
    points = (json.loads(text) for file in files for text in file.read_text().splitlines())
    return [(point["step"], point["key"], point["value"]) for point in points]


def resumed_step(points: Iterable[Point]) -> int | None:
    """The step after which a run went on when it last went back; None when it never did."""
    steps = [step for step, metric, _ in points if metric == "train/loss"]
    return next((later - 1 for earlier, later in reversed(list(pairwise(steps))) if later <= earlier), None)


def collect(points: Iterable[Point]) -> Figures:
    """Points by step and metric."""
    found: dict[tuple[int, str], list[float]] = {}
    for step, metric, value in points:
        found.setdefault((step, metric), []).append(value)
    return found


def compare_figures(one: Figures, other: Figures, *, steps: Sequence[int]) -> Iterator[Comparison]:
    """The figures of some steps, the first run being the reference; a step that was taken twice must fit twice."""
    for name in _FIGURES:
        known = [step for step in steps if (step, name) in one or (step, name) in other]
        wrong = [
            (step, abs(a - b), _relative(a, b))
            for step in known
            for a in one.get((step, name), [math.nan])[:1]
            for b in other.get((step, name), [math.nan])
            if a.hex() != b.hex()
        ]
        if not known:
            continue
        first = None
        if wrong:
            first = FirstDifference(
                what="metric",
                name=name,
                step=wrong[0][0],
                largest_absolute=max(absolute for _, absolute, _ in wrong),
                largest_relative=max(relative for _, _, relative in wrong),
            )
        yield Comparison(
            label=f"steps {steps[0]} to {steps[-1]}, {name}",
            unit="steps",
            compared=len(known),
            different=len({step for step, *_ in wrong}),
            first=first,
        )


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0


def _compare_checkpoints(one: Rehearsed, other: Rehearsed, *, step: int) -> Iterator[Comparison]:
    from orchestrator.checkpoints.diff import compare_checkpoints

    for part in compare_checkpoints(one.checkpoint(step), other.checkpoint(step)):
        yield Comparison(
            label=f"checkpoint of step {step}, {part.what}",
            unit="tensors",
            compared=part.compared,
            different=part.different,
            first=None if part.first is None else FirstDifference(step=step, **asdict(part.first)),
        )


def _in_time(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those that differ, the earliest first; of one step the figures before the tensors that came of it."""
    return sorted(
        (comparison for comparison in comparisons if comparison.first is not None),
        key=lambda comparison: 0 if comparison.first is None else comparison.first.step,
    )


# -- words -----------------------------------------------------------------------------------------------------------

_EXPLANATION: Mapping[Cause, str] = {
    "training": "Two undisturbed trainings differ as well, so this is not the resume's doing: the training does not\n"
    "repeat itself. On a GPU, kernels that add with atomics (gradients of embeddings and of some attentions) change\n"
    "the order of sums, and so does NCCL's choice of algorithm (NCCL_ALGO=Ring keeps one); on a CPU, threads may\n"
    "(resources.cpus_per_worker=1).",
    "resume": "Undisturbed, the training repeats itself, so the resume is at fault: please report this with the lines\n"
    "above and the folder below.",
}


def describe(verdict: Verdict) -> list[str]:
    """One line for each comparison, then the verdict."""
    lines = [*map(_line, verdict.comparisons), ""]
    lines.append(
        f"{verdict.workers} worker{'s' if verdict.workers > 1 else ''}, ZeRO stage {verdict.zero_stage}; killed: "
        f"{verdict.killed}; {verdict.restarts} restart{'s' if verdict.restarts > 1 else ''}, "
        f"resumed from step {verdict.resumed_from}"
    )
    first = verdict.first_difference
    if first is None or verdict.cause is None:
        return [*lines, f"identical, bit for bit, up to step {verdict.steps}"]
    return [
        *lines,
        f"different: first at step {first.step} in {first.name} ({first.what}), {_apart(first)}",
        _EXPLANATION[verdict.cause],
        f"the trainings are kept in {verdict.folder}",
    ]


def _line(comparison: Comparison) -> str:
    first = comparison.first
    if first is None:
        return f"{comparison.label:<40}{comparison.compared} {comparison.unit} identical"
    where = f"step {first.step}" if comparison.unit == "steps" else first.name
    counts = f"{comparison.different} of {comparison.compared} {comparison.unit} differ"
    return f"{comparison.label:<40}{counts}, first {where}, {_apart(first)}"


def _apart(first: FirstDifference) -> str:
    return f"by at most {first.largest_absolute:.3g} ({first.largest_relative:.3g} relative)"
