"""What `compare` knows of a run, and how runs are ranked: only those that were measured alike. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from orchestrator.ranking import WORST, Goal, Measured
from orchestrator.tasks.registry import LEARNT

NO_RESULT = "no result"
_PRUNED = "stopped early"
_STAGES = "stages"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What runs have in common that are ranked against each other.

    Losses on hidden tokens and on the next token do not compare, so masked language models are a kind of their own.
    """

    kind: str
    goal: Goal | None
    """None of runs without a result."""
    held_out: str | None
    """Fingerprint of the data they were measured on; None is what earlier versions have not recorded."""
    unit: str | None
    """What a value is a mean over, where tokenizers differ in that."""

    @property
    def title(self) -> str:
        """`finetune, eval/accuracy ↑`: the arrow says which way is better."""
        if self.goal is None:
            return f"{self.kind}, {NO_RESULT}"
        return f"{self.kind}, {self.goal.metric} {'↑' if self.goal.higher_is_better else '↓'}"


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run as `compare` shows it. None is a figure that the run has not logged."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    """`finished`, `running`, `failed`, `killed`, `stopped early at step 40`, `stopped by budget at step 40`."""
    start_time_ms: int
    kind: str | None = None
    method: str | None = None
    task: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last finite value of every metric."""
    quality_metric: str | None = None
    quality_mode: str | None = None
    """`min` or `max` where the run says which way its metric is good."""
    quality: float | None = None
    """At the last evaluation; None where that gave no number."""
    held_out_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    masking_rate: float | None = None
    tokens: float | None = None
    """Tokens seen."""
    flops: float | None = None
    gpu_hours: float | None = None
    """Device hours on a CPU."""
    usd: float | None = None
    steps: int | None = None
    """Optimizer steps done."""
    learning_rate: float | None = None
    """Peak, as set."""
    parent: str | None = None
    """Run id of the search that a trial belongs to, or of the whole that a stage belongs to."""
    role: str | None = None
    """`search` or `stages` of a run whose parts are runs themselves."""
    trials: int = 0
    """On a search: how many trials it has. Its quality is the best trial's and its cost that of all of them. On a run
    of stages the same of its stages; its quality is the last one's."""
    best_run_id: str | None = None
    """On a search: its best trial; on a run of stages: the last."""
    note: str | None = None
    """What else the reader should know: an error, a loss that became infinite."""
    group_title: str | None = None
    """Of the group that it is ranked in, once it is."""
    rank: int | None = None
    """Place in its group; None for trials and runs without a result."""

    @property
    def goal(self) -> Goal | None:
        """What ranks it."""
        return None if self.quality_metric is None else Goal.of(self.quality_metric, self.quality_mode)

    @property
    def goodness(self) -> float:
        """Larger is better; `WORST` without a result."""
        return WORST if self.goal is None else self.goal.goodness(self.quality)

    @property
    def measured(self) -> Measured:
        """On what, and in what."""
        return Measured(
            task=self.task,
            held_out=self.held_out_fingerprint,
            tokenizer=self.tokenizer_fingerprint,
            masking_rate=self.masking_rate,
        )

    @property
    def group(self) -> Group:
        """Whom it is ranked against."""
        kind, task = self.kind or "other", LEARNT.get(self.task or "")
        return Group(
            kind=kind if task is None else task.group(kind),
            goal=self.goal,
            held_out=None if self.goal is None else self.held_out_fingerprint,
            unit=None if self.goal is None else self.measured.unit(self.goal.metric),
        )


def rank(rows: Iterable[RunRow]) -> list[RunRow]:
    """Rows in display order: by group, best first, runs without a result last, trials below their search and
    stages, in their order, below the whole.

    A search and its best trial are one result, so trials carry no rank of their own. They stand in the order in which
    the search ranks them: those that came to an end by their last value, then those it stopped early, the later first.
    """
    everything = list(rows)
    known = {row.run_id for row in everything}
    top = [row for row in everything if row.parent not in known]
    titles = group_titles(row.group for row in top)
    sizes = Counter(row.group for row in top)

    def place(group: Group) -> tuple[Any, ...]:
        metric = "" if group.goal is None else group.goal.metric
        return (group.goal is None, group.kind, metric, -sizes[group], group.held_out or "", group.unit or "")

    ranked: list[RunRow] = []
    for group in sorted(sizes, key=place):
        title = "; ".join(titles[group])
        for number, row in enumerate(sorted((row for row in top if row.group == group), key=_order), start=1):
            ranked.append(replace(row, group_title=title, rank=number if row.goodness > WORST else None))
            order = _order_of_stages if row.role == _STAGES else _order_of_trials
            below = sorted((child for child in everything if child.parent == row.run_id), key=order)
            ranked.extend(replace(child, group_title=title) for child in below)
    return ranked


