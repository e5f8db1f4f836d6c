"""Runs of an MLflow experiment side by side: quality against cost, ranked, as values, JSON, a table and a link."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from orchestrator.credentials import hide
from orchestrator.errors import SpecError
from orchestrator.quantities import human_count
from orchestrator.tracking import store
from orchestrator.tracking.mlflow_run import (
    BEST_RUN_TAG,
    NON_FINITE_TAG,
    PARENT_TAG,
    STOP_REASON_TAG,
    TAG,
    search_runs,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from rich.table import Table

HIGHER_IS_BETTER = ("eval/accuracy",)
QUALITY_METRICS = ("eval/accuracy", "eval/loss", "eval/perplexity", "train/loss")
"""Which metric stands for quality when a run does not say, first found first."""
MOST_LINKED_RUNS = 50
"""Runs in a comparison link: MLflow's page gets slow above (a guess), and addresses have limits."""
# Scripts rely on the first line of names; later fields may be added behind them.
JSON_FIELDS = (
    *("run_id", "name", "kind", "method", "metrics", "tokens", "flops", "gpu_hours", "usd", "parent"),
    *("rank", "status", "task", "quality_metric", "quality", "steps", "learning_rate", "start_time_ms"),
    *("trials", "best_run_id", "note"),
)

HEADINGS = ("#", "run", "method", "lr", "steps", "quality", "tokens", "dev-h", "USD", "status")
"""Columns of the table: learning rate, device hours and US dollars under their short names."""
_WIDEST = {"run": 34, "status": 24}
_NARROWEST = {"run": 25, "status": 12}
"""Room for `finetune, eval/accuracy ↑` and for `stopped early`, wrapped."""
_LEFT_OUT_FIRST = ("tokens", "lr", "steps", "dev-h", "USD", "#", "method")


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
    quality: float | None = None
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
    """Run id of the search that a trial belongs to."""
    trials: int = 0
    """On a search: how many trials it has. Its quality is the best trial's and its cost that of all of them."""
    best_run_id: str | None = None
    """On a search: its best trial."""
    note: str | None = None
    """What else the reader should know: an error, a loss that became infinite."""
    rank: int | None = None
    """Place among the runs of the same kind and quality metric; None for trials and runs without a result."""

    @property
    def group(self) -> tuple[str, str]:
        """Runs are ranked against each other within a kind and quality metric: others do not compare.

        Nor do losses on hidden tokens and on the next token, so masked language models are a kind of their own.
        """
        kind = self.kind or "other"
        return (f"{kind} masked-lm" if self.task == "masked-lm" else kind, self.quality_metric or "no result")


def collect(uri: str, experiment: str) -> list[RunRow]:
    """All runs of an experiment, ranked, in display order; empty when it has none.

    Raises SpecError for an experiment that does not exist, StorageError when the store cannot be read.
    """
    uri = hide(store.absolute(uri))
    store.check_store(uri)
    client = store.client(uri, create=False)
    with store.translated(uri, doing=f"read the experiment {experiment!r}"):
        found = client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage == "deleted":
            names = sorted(item.name for item in client.search_experiments())
            raise SpecError(
                f"there is no experiment {experiment!r} in {hide(uri)}",
                got=experiment,
                allowed=", ".join(names),
                do="name one of these with --experiment, or another store with --tracking-uri",
            )
        rows = [_row(run) for run in search_runs(client, found.experiment_id)]
    return rank(_with_trials(rows))


def rank(rows: Iterable[RunRow]) -> list[RunRow]:
    """Rows in display order: by group, best first, runs without a result last, trials below their search.

    A search and its best trial are one result, so trials carry no rank of their own.
    """
    everything = list(rows)
    known = {row.run_id for row in everything}
    top = [row for row in everything if row.parent not in known]
    ranked: list[RunRow] = []
    groups = sorted({row.group for row in top}, key=lambda group: (group[1] == "no result", group))
    for group in groups:
        members = sorted((row for row in top if row.group == group), key=_sort_key)
        for place, row in enumerate(members, start=1):
            ranked.append(replace(row, rank=place if row.quality is not None else None))
            ranked.extend(sorted((child for child in everything if child.parent == row.run_id), key=_sort_key))
    return ranked


