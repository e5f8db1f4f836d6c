from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.language_quality import language_expectation, raw_epochs, transferred_tokens
from orchestrator.policy.laws.scaling import REFIT
from tests.questions import LLAMA, raw

SIZES = st.floats(1e5, 1e12)


@given(SIZES)
def test_more_text_never_hurts_full_fine_tuning(tokens: float) -> None:
    few = language_expectation("full", raw(tokens, domain="far"), parameters=LLAMA.parameters, tokens=tokens)
    many = language_expectation("full", raw(2 * tokens, domain="far"), parameters=LLAMA.parameters, tokens=2 * tokens)
    assert many.badness <= few.badness


def test_a_base_on_its_own_kind_of_text_brings_all_it_saw() -> None:
    assert transferred_tokens(raw(domain="same"), 1e6) == LLAMA.tokens
    near, far = (transferred_tokens(raw(domain=domain), 1e6) for domain in ("near", "far"))
    assert LLAMA.tokens > near > far > 0


def test_replay_keeps_what_plain_training_forgets() -> None:
    question = raw(20e9, domain="far")
    full, continued = (
        language_expectation(name, question, parameters=LLAMA.parameters, tokens=20e9)  # type: ignore[arg-type]
        for name in ("full", "continued")
    )
    assert continued.forgetting < 0.2 * full.forgetting
    assert continued.badness > full.badness, "replay costs a little of the new domain"


def test_adapters_hold_a_little_text_and_not_much() -> None:
    def gap(tokens: float) -> float:
        question = raw(tokens, domain="far")
        adapters, full = (
            language_expectation(name, question, parameters=LLAMA.parameters, tokens=tokens).badness  # type: ignore[arg-type]
            for name in ("peft", "full")
        )
        return adapters - full

    assert gap(1e7) == pytest.approx(0)
    assert gap(2e10) > 0.1  # lora-code-cpt-20B


def test_a_figure_outside_the_laws_range_says_so() -> None:
    inside = language_expectation("scratch", raw(2e10, base=None), parameters=10**9, tokens=2e10)
    outside = language_expectation("scratch", raw(2e13, base=None), parameters=10**12, tokens=2e13)
    assert not any("extrapolated" in reason for reason in inside.reasons)
    assert any("extrapolated" in reason for reason in outside.reasons)


def test_text_is_repeated_until_a_model_of_the_size_has_seen_its_share() -> None:
    assert raw_epochs(1e6, 10**9) == 4
    assert raw_epochs(1e13, 10**9) == 1
    assert 1 < raw_epochs(REFIT.optimal_tokens(1e9) / 2, 10**9) < 4
