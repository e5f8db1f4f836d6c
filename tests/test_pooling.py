from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.pooling import Measurement, Pooled, pool

LOG_RATIOS = st.lists(st.floats(-3, 3), min_size=1, max_size=12)


def pooled(values: list[float], *, drift: float = 0.0, weight: float = 1.0, prior_sd: float = 0.45) -> Pooled:
    measurements = [Measurement(log_ratio=value, drift=drift, weight=weight) for value in values]
    return pool(measurements, prior_sd=prior_sd, usual_spread=0.1)


@given(LOG_RATIOS)
def test_the_mean_lies_among_the_measurements(values: list[float]) -> None:
    found = pooled(values)
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9
    assert found.variance > 0
    assert found.spread > 0


@given(LOG_RATIOS, st.randoms(use_true_random=False))
def test_the_order_of_measurements_does_not_matter(values: list[float], shuffle: random.Random) -> None:
    mixed = list(values)
    shuffle.shuffle(mixed)
    assert pooled(mixed).mean == pytest.approx(pooled(values).mean, abs=1e-6)


@pytest.mark.slow
@given(LOG_RATIOS)
def test_mirrored_measurements_give_the_mirrored_mean(values: list[float]) -> None:
    one, other = pooled(values), pooled([-value for value in values])
    assert other.mean == pytest.approx(-one.mean, abs=1e-6)
    assert other.variance == pytest.approx(one.variance, rel=1e-6)


@pytest.mark.parametrize("truth", [math.log(0.3), 0.0, math.log(2.5)])
def test_the_mean_converges_to_the_truth(truth: float) -> None:
    drawn = random.Random(0)
    values = [truth + drawn.gauss(0, 0.15) for _ in range(400)]
    errors = [abs(pooled(values[:count]).mean - truth) for count in (4, 400)]
    assert errors[1] < 0.02
    assert pooled(values).variance < pooled(values[:40]).variance < pooled(values[:4]).variance


def test_the_spread_is_learnt_from_the_measurements() -> None:
    drawn = random.Random(1)
    quiet, noisy = ([drawn.gauss(0, sd) for _ in range(200)] for sd in (0.02, 0.40))
    assert 0.015 < pooled(quiet).spread < 0.035
    assert 0.35 < pooled(noisy).spread < 0.45


@pytest.mark.parametrize("absurd", [-6.0, -2.0, 2.0, 6.0])
def test_one_absurd_measurement_of_twenty_changes_little(absurd: float) -> None:
    drawn = random.Random(2)
    usual = [-0.5 + drawn.gauss(0, 0.08) for _ in range(20)]
    assert pooled([*usual[:19], absurd]).mean == pytest.approx(pooled(usual).mean, abs=0.05)


def test_a_lone_absurd_measurement_counts_for_little_and_four_that_agree_are_believed() -> None:
    absurd = math.log(0.01)
    assert pooled([absurd]).variance > 1
    assert pooled([absurd] * 4).variance < 0.01


def test_of_two_measurements_that_contradict_each_other_the_credible_one_counts() -> None:
    assert pooled([0.05, math.log(0.01)]).mean == pytest.approx(0.05, abs=0.05)


def test_a_lone_measurement_within_reach_of_the_prior_is_believed() -> None:
    assert pooled([math.log(0.5)]).variance < 0.03


def test_averaging_reduces_noise_and_not_the_common_drift() -> None:
    assert pooled([0.1] * 100, drift=0.3).variance == pytest.approx(0.09, rel=0.05)
    assert pooled([0.1] * 100).variance < 1e-3


def test_half_a_measurement_counts_half() -> None:
    whole, half = (pooled([-0.2] * 4, weight=weight) for weight in (1.0, 0.5))
    assert half.variance == pytest.approx(2 * whole.variance, rel=0.2)