def to_json(rows: Iterable[RunRow]) -> dict[str, Any]:
    """The answer of `compare --json`: for each run the fields of `RunRow` named in `JSON_FIELDS`."""
    return {"runs": [{name: getattr(row, name) for name in JSON_FIELDS} for row in rows]}


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The losses of one run against the tokens it had seen."""

    run: RunRow
    train: tuple[tuple[float, float], ...]
    """(tokens, loss), by step."""
    evaluation: tuple[tuple[float, float], ...]


def loss_curves(uri: str, rows: Iterable[RunRow]) -> list[LossCurve]:
    """Curves of the runs that logged a loss and their tokens; one request per curve, so give only runs to draw.

    Raises StorageError when the store cannot be read.
    """
    uri = hide(store.absolute(uri))
    client = store.client(uri, create=False)
    curves = []
    with store.translated(uri, doing="read the loss curves"):
        for row in rows:
            # A search repeats the figures of its best trial, which is drawn itself.
            if row.trials or "train/tokens" not in row.metrics:
                continue
            tokens = _history(client, row, "train/tokens")
            curve = LossCurve(
                run=row,
                train=_against_tokens(_history(client, row, "train/loss"), tokens),
                evaluation=_against_tokens(_history(client, row, "eval/loss"), tokens),
            )
            if curve.train or curve.evaluation:
                curves.append(curve)
    return curves


@dataclass(frozen=True, kw_only=True)
class ComparisonLink:
    """Where MLflow shows the runs side by side."""

    url: str
    command: str | None
    """Starts the server behind `url` when the store is a bare database; None when a server runs already."""


def comparison_link(uri: str, rows: Sequence[RunRow]) -> ComparisonLink:
    """MLflow's own comparison of the first `MOST_LINKED_RUNS` rows."""
    shown = rows[:MOST_LINKED_RUNS]
    runs = quote(json.dumps([row.run_id for row in shown], separators=(",", ":")))
    experiments = quote(json.dumps(sorted({row.experiment_id for row in shown}), separators=(",", ":")))
    page = f"#/compare-runs?runs={runs}&experiments={experiments}"
    if uri.startswith("http"):
        return ComparisonLink(url=f"{hide(uri).rstrip('/')}/{page}", command=None)
    # Without the job runner and with one worker: 6 s and 0.5 GB instead of 25 s and 3 GB (measured, MLflow 3.17).
    command = (
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --workers 1 "
        f"--host 127.0.0.1 --port 5000 --backend-store-uri '{hide(store.absolute(uri))}'"
    )
    return ComparisonLink(url=f"http://127.0.0.1:5000/{page}", command=command)


def render_table(rows: Sequence[RunRow], *, experiment: str, width: int = 100) -> Table:
    """A table for a terminal of `width` columns; narrow ones do without the figures that say least."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not rows:
        message = Table(show_header=False, box=None)
        message.add_row(Text(f"No runs in {experiment!r} yet. Start one: orchestrator run SPEC"))
        return message
    known = {row.run_id for row in rows}
    lines = [(row, table_cells(row, is_trial=row.parent in known)) for row in rows]
    titles = {group_title(row.group) for row in rows}
    widths = _column_widths([cells for _, cells in lines], titles=titles, width=width)
    title = Text(f"{experiment}: {len(rows)} run{'s' if len(rows) > 1 else ''}", style="bold")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, columns in widths.items():
        left = heading in ("run", "method", "status")
        table.add_column(
            heading,
            width=columns,
            justify="left" if left else "right",
            overflow="fold" if heading == "status" else "ellipsis",
            no_wrap=heading != "status",
        )
    shown_group: tuple[str, str] | None = None
    for row, cells in lines:
        if row.parent not in known and row.group != shown_group:
            shown_group = row.group
            table.add_section()
            table.add_row(*([""] * list(widths).index("run")), Text(group_title(row.group), style="bold"))
        texts = [Text(text) for heading, text in zip(HEADINGS, cells, strict=True) if heading in widths]
        table.add_row(*texts, style="dim" if row.parent in known else None)
    return table


def group_title(group: tuple[str, str]) -> str:
    """`finetune, eval/accuracy ↑`: the arrow says which way is better."""
    kind, metric = group
    if metric == "no result":
        return f"{kind}, no result"
    return f"{kind}, {metric} {'↑' if metric in HIGHER_IS_BETTER else '↓'}"


def table_cells(row: RunRow, *, is_trial: bool) -> list[str]:
    """A row's text under `HEADINGS`; a trial is marked as belonging to the search above it."""
    name = f"└ {row.name}" if is_trial else row.name
    if row.trials:
        name += f" (best of {row.trials})"
    return [
        "" if row.rank is None else str(row.rank),
        name,
        row.method or "-",
        "-" if row.learning_rate is None else f"{row.learning_rate:.2g}",
        "-" if row.steps is None else str(row.steps),
        "-" if row.quality is None else f"{row.quality:.4g}",
        "-" if row.tokens is None else human_count(row.tokens),
        "-" if row.gpu_hours is None else f"{row.gpu_hours:.3g}",
        "-" if row.usd is None else f"{row.usd:.3g}",
        row.status.partition(" at step ")[0] + (f"; {row.note}" if row.note else ""),  # steps have their column
    ]