def group_titles(groups: Iterable[Group]) -> dict[Group, list[str]]:
    """The title of each group, and below it what tells it from others of that title: on what it was measured."""
    return told_apart({group: (group.title, group.held_out, group.unit) for group in groups})


def told_apart(groups: Mapping[Key, tuple[str, str | None, str | None]]) -> dict[Key, list[str]]:
    """Lines for each of some (title, held-out data, unit): the title, and where several share it what differs."""
    lines: dict[Key, list[str]] = {}
    for key, (title, held_out, unit) in groups.items():
        same = [other for other in groups.values() if other[0] == title]
        lines[key] = [title]
        if len({other[1] for other in same}) > 1:
            lines[key].append(f"on held-out data {held_out[:8]}" if held_out else "held-out data not recorded")
        if len({other[2] for other in same}) > 1:
            lines[key].append(f"in {unit}" if unit else "tokenizer not recorded")
    return lines


def with_trials(rows: Sequence[RunRow]) -> list[RunRow]:
    """Searches with their trials counted; a search still running shows its best trial and their cost so far."""
    filled: list[RunRow] = []
    for row in rows:
        trials = [child for child in rows if child.parent == row.run_id]
        if not trials:
            filled.append(row)
            continue
        if row.role == _STAGES:
            filled.append(_with_stages(row, sorted(trials, key=_order_of_stages)))
            continue
        best = min(trials, key=_order_of_trials)
        chosen = next((child for child in trials if child.run_id == row.best_run_id), best)
        filled.append(
            replace(
                row,
                trials=len(trials),
                best_run_id=chosen.run_id,
                method=chosen.method,
                learning_rate=chosen.learning_rate,
                steps=chosen.steps,
                held_out_fingerprint=chosen.held_out_fingerprint,
                tokenizer_fingerprint=chosen.tokenizer_fingerprint,
                masking_rate=chosen.masking_rate,
                tokens=_total(child.tokens for child in trials),
                flops=_total(child.flops for child in trials),
                gpu_hours=_total(child.gpu_hours for child in trials),
                usd=_total(child.usd for child in trials),
                quality=row.quality if row.quality is not None else chosen.quality,
                quality_metric=row.quality_metric or chosen.quality_metric,
                quality_mode=row.quality_mode or chosen.quality_mode,
            )
        )
    return filled


def _with_stages(row: RunRow, stages: Sequence[RunRow]) -> RunRow:
    """A run of stages with the figures of the newest, which its end repeats, and the costs of all: those that it has
    summed itself count stages that lie below an earlier run, too."""
    newest = stages[-1]
    repeated = ("kind", "method", "task", "learning_rate", "steps", "masking_rate")
    measured = ("quality", "quality_metric", "quality_mode", "held_out_fingerprint", "tokenizer_fingerprint")
    costs = {name: _total(getattr(stage, name) for stage in stages) for name in ("flops", "gpu_hours", "usd")}
    own = {name: value for name in costs if (value := getattr(row, name)) is not None}
    return replace(
        row,
        trials=max(row.trials, len(stages)),
        best_run_id=newest.run_id,
        tokens=_total(stage.tokens for stage in stages),
        **{name: getattr(newest, name) for name in (*repeated, *measured)},
        **(costs | own),
    )


def _order_of_stages(row: RunRow) -> tuple[int, str]:
    """As they were begun."""
    return (row.start_time_ms, row.name)


def _order(row: RunRow) -> tuple[float, int]:
    """Best first, without a result last, and equals in the order they were started."""
    return (-row.goodness, row.start_time_ms)


def _order_of_trials(row: RunRow) -> tuple[int, int, float, int]:
    """A value of a trial that was stopped says nothing beside those of trials that went on."""
    if row.status.startswith(_PRUNED):
        return (1, -(row.steps or 0), *_order(row))
    return (2 if row.status in ("failed", "killed") else 0, 0, *_order(row))


def _total(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) if known else None
