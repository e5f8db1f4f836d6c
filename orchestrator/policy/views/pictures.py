"""The advisor's two pictures: quality against money, and quality against the amount of data. Values in, SVG out."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.charts import (
    FAINT_INK,
    INK,
    NAME_SIZE,
    PALETTE,
    drawn,
    format_log_axis,
    name_line_ends,
    name_points,
    pareto_front,
    spread,
)
from orchestrator.intervals import Interval
from orchestrator.policy.candidates import Candidate
from orchestrator.policy.expectation import Expectation
from orchestrator.policy.flips import Flip
from orchestrator.policy.strategies import ORDER, Name
from orchestrator.policy.views.sweep import Sweep, flips_along
from orchestrator.quantities import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRATEGY_STYLE: dict[Name, tuple[str, str]] = {
    "full": (PALETTE[0], "o"),
    "peft": (PALETTE[1], "s"),
    "features": (PALETTE[2], "^"),
    "scratch": (PALETTE[3], "D"),
    "prompt": (PALETTE[4], "v"),
    "continued": (PALETTE[5], "P"),
}
"""Colour and marker of each strategy; what `compare` draws too has the same there."""

_BESIDE = 0.025
"""Share of the cost axis by which points of about equal cost are moved apart: the width of a marker."""
_LEAST_SPAN = 6.0
"""Factor that a cost axis spans at least, so that differences of a few per cent do not look large."""


def front_picture(candidates: Sequence[Candidate]) -> bytes:
    """Expected quality of every feasible candidate against its money, or device hours where a price is not known."""
    shown = [one for one in candidates if one.feasible]
    priced = all(one.price is not None and one.price.usd is not None and one.price.usd.mid > 0 for one in shown)
    points = _side_by_side([(_cost(one, priced=priced), _quality(one).mid) for one in shown])
    higher = _kind(shown) == "error"
    target = io.BytesIO()
    with drawn(target, kind="svg") as [ax]:
        ax.set_xlim(*_limits([cost for cost, _ in points]))
        format_log_axis(ax, ax.get_xlim(), (lambda cost: f"${human_count(cost)}") if priced else human_count)
        front = pareto_front(points, higher_is_better=higher)
        if len(front) > 1:
            ax.plot(
                *zip(*front, strict=True), drawstyle="steps-post", color="#999999", lw=1.3, ls=(0, (4, 2)), zorder=2
            )
        for one, point in zip(shown, points, strict=True):
            _draw_candidate(ax, one, point)
        ax.margins(y=0.08)
        ax.set_xlabel("US dollars" if priced else "device hours")
        _describe_quality(ax, higher=higher)
        _front_legend(ax, with_front=len(front) > 1)
        names = [(point, _name(one), STRATEGY_STYLE[one.strategy][0]) for one, point in zip(shown, points, strict=True)]
        bars = [
            [(cost, _quality(one).low), (cost, _quality(one).high)]
            for one, (cost, _) in zip(shown, points, strict=True)
        ]
        name_points(ax, names, points=points, lines=[front, *bars], reach=6)
    return target.getvalue()


def curves_picture(swept: Sweep, flips: Sequence[Flip]) -> bytes:
    """Expected quality of every strategy along the amounts, with what is advised where, and the flip points."""
    kinds = {one.kind for values in swept.expectations.values() for one in values if one is not None}
    higher = kinds == {"error"}
    target = io.BytesIO()
    with drawn(target, kind="svg") as [ax]:
        ax.set_xlim(swept.amounts[0], swept.amounts[-1])
        format_log_axis(ax, swept.amounts, _amount_text)
        ends = []
        for order, name in enumerate(one for one in ORDER if one in swept.expectations):
            values = [math.nan if one is None else _expected(one).mid for one in swept.expectations[name]]
            colour, marker = STRATEGY_STYLE[name]
            every = (3 * order, max(1, len(values) // 5))  # where lines coincide, their markers alternate
            ax.plot(
                swept.amounts, values, color=colour, lw=1.8, marker=marker, ms=5, markevery=every, mec="white", mew=0.6
            )
            last = max(place for place, value in enumerate(values) if not math.isnan(value))
            ends.append(((swept.amounts[last], values[last]), name, colour))
        _room_for_marks(ax, rows=3)
        name_line_ends(ax, [(end, name, INK) for end, name, _ in ends])
        _draw_marks(ax, swept, flips)
        _draw_advised(ax, swept)
        ax.set_xlabel(f"{swept.what} (log scale)" if swept.what in ("labels", "tokens") else f"budget ({swept.what})")
        _describe_quality(ax, higher=higher)
    return target.getvalue()


def _cost(one: Candidate, *, priced: bool) -> float:
    assert one.price is not None
    figure = one.price.usd if priced and one.price.usd is not None else one.price.gpu_hours
    return figure.mid


def _kind(shown: Sequence[Candidate]) -> str:
    kinds = {one.expectation.kind for one in shown if one.expectation is not None}
    assert len(kinds) == 1, "accuracies and losses do not compare"
    return kinds.pop()


def _quality(one: Candidate) -> Interval:
    assert one.expectation is not None
    return _expected(one.expectation)


def _expected(expectation: Expectation) -> Interval:
    """Accuracy or loss, whichever it is."""
    quality = expectation.score or expectation.loss
    assert quality is not None
    return quality


def _name(one: Candidate) -> str:
    """With the size where that was chosen too."""
    chosen = one.strategy == "scratch" and one.expectation is not None and one.expectation.kind == "loss"
    return f"{one.strategy} {human_count(one.parameters)}" if chosen else one.strategy


def _side_by_side(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, those of about equal cost moved apart so that their bars can be told from each other."""
    order = sorted(range(len(points)), key=lambda place: points[place][0])
    logs = [math.log(points[place][0]) for place in order]
    apart = _BESIDE * max(math.log(_LEAST_SPAN), logs[-1] - logs[0])
    moved = dict(zip(order, spread(logs, apart=apart), strict=True))
    return [(math.exp(moved[place]), quality) for place, (_, quality) in enumerate(points)]