def _column_widths(lines: Sequence[Sequence[str]], *, titles: Iterable[str], width: int) -> dict[str, int]:
    """Columns to show and how wide: names and status give way a little, then figures are left out."""
    widths = {
        heading: min(max(len(heading), *(len(cells[place]) for cells in lines)), _WIDEST.get(heading, width))
        for place, heading in enumerate(HEADINGS)
    }
    widths["run"] = max(widths["run"], _NARROWEST["run"], *map(len, titles))
    give = {heading: widths[heading] - min(widths[heading], narrowest) for heading, narrowest in _NARROWEST.items()}
    for unwanted in ("", *_LEFT_OUT_FIRST):
        widths.pop(unwanted, None)
        excess = sum(widths.values()) + 2 * len(widths) - width  # rich puts two blanks between columns
        if excess <= sum(give.values()):
            break
    for heading, most in give.items():
        taken = min(most, max(0, excess))
        widths[heading] -= taken
        excess -= taken
    return widths


def _row(run: Any) -> RunRow:
    """An MLflow run as a row."""
    tags: dict[str, str] = run.data.tags
    points = [point for point in run.data.to_proto().metrics if math.isfinite(point.value)]
    metrics = {point.key: point.value for point in points}
    quality_metric = tags.get(f"{TAG}quality_metric") or next((key for key in QUALITY_METRICS if key in metrics), None)
    steps = max((point.step for point in points if point.key.startswith("train/")), default=None)
    learning_rate = run.data.params.get("training.learning_rate")
    return RunRow(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name or tags.get(f"{TAG}name", run.info.run_id),
        status=_status(run.info.status, tags.get(STOP_REASON_TAG), steps),
        start_time_ms=run.info.start_time,
        kind=tags.get(f"{TAG}kind"),
        method=tags.get(f"{TAG}method"),
        task=tags.get(f"{TAG}task"),
        metrics=metrics,
        quality_metric=quality_metric,
        quality=None if quality_metric is None else metrics.get(quality_metric),
        tokens=metrics.get("train/tokens"),
        flops=metrics.get("cost/flops"),
        gpu_hours=metrics.get("cost/gpu_hours"),
        usd=metrics.get("cost/usd"),
        steps=steps,
        learning_rate=_number(learning_rate),
        parent=tags.get(PARENT_TAG),
        best_run_id=tags.get(BEST_RUN_TAG),
        note=_note(tags),
    )


def _history(client: MlflowClient, row: RunRow, key: str) -> list[tuple[int, float]]:
    """Finite (step, value) pairs in order of steps; nothing for a metric the run has not logged."""
    if key not in row.metrics:
        return []
    points = client.get_metric_history(row.run_id, key)
    return sorted((point.step, point.value) for point in points if math.isfinite(point.value))


def _against_tokens(
    points: Sequence[tuple[int, float]], tokens: Sequence[tuple[int, float]]
) -> tuple[tuple[float, float], ...]:
    """(tokens, value) for (step, value): evaluations may lie between two logged steps."""
    import numpy as np

    steps_seen, tokens_seen = zip((0, 0.0), *tokens, strict=True)
    return tuple((float(np.interp(step, steps_seen, tokens_seen)), value) for step, value in points)


def _with_trials(rows: Sequence[RunRow]) -> list[RunRow]:
    """Searches with their trials counted; a search still running shows its best trial and their cost so far."""
    filled: list[RunRow] = []
    for row in rows:
        trials = [child for child in rows if child.parent == row.run_id]
        if not trials:
            filled.append(row)
            continue
        best = min(trials, key=_sort_key)
        chosen = next((child for child in trials if child.run_id == row.best_run_id), best)
        filled.append(
            replace(
                row,
                trials=len(trials),
                best_run_id=chosen.run_id,
                method=chosen.method,
                learning_rate=chosen.learning_rate,
                steps=chosen.steps,
                tokens=_total(child.tokens for child in trials),
                flops=_total(child.flops for child in trials),
                gpu_hours=_total(child.gpu_hours for child in trials),
                usd=_total(child.usd for child in trials),
                quality=row.quality if row.quality is not None else best.quality,
                quality_metric=row.quality_metric or best.quality_metric,
            )
        )
    return filled


def _sort_key(row: RunRow) -> tuple[bool, float, int]:
    """Best first, without a result last, and equals in the order they were started."""
    if row.quality is None:
        return (True, 0.0, row.start_time_ms)
    return (False, -row.quality if row.quality_metric in HIGHER_IS_BETTER else row.quality, row.start_time_ms)


def _status(status: str, stop_reason: str | None, steps: int | None) -> str:
    if stop_reason is None:
        return status.lower()
    early = "stopped early" if stop_reason == "pruned" else f"stopped by {stop_reason}"
    return early if steps is None else f"{early} at step {steps}"


def _note(tags: Mapping[str, str]) -> str | None:
    error = tags.get(f"{TAG}error")
    return tags.get(NON_FINITE_TAG) or (error.splitlines()[0] if error else None)


def _total(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) if known else None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
