from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.methods.registry import method_of
from orchestrator.policy.laws.hyperparameters import suggested_learning_rate

GROWTH = st.floats(1.01, 100.0)


@pytest.mark.slow
@given(parameters=st.floats(1e6, 1e12), growth=GROWTH)
def test_larger_models_learn_at_lower_rates(parameters: float, growth: float) -> None:
    here, larger = suggested_learning_rate(parameters), suggested_learning_rate(parameters * growth)
    assert larger.mid < here.mid
    assert here.low < here.mid < here.high


def test_a_suggestion_lies_between_the_two_published_laws() -> None:
    # By hand: 3.7 (1e9)^-0.36 = 2.13e-3 and 0.3118 (1.2e20)^-0.125 = 9.64e-4.
    rate = suggested_learning_rate(1e9, tokens=2e10)
    assert rate.mid == pytest.approx(1.43e-3, rel=0.005)
    assert (rate.low * 1.5, rate.high / 1.5) == pytest.approx((9.64e-4, 2.13e-3), rel=0.005)


@pytest.mark.parametrize(
    ("parameters", "tokens", "used"),
    [(6.7e9, 1e12, 3e-4), (65e9, 1.4e12, 1.5e-4), (1.3e9, 26e9, 2e-4), (124e6, 9e9, 6e-4)],
)
def test_suggested_rates_are_near_those_that_were_used(parameters: float, tokens: float, used: float) -> None:
    # LLaMA, Cerebras-GPT, GPT-2 by nanoGPT: none was tuned to its optimum, so within a factor of 4 above.
    assert used / 2 < suggested_learning_rate(parameters, tokens=tokens).low * 2
    assert used < suggested_learning_rate(parameters, tokens=tokens).high


def test_a_base_is_tuned_at_a_rate_that_falls_with_its_size_and_lora_at_ten_times_that() -> None:
    full, lora = method_of("full"), method_of("lora")
    assert full.learning_rate(22_700_000) == pytest.approx(1e-4)
    assert full.learning_rate(7_000_000_000) == pytest.approx(1.27e-5, rel=0.01)
    assert lora.learning_rate(22_700_000) == pytest.approx(9.8e-4)