def _limits(costs: Sequence[float]) -> tuple[float, float]:
    """Ends of a cost axis with room at both sides of the points, more on the right, where most names stand."""
    low, high = math.log(min(costs)), math.log(max(costs))
    room = max(0.0, math.log(_LEAST_SPAN) - (high - low)) / 2 + 0.15 * (high - low)
    return math.exp(low - room), math.exp(high + 1.7 * room)


def _draw_candidate(ax: Axes, one: Candidate, point: tuple[float, float]) -> None:
    """A point with its 90 % interval; the thick part is the strategy's own doubt, the rest is common to all."""
    assert one.expectation is not None
    colour, marker = STRATEGY_STYLE[one.strategy]
    whole, own = _quality(one), _expected(replace(one.expectation, shared=0.0))
    cost, quality = point
    ax.plot([cost, cost], [whole.low, whole.high], color=colour, lw=1.2, alpha=0.6, zorder=2.5)
    ax.plot([cost, cost], [own.low, own.high], color=colour, lw=4.5, alpha=0.45, solid_capstyle="butt", zorder=2.6)
    face, edge = (colour, "white") if one.on_front else ("white", colour)
    ax.plot(cost, quality, marker=marker, ms=8, mfc=face, mec=edge, mew=1.0 if one.on_front else 1.6, zorder=4)


def _front_legend(ax: Axes, *, with_front: bool) -> None:
    """Right of the panel, where it covers no data."""
    from matplotlib.lines import Line2D

    grey = "#777777"
    handles = [
        Line2D([], [], color=grey, lw=1.2, label="90 % interval"),
        Line2D(
            [], [], color=grey, lw=4.5, alpha=0.6, label="the strategy's own part of it;\nthe rest is common to all"
        ),
        Line2D(
            [],
            [],
            marker="o",
            ls="",
            ms=8,
            mfc=grey,
            mec="white",
            label="nothing is better in quality,\nmoney, hours and memory",
        ),
        Line2D([], [], marker="o", ls="", ms=8, mfc="white", mec=grey, mew=1.6, label="something else is"),
    ]
    if with_front:
        handles.append(Line2D([], [], color="#999999", lw=1.3, ls=(0, (4, 2)), label="front of quality and cost"))
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    ax.legend(handles=handles, handlelength=1.8, fontsize=NAME_SIZE, labelspacing=0.9, **place)


def _describe_quality(ax: Axes, *, higher: bool) -> None:
    ax.set_ylabel(
        "expected accuracy (higher is better)" if higher else "expected loss (nats per token, lower is better)"
    )
    if higher:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _amount_text(amount: float) -> str:
    return human_count(amount) if amount < 1e15 else f"{amount:.0e}".replace("e+", "e")


_ROW = 0.065
"""Height of a row of text as a share of the panel."""


def _room_for_marks(ax: Axes, *, rows: int) -> None:
    """Room below the curves for the sentences at the marks."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - (high - low) * rows * _ROW, high)


def _draw_marks(ax: Axes, swept: Sweep, flips: Sequence[Flip]) -> None:
    """A line where the question stands and where the advice flips, each with its sentence in a row of its own."""
    first, last = swept.amounts[0], swept.amounts[-1]
    marks = [(swept.asked, f"asked: {_amount_text(swept.asked)} {swept.what}")]
    marks += [
        (amount, f"{flip.when}: {flip.then}")
        for amount, flip in flips_along(flips, swept.what)
        if first <= amount <= last
    ]
    for row, (amount, sentence) in enumerate(marks):
        colour = FAINT_INK if row else INK
        ax.axvline(amount, color=colour, lw=1.1, ls="--" if row else "-", zorder=1.5)
        left = math.log(amount / first) < math.log(last / first) / 2
        ax.annotate(
            sentence,
            xy=(amount, (2 - row + 0.5) * _ROW),
            xycoords=("data", "axes fraction"),
            xytext=(5 if left else -5, 0),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
            fontsize=NAME_SIZE,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            zorder=5,
        )


def _draw_advised(ax: Axes, swept: Sweep) -> None:
    """A ribbon above the panel: what is advised where, named where the name has room."""
    from matplotlib.patches import Rectangle

    whole = math.log(swept.amounts[-1] / swept.amounts[0])
    above = ax.get_xaxis_transform()
    for name, low, high in swept.stretches():
        colour, _ = STRATEGY_STYLE[name]
        ax.add_patch(
            Rectangle((low, 1.015), high - low, 0.06, transform=above, color=colour, alpha=0.35, lw=0, clip_on=False)
        )
        if math.log(high / low) / whole > 0.014 * (len(name) + 1):
            ax.text((low * high) ** 0.5, 1.043, name, transform=above, ha="center", va="center", fontsize=NAME_SIZE)
    ax.text(
        -0.008, 1.043, "advised", transform=ax.transAxes, ha="right", va="center", fontsize=NAME_SIZE, color=FAINT_INK
    )
