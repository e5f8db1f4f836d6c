from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.hyperparameters import lora_learning_rate, suggested_batch_tokens, suggested_learning_rate

GROWTH = st.floats(1.01, 100.0)


@given(parameters=st.floats(1e6, 1e12), growth=GROWTH)
def test_larger_models_learn_at_lower_rates(parameters: float, growth: float) -> None:
    here, larger = suggested_learning_rate(parameters), suggested_learning_rate(parameters * growth)
    assert larger.mid < here.mid
    assert here.low < here.mid < here.high


@given(flops=st.floats(1e17, 1e26), growth=GROWTH)
def test_more_compute_takes_larger_batches(flops: float, growth: float) -> None:
    here, more = suggested_batch_tokens(flops), suggested_batch_tokens(flops * growth)
    assert more.mid > here.mid
    assert here.low < here.mid < here.high


def test_a_suggestion_lies_between_the_two_published_laws() -> None:
    # By hand: 3.7 (1e9)^-0.36 = 2.13e-3 and 0.3118 (1.2e20)^-0.125 = 9.64e-4.
    rate = suggested_learning_rate(1e9, tokens=2e10)
    assert rate.mid == pytest.approx(1.43e-3, rel=0.005)
    assert (rate.low * 1.5, rate.high / 1.5) == pytest.approx((9.64e-4, 2.13e-3), rel=0.005)
    # 0.2920 (1e20)^0.3271 = 1.02M tokens; 0.00037 (8.53e8)^0.703 = 702 sequences of 2048.
    batch = suggested_batch_tokens(1e20)
    assert (batch.low * 1.5, batch.high / 1.5) == pytest.approx((1.02e6, 1.44e6), rel=0.01)


@pytest.mark.parametrize(
    ("parameters", "tokens", "used"),
    [(6.7e9, 1e12, 3e-4), (65e9, 1.4e12, 1.5e-4), (1.3e9, 26e9, 2e-4), (124e6, 9e9, 6e-4)],
)
def test_suggested_rates_are_near_those_that_were_used(parameters: float, tokens: float, used: float) -> None:
    # LLaMA, Cerebras-GPT, GPT-2 by nanoGPT: none was tuned to its optimum, so within a factor of 4 above.
    assert used / 2 < suggested_learning_rate(parameters, tokens=tokens).low * 2
    assert used < suggested_learning_rate(parameters, tokens=tokens).high


def test_suggested_batches_are_near_those_that_were_used() -> None:
    for flops, used in ((6 * 6.7e9 * 1e12, 4e6), (6 * 175e9 * 3e11, 3.2e6), (6 * 1.3e9 * 26e9, 1.1e6)):
        interval = suggested_batch_tokens(flops)
        assert interval.low / 4 < used < interval.high


def test_lora_learns_at_about_ten_times_the_rate() -> None:
    assert lora_learning_rate(2e-5) == pytest.approx(1.96e-4)
