from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.charts import format_log_axis, pareto_front, spread
from orchestrator.tracking.compare import LossCurve
from orchestrator.tracking.plots import plot_losses, plot_quality_against_cost, smoothed
from orchestrator.tracking.rows import RunRow, rank

METHODS = ("full", "lora", "head", "scratch", "something-new")


def row(number: int, *, kind: str = "finetune", quality: float | None = 0.8, usd: float | None = 1.0) -> RunRow:
    return RunRow(
        run_id=str(number),
        experiment_id="1",
        name=f"run-{number}",
        status="finished",
        start_time_ms=number,
        kind=kind,
        method=METHODS[number % len(METHODS)],
        task="causal-lm",
        quality_metric="eval/loss",
        quality=quality,
        usd=usd,
        gpu_hours=None if usd is None else 2 * usd,
    )


def curve(number: int, *, steps: int, evaluations: int = 3, kind: str = "finetune") -> LossCurve:
    train = tuple((1000.0 * step, 1 + 3 / (step + number)) for step in range(1, steps + 1))
    return LossCurve(run=row(number, kind=kind), train=train, evaluation=train[-evaluations:] if evaluations else ())


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_flat_curve_stays_flat_and_a_falling_one_is_not_delayed() -> None:
    assert smoothed([2.0] * 300) == pytest.approx([2.0] * 300)
    falling = [float(-step) for step in range(300)]
    assert smoothed(falling)[:297] == pytest.approx(falling[:297])
    assert smoothed([5.0]) == [5.0]
    assert smoothed([]) == []


def test_smoothing_takes_noise_out() -> None:
    noisy = [1.0 + (-1) ** step for step in range(1000)]
    assert max(smoothed(noisy)[60:]) < 1.1


def test_labels_are_spread_just_enough() -> None:
    assert spread([0.1, 0.5], apart=0.1) == pytest.approx([0.1, 0.5])
    assert spread([0.5, 0.5], apart=0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.2, 0.5, 0.5, 0.52], apart=0.2) == pytest.approx([0.13, 0.33, 0.53, 0.73])


def test_the_pareto_front_keeps_what_nothing_cheaper_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (4.0, 0.95), (4.0, 0.96)]
    assert pareto_front(points, higher_is_better=True) == [(1.0, 0.5), (2.0, 0.9), (4.0, 0.96)]
    assert pareto_front(points, higher_is_better=False) == [(1.0, 0.5)]
    assert pareto_front([], higher_is_better=True) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "curves",
    [
        [curve(1, steps=200)],
        [curve(1, steps=1, evaluations=0)],
        [curve(1, steps=0, evaluations=0), curve(2, steps=20)],
        [curve(number, steps=60) for number in range(20)],
        [curve(1, steps=10), curve(2, steps=1000)],  # a span that wants a log axis
    ],
    ids=["one run", "one point", "no points", "twenty runs", "unequal lengths"],
)
def test_losses_are_drawn(curves: list[LossCurve], tmp_path: Path) -> None:
    drawable = [item for item in curves if item.train]
    plot_losses(drawable, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (1350, 660)


@pytest.mark.slow
def test_pretraining_and_fine_tuning_get_panels_of_their_own(tmp_path: Path) -> None:
    plot_losses([curve(1, steps=9, kind="pretrain"), curve(2, steps=9)], tmp_path / "loss.png")
    plot_quality_against_cost(rank([row(1, kind="pretrain"), row(2)]), tmp_path / "cost.png")
    assert png_size(tmp_path / "loss.png") == png_size(tmp_path / "cost.png") == (1350, 1320)


@pytest.mark.slow
def test_runs_measured_on_other_data_get_panels_of_their_own(tmp_path: Path) -> None:
    texts = [replace(row(number), held_out_fingerprint=text) for number, text in enumerate("aabc")]
    plot_losses([replace(curve(1, steps=9), run=one) for one in texts], tmp_path / "loss.png")
    plot_quality_against_cost(rank(texts), tmp_path / "cost.png")
    assert png_size(tmp_path / "loss.png") == png_size(tmp_path / "cost.png") == (1350, 1980)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        [row(1)],
        [row(number, quality=1 / (number + 1), usd=1.5**number) for number in range(20)],
        [row(1), row(2, quality=None), row(3, usd=None), row(4, usd=0.0)],
        [row(1), row(2)],  # the same place twice
    ],
    ids=["one run", "twenty runs", "missing figures", "same place"],
)
def test_quality_is_drawn_against_cost(rows: list[RunRow], tmp_path: Path) -> None:
    plot_quality_against_cost(rank(rows), tmp_path / "cost.png")
    assert png_size(tmp_path / "cost.png") == (1350, 660)


@pytest.mark.slow
@pytest.mark.parametrize("highest", [0.00025, 0.0003, 0.00065, 0.002, 0.003, 0.2])
def test_costs_on_a_log_axis_do_not_run_into_each_other(highest: float) -> None:
    """matplotlib 3.10's LogLocator alone put nine labels between 0.00025 and 0.00065, one over the other."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4))
    ax.plot([0.00025, highest], [0, 1], "o")
    format_log_axis(ax, [0.00025, highest], lambda cost: f"${cost:g}")
    figure.canvas.draw()
    low, high = ax.get_xlim()
    labels = [tick.label1 for tick in ax.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [label.get_window_extent() for label in labels]
    pyplot.close(figure)
    assert 1 <= len(boxes) <= 10
    assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


@pytest.mark.slow
def test_without_results_the_pictures_say_so(tmp_path: Path) -> None:
    plot_losses([], tmp_path / "loss.png")
    plot_quality_against_cost([row(1, quality=None)], tmp_path / "cost.png")
    assert png_size(tmp_path / "loss.png") == png_size(tmp_path / "cost.png") == (1350, 660)
