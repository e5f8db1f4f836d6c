from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import DataError
from orchestrator.policy.finetuning_curve import fit_curve

SIZES = (100, 200, 400, 800, 1600, 3200)


def rectified(examples: float, *, floor: float, drop: float, half: float, exponent: float) -> float:
    return math.exp(floor + drop / (1 + (examples / half) ** exponent))


def test_a_curve_through_exact_points_returns_them() -> None:
    truth = {"floor": 0.5, "drop": 1.0, "half": 700.0, "exponent": 0.8}
    curve = fit_curve([(size, rectified(size, **truth)) for size in SIZES])
    for size in (150, 1000, 3000):
        assert curve.loss(size).mid == pytest.approx(rectified(size, **truth), rel=0.01)
    beyond = curve.loss(25_000)
    assert beyond.low < rectified(25_000, **truth) < beyond.high


@pytest.mark.slow
def test_nine_in_ten_further_runs_fall_inside_up_to_eight_times_beyond() -> None:
    rng = random.Random(0)
    inside = total = 0
    for _ in range(40):
        truth = {
            "floor": rng.uniform(-0.5, 1),
            "drop": rng.uniform(0.1, 2),
            "half": 10 ** rng.uniform(1.5, 5),
            "exponent": rng.uniform(0.2, 1.2),
        }
        noise = 10 ** rng.uniform(-2.5, -1.5)
        points = [(size, rectified(size, **truth) * math.exp(rng.gauss(0, noise))) for size in SIZES]
        curve = fit_curve(points)
        for size in (2000.0, 8 * SIZES[-1]):
            found, interval = rectified(size, **truth) * math.exp(rng.gauss(0, noise)), curve.loss(size)
            inside, total = inside + (interval.low <= found <= interval.high), total + 1
    assert 0.82 <= inside / total <= 0.98


@settings(max_examples=10)
@given(losses=st.lists(st.floats(0.5, 5.0), min_size=4, max_size=6), examples=st.floats(10, 1e6))
def test_intervals_contain_their_middle_and_loss_never_rises_with_data(losses: list[float], examples: float) -> None:
    curve = fit_curve(list(zip(SIZES, losses, strict=False)))
    here, more = curve.loss(examples), curve.loss(4 * examples)
    assert 0 < here.low <= here.mid <= here.high
    assert more.mid <= here.mid * 1.02  # where only the spread of flat curves is left, the median may tremble


def test_losses_that_rise_with_data_are_taken_for_a_flat_curve_with_noise() -> None:
    curve = fit_curve([(size, 2.0 + 0.1 * index) for index, size in enumerate(SIZES)])
    assert curve.loss(1e5).mid == pytest.approx(curve.loss(100).mid, rel=0.01)
    assert curve.loss(1e5).mid == pytest.approx(2.25, rel=0.02)


def test_clean_points_leave_little_doubt_between_them() -> None:
    curve = fit_curve([(size, rectified(size, floor=0.5, drop=1.0, half=700.0, exponent=0.8)) for size in SIZES])
    within, beyond = curve.loss(1000), curve.loss(8 * SIZES[-1])
    assert within.high / within.low < 1.05
    assert beyond.high / beyond.low < 1.4


def test_order_and_a_start_without_examples_do_not_matter() -> None:
    points = [(0.0, 3.0), *((size, 3.0 * (1 + size / 100) ** -0.2) for size in SIZES)]
    forward, backward = fit_curve(points).loss(1000), fit_curve(points[::-1]).loss(1000)
    assert forward.mid == pytest.approx(backward.mid, rel=1e-6)


def test_the_interval_widens_beyond_the_measured_sizes_and_with_noise() -> None:
    exact = [(size, 3.0 * (1 + size / 100) ** -0.2) for size in SIZES]
    noisy = [(size, loss * (1.05 if index % 2 else 0.95)) for index, (size, loss) in enumerate(exact)]

    def width(points: list[tuple[float, float]], size: float) -> float:
        interval = fit_curve(points).loss(size)
        return math.log(interval.high / interval.low)

    assert width(exact, 1000) < width(exact, 25_000) < width(exact, 1e6)
    assert width(exact, 1000) < width(noisy, 1000)


def test_more_than_eight_times_beyond_is_out_of_range() -> None:
    curve = fit_curve([(size, 3.0) for size in SIZES])
    assert curve.in_range(8 * 3200)
    assert not curve.in_range(8 * 3200 + 1)


@pytest.mark.parametrize(
    ("points", "what"),
    [
        ([(100, 2.0), (200, 1.9), (200, 1.8), (400, 1.7)], "too few sizes"),
        ([(100, 2.0), (200, 1.9), (400, 0.0), (800, 1.7)], "impossible"),
        ([(100, 2.0), (200, 1.9), (400, math.nan), (800, 1.7)], "impossible"),
        ([(-1, 2.0), (200, 1.9), (400, 1.8), (800, 1.7)], "impossible"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(points: list[tuple[float, float]], what: str) -> None:
    with pytest.raises(DataError, match=what):
        fit_curve(points)
