from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.intervals import Interval
from orchestrator.ratio_estimates import exactly, inverse, product, ratio, share_interval

POSITIVE = st.floats(min_value=0.01, max_value=1e6)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1), st.floats(min_value=0, max_value=1), POSITIVE)
def test_interval_holds_its_middle(pairs: list[tuple[float, float]], share: float, total: float) -> None:
    found = ratio(pairs, share=share).interval(total)
    assert 0 <= found.low <= found.mid <= found.high


def test_everything_drawn_leaves_nothing_to_chance() -> None:
    found = ratio([(1, 2), (5, 2)], share=1).interval(10)
    assert found == Interval(low=15, mid=15, high=15)


def test_one_unit_of_many_says_next_to_nothing() -> None:
    found = ratio([(1, 2)], share=0.01).interval()
    assert found.low == 0
    assert found.high > 2 * found.mid


@pytest.mark.parametrize("units", [10, 30, 200])
def test_nine_of_ten_intervals_hold_the_truth(units: int) -> None:
    draw = random.Random(0)
    sizes = [draw.lognormvariate(3, 0.5) for _ in range(2_000)]
    population = [(size * draw.uniform(0.1, 0.3), size) for size in sizes]
    truth = sum(n for n, _ in population) / sum(sizes)
    held = 0
    for _ in range(400):
        found = ratio(draw.sample(population, units), share=units / len(population)).interval()
        held += found.low <= truth <= found.high
    assert 0.84 <= held / 400 <= 0.96


def test_systematic_error_stays_when_the_sample_grows() -> None:
    found = ratio([(1, 2)] * 100, share=1).interval(systematic=0.2)
    assert (found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.6))


def test_independent_errors_add_as_squares() -> None:
    found = product(Interval(low=7, mid=10, high=13), Interval(low=6, mid=10, high=14))
    assert (found.low, found.mid, found.high) == (pytest.approx(50), 100, pytest.approx(150))


def test_inverse_swaps_the_ends() -> None:
    assert inverse(Interval(low=0.2, mid=0.25, high=0.5)) == Interval(low=2, mid=4, high=5)
    assert inverse(Interval(low=0, mid=1, high=2)).high == float("inf")


@given(st.integers(min_value=0, max_value=500), st.integers(min_value=0, max_value=500))
def test_share_lies_within_its_interval(count: int, more: int) -> None:
    found = share_interval(count, count + more)
    assert 0 <= found.low <= found.mid <= found.high <= 1


def test_none_found_among_few_does_not_mean_none() -> None:
    assert share_interval(0, 10).high == pytest.approx(0.21, abs=0.01)
    assert share_interval(0, 10_000).high < 0.001


def test_what_was_counted_has_no_width() -> None:
    assert exactly(3) == Interval(low=3, mid=3, high=3)
