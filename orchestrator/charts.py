"""What the pictures of this project share: a style, colours that all readers tell apart, and names that do not overlap.

matplotlib is loaded only when something is drawn. Used by the plots of `compare` and by the advisor's page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

# Okabe and Ito 2008, "Color Universal Design": eight colours that colour-blind readers tell apart; yellow is left
# out because it is too pale for a line on white. Then three of Tol 2021, "Colour Schemes", muted, black and brown.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#332288", "#882255", "#999933", "#000000", "#7A5230"),
)
GREY = "#B8B8B8"
INK = "#222222"
FAINT_INK = "#555555"
NAME_SIZE = 8.5
"""Of a point's or line's name, in printer's points."""

_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT_INK,
    "ytick.color": FAINT_INK,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "orchestrator",  # the same picture is the same file
}


@contextmanager
def drawn(target: Path | IO[bytes], *, panels: int = 1, kind: str = "png", nothing: str = "") -> Iterator[list[Axes]]:
    """Panels below each other, written to `target` at the end; without any, a picture that says `nothing`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(h_pad=0.15, w_pad=0.15, hspace=0.06)
        figure = Figure(figsize=(9.0, 4.4 * max(1, panels)), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        axes = [figure.add_subplot(panels, 1, place) for place in range(1, panels + 1)]
        yield axes
        if not axes:
            figure.text(0.5, 0.5, nothing, ha="center", va="center", color="#777777", fontsize=12)
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)


def pareto_front(points: Iterable[tuple[float, float]], *, higher_is_better: bool) -> list[tuple[float, float]]:
    """The (cost, quality) pairs that no other beats at the same or lower cost, by rising cost."""
    sign = -1.0 if higher_is_better else 1.0
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * quality < sign * front[-1][1]:
            front.append((cost, quality))
    return front


def spread(heights: Sequence[float], *, apart: float) -> list[float]:
    """Rising heights moved as little as possible so that neighbours stand at least `apart` from each other.

    Heights that are too close form a block around their mean; blocks that meet are joined.
    """
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _bottom(blocks[-1], apart) < _bottom(blocks[-2], apart) + apart * len(blocks[-2]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_bottom(block, apart) + apart * place for block in blocks for place in range(len(block))]


def _bottom(block: Sequence[float], apart: float) -> float:
    return sum(block) / len(block) - apart * (len(block) - 1) / 2


def format_log_axis(ax: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Round numbers as ticks: a few of equal distance within a decade, 1, 2, 5 within two, else whole decades."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

    decades = math.log10(max(values) / min(values))
    ax.set_xscale("log")
    if decades < 1:  # where LogLocator finds fewer than two ticks, it puts as many as a linear axis has room for
        few = MaxNLocator(nbins=4, steps=(1, 2, 5, 10)).tick_values(min(values), max(values))
        ticks = few if min(values) < max(values) else [min(values)]
        ax.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick > 0]))
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=12))
    ax.xaxis.set_major_formatter(lambda value, _: text(value))
    ax.xaxis.set_minor_formatter(NullFormatter())


def name_line_ends(ax: Axes, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Names in the right margin at the height of each line's end, pushed apart where they would overlap.

    `ends` are (place, name, colour), `ax` has its final limits.
    """
    low, high = ax.get_ylim()
    ends = sorted(ends, key=lambda end: end[0][1])
    heights = spread([(y - low) / (high - low) for (_, y), _, _ in ends], apart=0.062)  # a line of text's share
    for ((x, y), name, colour), height in zip(ends, heights, strict=True):
        ax.annotate(
            name,
            xy=(x, min(max(y, low), high)),
            xytext=(1.015, height),
            textcoords=ax.transAxes,
            color=colour,
            va="center",
            fontsize=NAME_SIZE,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.55, "shrinkA": 1, "shrinkB": 2},
        )


def name_points(
    ax: Axes,
    named: Sequence[tuple[tuple[float, float], str, str]],
    *,
    points: Sequence[tuple[float, float]],
    lines: Sequence[Sequence[tuple[float, float]]] = (),
    reach: int = 1,
) -> None:
    """Names beside points, the first ones first, each where it covers nothing; left out where no place is free.

    `named` are (place, name, colour); clear stay `points` and the stairs through `lines`; `ax` has its final limits.
    `reach` above 1 also tries places so many times further away, with a thin line from the point to its name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    assert isinstance(ax.figure, Figure)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()  # positions on the page are known only after the layout
    taken = [
        box for boxes in (_under_points(ax, points), *(_under_stairs(ax, line) for line in lines)) for box in boxes
    ]
    for point, name, colour in named:
        for step, (dx, dy, align) in ((step, place) for step in range(1, reach + 1) for place in _PLACES):
            label = ax.annotate(
                name,
                xy=point,
                xytext=(step * dx, step * dy),
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=NAME_SIZE,
                zorder=5,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkB": 4} if step > 1 else None,
            )
            label.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(label, canvas.get_renderer())  # without the thin line, which may cross things
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


_PLACES = (
    (9, 0, "left"),
    (8, 8, "left"),
    (8, -8, "left"),
    (-9, 0, "right"),
    (-8, 8, "right"),
    (-8, -8, "right"),
    (0, 13, "center"),
    (0, -13, "center"),
)
"""Where a point's name may stand, in printer's points from it, tried in this order."""


def _under_points(ax: Axes, points: Sequence[tuple[float, float]]) -> list[Bbox]:
    """The page's pixels under points."""
    from matplotlib.transforms import Bbox

    return [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in map(ax.transData.transform, points)]


def _under_stairs(ax: Axes, corners: Sequence[tuple[float, float]]) -> list[Bbox]:
    """The page's pixels under a line that goes to each next corner along the first axis, then along the second."""
    from matplotlib.transforms import Bbox

    boxes = []
    for (x0, y0), (x1, y1) in pairwise(map(ax.transData.transform, corners)):
        boxes.append(Bbox.from_extents(min(x0, x1), y0 - 2, max(x0, x1), y0 + 2))
        boxes.append(Bbox.from_extents(x1 - 2, min(y0, y1), x1 + 2, max(y0, y1)))
    return boxes
