from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.policy.laws.scaling import REFIT, repeated_loss
from orchestrator.policy.laws.sizing import data_constrained_optimal, golden_section, inference_aware
from tests.other_laws import HOFFMANN

FLOPS = st.floats(1e17, 1e26)
UNIQUE = st.floats(1e7, 1e13)


@given(flops=FLOPS, unique=UNIQUE, shift=st.floats(0.02, 50.0))
def test_no_other_split_beats_the_optimum_under_scarce_data(flops: float, unique: float, shift: float) -> None:
    best = data_constrained_optimal(flops, unique)
    # What is left unspent would gain less than 1 in 100.
    tolerance = 1.00001 if best.flops > 0.999 * flops else 1.01
    here = repeated_loss(best.parameters, best.tokens, unique)
    other = best.parameters * shift
    assert best.flops <= flops * 1.0001
    assert here <= repeated_loss(other, flops / 6 / other, unique) * tolerance


@given(flops=FLOPS, unique=UNIQUE, growth=st.floats(1.0, 1e3))
def test_more_compute_or_more_unique_data_is_never_worse(flops: float, unique: float, growth: float) -> None:
    def reached(flops: float, unique: float) -> float:
        best = data_constrained_optimal(flops, unique)
        return repeated_loss(best.parameters, best.tokens, unique)

    here = reached(flops, unique) * (1 + 1e-6)
    assert reached(flops * growth, unique) <= here
    assert reached(flops, unique * growth) <= here


@given(flops=FLOPS)
def test_ample_data_leaves_the_optimum_as_it_is(flops: float) -> None:
    best = REFIT.optimal(flops)
    assert data_constrained_optimal(flops, max(best.tokens, 20 * best.parameters)) == best


def test_scarce_data_is_repeated_before_the_model_grows() -> None:
    free, scarce = REFIT.optimal(9.2e21), data_constrained_optimal(9.2e21, 25e9)
    assert scarce.parameters < free.parameters
    assert scarce.parameters == pytest.approx(6.34e9, rel=0.1)  # Muennighoff: 6.34B for 9.7 epochs
    assert scarce.tokens / 25e9 == pytest.approx(9.7, rel=0.1)


def test_worthless_compute_stays_unspent() -> None:
    huge = data_constrained_optimal(1e26, 1e8)
    assert huge.flops < 1e20
    assert huge == data_constrained_optimal(1e24, 1e8)


def test_a_served_13b_is_better_a_7b_trained_longer() -> None:
    # Sardana 2023, figure 1: Hoffmann's law, the quality of a 13B Chinchilla, 2T tokens to serve: 7B saves 17 %.
    loss = HOFFMANN.loss(13e9, HOFFMANN.optimal_tokens(13e9))
    served = inference_aware(loss, 2e12, law=HOFFMANN)
    assert served.optimal.parameters == pytest.approx(13e9)
    assert served.allocation.parameters == pytest.approx(7e9, rel=0.05)
    assert served.saving == pytest.approx(0.17, abs=0.02)


@settings(max_examples=30)
@given(loss=st.floats(1.9, 4.0), inference=st.floats(1e6, 1e17), growth=st.floats(1.0, 1e3))
def test_more_inference_calls_for_smaller_models_of_the_same_loss(loss: float, inference: float, growth: float) -> None:
    some, more = inference_aware(loss, inference), inference_aware(loss, inference * growth)
    assert more.allocation.parameters <= some.allocation.parameters * 1.001 <= some.optimal.parameters * 1.002
    assert 0 <= some.saving <= more.saving + 1e-6 <= 1
    assert REFIT.loss(some.allocation.parameters, some.allocation.tokens) == pytest.approx(loss, rel=1e-6)


@settings(max_examples=30)
@given(loss=st.floats(1.9, 4.0), inference=st.floats(1e8, 1e15), size=st.floats(0.05, 1.0))
def test_no_other_size_serves_the_loss_with_fewer_flops(loss: float, inference: float, size: float) -> None:
    served = inference_aware(loss, inference)
    other = served.optimal.parameters * size
    flops = 6 * other * REFIT.tokens_for_loss(loss, other) + 2 * other * inference
    assert served.flops <= flops * 1.00001


def test_without_inference_the_training_optimum_stays() -> None:
    served = inference_aware(2.5, 0.0)
    assert served.allocation.parameters == pytest.approx(served.optimal.parameters, rel=1e-3)
    assert served.saving < 1e-6


def test_negative_inference_and_impossible_losses_are_refused() -> None:
    with pytest.raises(SpecError, match="negative"):
        inference_aware(2.5, -1.0)
    with pytest.raises(SpecError, match="no model reaches"):
        inference_aware(1.5, 1e9)


@given(where=st.floats(1e-3, 1e3))
def test_golden_section_finds_the_least(where: float) -> None:
    found = golden_section(lambda x: (math.log(x) - math.log(where)) ** 2, low=1e-4, high=1e4)
    assert found == pytest.approx(where, rel=1e-4)
