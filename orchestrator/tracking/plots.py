"""Two pictures of a comparison: loss against tokens, and quality against cost. Values in, PNG files out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.charts import GREY, INK, PALETTE, drawn, format_log_axis, name_line_ends, name_points, pareto_front
from orchestrator.methods.registry import METHODS
from orchestrator.quantities import human_count
from orchestrator.tracking.compare import LossCurve
from orchestrator.tracking.rows import RunRow, group_titles, told_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_COLOURED = 6
"""Lines of a panel that get a colour and a name; more cannot be told apart."""
MOST_LABELS = 8
"""Points of a panel that get a name."""

METHOD_STYLE: Mapping[str, tuple[str, str]] = {
    method.name: (PALETTE[method.colour], method.marker) for method in METHODS
}
"""Colour and marker of each method: the shape tells them apart without colour."""
OTHER_STYLE = ("#666666", "v")
Item = TypeVar("Item")


def plot_losses(curves: Sequence[LossCurve], path: Path) -> None:
    """Loss against tokens, a panel for each kind, task, held-out data and tokenizer: losses compare only within one.

    The best `MOST_COLOURED` runs of a panel are named at the ends of their lines, the others are grey.
    """
    panels = _grouped(curves, lambda curve: _panel(curve.run))
    titles = told_apart({panel: panel for panel in panels})
    with drawn(path, panels=len(panels), nothing="No run has logged train/loss and train/tokens yet") as axes:
        for ax, (panel, members) in zip(axes, panels.items(), strict=False):
            best_first = sorted(members, key=_best_loss)
            for curve in best_first[MOST_COLOURED:]:
                _draw_curve(ax, curve, colour=GREY, faint=True)
            ends = [
                (_draw_curve(ax, curve, colour=colour, faint=False), _short(curve.run.name), colour)
                for curve, colour in zip(best_first, PALETTE, strict=False)
            ]
            _format_loss_axes(ax, best_first)
            others = len(best_first) - len(ends)
            note = "line: train, smoothed    dot: held-out" + (f"    grey: {others} more runs" if others > 0 else "")
            ax.set_title("\n".join(titles[panel]))
            ax.set_title(note, loc="right", fontweight="normal", fontsize=8.5, color="#555555")
            name_line_ends(ax, ends)


def plot_quality_against_cost(rows: Sequence[RunRow], path: Path) -> None:
    """Quality against cost, a panel for each group, with the Pareto front of the single trainings.

    Cost is US dollars where every run has a price above zero, else device hours. A search stands at its total cost.
    """
    unit, cost_of = _cost_axis(rows)
    shown = [row for row in rows if row.goal is not None and row.quality is not None and (cost_of(row) or 0.0) > 0]
    panels = _grouped(shown, lambda row: row.group)
    titles = group_titles(panels)
    with drawn(path, panels=len(panels), nothing="No run has logged both a quality and a cost yet") as axes:
        for ax, (group, members) in zip(axes, panels.items(), strict=False):
            assert group.goal is not None, "those without a result are left out"
            higher = group.goal.higher_is_better
            points = [(float(cost_of(row) or 0.0), float(row.quality or 0.0)) for row in members]
            single = [point for row, point in zip(members, points, strict=True) if not row.trials]
            front = pareto_front(single, higher_is_better=higher)
            _draw_front(ax, front)
            _draw_points(ax, members, points)
            format_log_axis(ax, [cost for cost, _ in points], lambda cost: _cost_text(cost, unit))
            ax.margins(x=0.12, y=0.16)
            ax.set_xlabel(f"cost ({unit})")
            ax.set_ylabel(f"{group.goal.metric} ({'higher' if higher else 'lower'} is better)")
            ax.set_title("\n".join([f"{group.kind}, {group.goal.metric} against cost", *titles[group][1:]]))
            _method_legend(ax, members, with_front=len(front) > 1)
            name_points(ax, _named(members, points, front, higher_is_better=higher), points=points, lines=[front])


def _panel(run: RunRow) -> tuple[str, str | None, str | None]:
    """(title, held-out data, unit of the loss)."""
    return f"{run.kind or 'other'}, {run.task or 'loss'}", run.held_out_fingerprint, run.measured.unit("eval/loss")


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average over about a fiftieth of the curve: no lag, and narrower at its steep start."""
    import numpy as np

    reach = len(values) // 100
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(reach, places // 5)
    after = np.minimum(before, len(values) - 1 - places)
    return [float(mean) for mean in (sums[places + after + 1] - sums[places - before]) / (before + after + 1)]


def _draw_curve(ax: Axes, curve: LossCurve, *, colour: str, faint: bool) -> tuple[float, float]:
    """Draw one run; returns the end of its line, where its name goes."""
    end = (math.nan, math.nan)
    style: dict[str, Any] = {"color": colour, "zorder": 1 if faint else 3}
    if curve.evaluation:
        tokens, losses = zip(*curve.evaluation, strict=True)
        ax.plot(tokens, losses, "o", ms=3 if faint else 5, mec="white", mew=0.6, **style)
        end = (tokens[-1], losses[-1])
    if curve.train:
        tokens, losses = zip(*curve.train, strict=True)
        if not faint and len(losses) > 50:
            ax.plot(tokens, losses, lw=0.6, alpha=0.25, color=colour, zorder=2)
        line = smoothed(losses)
        ax.plot(tokens, line, lw=1.0 if faint else 1.8, marker="." if len(line) == 1 else "", **style)
        end = (tokens[-1], line[-1])
    return end


def _format_loss_axes(ax: Axes, curves: Sequence[LossCurve]) -> None:
    """Log tokens when the runs' lengths differ tenfold; the first steps' high loss is cut off, as it hides the rest."""
    ends = [max(tokens for tokens, _ in (*curve.train, *curve.evaluation)) for curve in curves]
    starts = [tokens for curve in curves for tokens, _ in curve.train[:1] if tokens > 0]
    if min(ends) > 0 and max(ends) / min(ends) >= 10 and starts:
        format_log_axis(ax, [*starts, *ends], human_count)
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(lambda tokens, _: human_count(tokens) if tokens else "0")
    heights = [
        loss for curve in curves for loss in smoothed([loss for _, loss in curve.train])[len(curve.train) // 20 :]
    ]
    heights += [loss for curve in curves for _, loss in curve.evaluation]
    low, high = min(heights), max(heights)
    room = 0.06 * (high - low or abs(high) or 1.0)
    ax.set_ylim(low - room, high + room)
    ax.set_xlabel("tokens seen")
    ax.set_ylabel("loss (nats per predicted token or example)")


def _draw_points(ax: Axes, rows: Sequence[RunRow], points: Sequence[tuple[float, float]]) -> None:
    for row, (cost, quality) in zip(rows, points, strict=True):
        colour, marker = METHOD_STYLE.get(row.method or "", OTHER_STYLE)
        if row.trials:
            ax.plot(cost, quality, marker="*", ms=13, mfc="white", mec=INK, mew=1.1, zorder=3)
        else:
            ax.plot(cost, quality, marker=marker, ms=7, mfc=colour, mec="white", mew=0.8, zorder=4)


def _draw_front(ax: Axes, front: Sequence[tuple[float, float]]) -> None:
    if len(front) > 1:
        costs, qualities = zip(*front, strict=True)
        ax.plot(costs, qualities, drawstyle="steps-post", color="#999999", lw=1.3, ls=(0, (4, 2)), zorder=2)


def _method_legend(ax: Axes, rows: Sequence[RunRow], *, with_front: bool) -> None:
    """Right of the panel, where it covers no data."""
    from matplotlib.lines import Line2D

    handles = []
    for method in sorted({row.method or "other" for row in rows if not row.trials}):
        colour, marker = METHOD_STYLE.get(method, OTHER_STYLE)
        handles.append(Line2D([], [], marker=marker, ls="", ms=7, mfc=colour, mec="white", label=method))
    wholes = sorted({row.role or "search" for row in rows if row.trials})
    if wholes:
        label = f"whole {' or '.join(wholes)}"
        handles.append(Line2D([], [], marker="*", ls="", ms=12, mfc="white", mec=INK, label=label))
    if with_front:
        handles.append(Line2D([], [], color="#999999", lw=1.3, ls=(0, (4, 2)), label="Pareto front"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, handlelength=1.8)


def _named(
    rows: Sequence[RunRow],
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    *,
    higher_is_better: bool,
) -> list[tuple[tuple[float, float], str, str]]:
    """The points that get a name: the front, the searches, and then the best others."""
    sign = -1.0 if higher_is_better else 1.0

    def importance(place: int) -> tuple[bool, bool, float]:
        return (points[place] not in front, not rows[place].trials, sign * points[place][1])

    chosen = sorted(range(len(rows)), key=importance)[:MOST_LABELS]
    return [(points[place], _short(rows[place].name), INK) for place in chosen]


def _cost_axis(rows: Sequence[RunRow]) -> tuple[str, Callable[[RunRow], float | None]]:
    costed = [row for row in rows if row.gpu_hours is not None or row.usd is not None]
    if costed and all((row.usd or 0.0) > 0 for row in costed):
        return "US dollars", lambda row: row.usd
    return "device hours", lambda row: row.gpu_hours


def _cost_text(cost: float, unit: str) -> str:
    return f"${cost:g}" if unit == "US dollars" else f"{cost:g}"


def _best_loss(curve: LossCurve) -> float:
    """Lowest held-out loss, or where there is none the last smoothed training loss."""
    if curve.evaluation:
        return min(loss for _, loss in curve.evaluation)
    return smoothed([loss for _, loss in curve.train])[-1]


Key = TypeVar("Key", bound=Hashable)


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _short(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
