from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.laws import REFIT
from orchestrator.policy.posterior import loss_interval, optimal_parameters_interval, posterior_samples

PARAMETERS = st.floats(1e6, 1e12)
TOKENS = st.floats(1e8, 1e14)


def test_the_same_seed_draws_the_same_laws() -> None:
    assert posterior_samples(20, 1) == posterior_samples(20, 1) != posterior_samples(20, 2)


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("irreducible", 1.769, 1.871),
        ("size_scale", 285.0, 744.0),
        ("data_scale", 1042.0, 5810.0),
        ("size_exponent", 0.317, 0.373),
        ("data_exponent", 0.331, 0.415),
    ],
)
def test_drawn_parameters_spread_as_published(field: str, low: float, high: float) -> None:
    values = sorted(getattr(law, field) for law in posterior_samples(2000))
    width = high - low
    assert values[50] == pytest.approx(low, abs=0.15 * width)
    # B's own interval is long to the right, a log-normal's less so.
    assert values[-50] == pytest.approx(high, abs=(0.25 if field == "data_scale" else 0.15) * width)


def test_the_exponent_of_the_optimal_size_is_uncertain_as_published() -> None:
    exponents = [law.optimal_size_exponent for law in posterior_samples(2000)]
    assert statistics.stdev(exponents) == pytest.approx(0.02, abs=0.002)


def test_parameters_vary_together_so_that_losses_near_the_runs_hardly_do() -> None:
    scales = [law.size_scale for law in posterior_samples()]
    losses = [law.loss(1e9, 2e10) for law in posterior_samples()]
    assert statistics.stdev(scales) / statistics.mean(scales) > 0.2
    assert statistics.stdev(losses) / statistics.mean(losses) < 0.002


@settings(max_examples=25)
@given(parameters=PARAMETERS, tokens=TOKENS)
def test_an_interval_contains_the_law_and_widens_on_an_unknown_corpus(parameters: float, tokens: float) -> None:
    known, unknown = loss_interval(parameters, tokens), loss_interval(parameters, tokens, corpus_log_sd=0.18)
    assert known.low < known.mid < known.high
    assert known.mid == REFIT.loss(parameters, tokens)
    assert unknown.low < known.low
    assert known.high < unknown.high


def test_uncertainty_grows_away_from_the_runs() -> None:
    def relative_width(parameters: float, tokens: float) -> float:
        interval = loss_interval(parameters, tokens)
        return (interval.high - interval.low) / interval.mid

    assert relative_width(1e9, 2e10) < relative_width(7e10, 1.4e12) < relative_width(4e11, 1.6e13)
    assert relative_width(1e9, 2e10) < relative_width(1e6, 1e8)


@settings(max_examples=25)
@given(flops=st.floats(1e17, 1e26))
def test_the_optimal_size_lies_within_its_interval(flops: float) -> None:
    interval = optimal_parameters_interval(flops)
    assert interval.low < interval.mid < interval.high
    assert interval.mid == REFIT.optimal(flops).parameters
