from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.planning.hardware import find_device
from orchestrator.policy.advise import advise
from orchestrator.policy.candidates import Candidate, candidates
from orchestrator.policy.question import Base, Given, Question, ask
from orchestrator.quantities import Budget
from tests.questions import LLAMA, MINILM, labelled, raw

GUANACO = labelled(9000, base=Base(parameters=65_000_000_000, tokens=1.4e12), gpu="L40S", gpus=1)
QUESTIONS = {
    "labels": labelled(2000, base=MINILM, gpu="A100"),
    "few labels": labelled(40, base=LLAMA, gpu="H100", gpus=2),
    "raw text": raw(2e9, domain="far", gpu="H100", gpus=8),
    "no base": raw(5e9, base=None),
    "labels and raw text": labelled(1688, unlabeled_tokens=8e9, domain="far", gpu="A100"),
}


def best(question: Question) -> float | None:
    """The best badness that anything feasible is expected to reach."""
    found = [one.expectation.badness for one in candidates(question) if one.feasible and one.expectation]
    return min(found, default=None)


@settings(max_examples=25)
@given(st.sampled_from(list(QUESTIONS)), st.floats(-3, 5), st.floats(0.05, 2))
def test_more_budget_never_makes_the_expected_result_worse(name: str, exponent: float, more: float) -> None:
    poor, rich = (
        replace(QUESTIONS[name], budget=Budget(amount=10**amount, unit="usd")) for amount in (exponent, exponent + more)
    )
    before, after = best(poor), best(rich)
    if before is not None:
        assert after is not None, "what was feasible stays so"
        assert after <= before + 0.002, "but for the rounding of a model's size"


@pytest.mark.parametrize("name", ["labels", "few labels", "raw text"])
def test_more_memory_never_makes_a_strategy_infeasible(name: str) -> None:
    ladder = ["A100-40GB", "A100-80GB"]
    small, large = (replace(QUESTIONS[name], device=find_device(device), gpus=1) for device in ladder)
    fitting = {one.strategy for one in candidates(small) if one.feasible}
    assert fitting <= {one.strategy for one in candidates(large) if one.feasible}


def test_states_are_not_offloaded_to_memory_that_no_host_has() -> None:
    def full(question: Question) -> Candidate:
        return next(one for one in candidates(question) if one.strategy == "full")

    assert not full(GUANACO).feasible, "65B weights and their states take over a terabyte"
    assert "--gpus" in full(GUANACO).why
    eight = replace(GUANACO, base=LLAMA, device=find_device("A100-40GB"), gpus=4)
    assert full(eight).feasible
    said = " ".join(advise(eight).reasons)
    assert "full: offloads" in said
    assert "beside each A100-40GB" in said


def test_where_nothing_surely_fits_what_may_fit_is_advised_and_called_so() -> None:
    advice = advise(GUANACO)
    assert [(one.strategy, one.method) for one in advice.candidates if one.feasible] == [("peft", "qlora")]
    assert any(reason.startswith("peft: may not fit: ") for reason in advice.reasons)
    larger = advise(replace(GUANACO, device=find_device("A100-80GB")))
    assert larger.leading == "peft"
    assert not any("may not fit" in reason for reason in larger.reasons)
    with pytest.raises(SpecError, match="nothing is feasible"):
        advise(replace(GUANACO, device=find_device("RTX4090")))


def test_without_any_data_the_prompt_is_left() -> None:
    advice = advise(ask(Given(task="causal-lm", examples=0, base=LLAMA)))
    assert advice.strategy == "prompt"
    assert {one.why for one in advice.candidates if not one.feasible} <= {"there is no data", "there are no labels"}


def test_an_encoder_is_not_prompted() -> None:
    encoder = replace(MINILM, is_encoder=True)
    for question in (labelled(2000, base=encoder), raw(4e5, base=encoder, task="masked-lm")):
        (prompt,) = [one for one in candidates(question) if one.strategy == "prompt"]
        assert not prompt.feasible
        assert "follows no prompt" in prompt.why


def test_every_interval_contains_its_middle() -> None:
    for question in QUESTIONS.values():
        for one in advise(question).candidates:
            for interval in _intervals(one):
                assert interval.low <= interval.mid <= interval.high


def _intervals(one: Candidate) -> list:  # type: ignore[type-arg]
    price, given_ = one.price, one.expectation
    found = [] if price is None else [price.gpu_hours, price.hours, price.usd, price.peak_gib]
    found += [] if given_ is None else [given_.score, given_.loss]
    return [interval for interval in found if interval is not None]


def test_the_advised_one_stands_first_and_the_infeasible_last() -> None:
    advice = advise(labelled(2000, base=MINILM))
    assert advice.candidates[0].strategy == advice.leading == advice.strategy
    order = [one.feasible for one in advice.candidates]
    assert order == sorted(order, reverse=True)


def test_reasons_cite_evidence_and_say_what_was_assumed() -> None:
    said = "\n".join(advise(labelled(2000)).reasons)
    assert "film reviews" in said
    assert "assumed: " in said


def test_an_uncertain_answer_names_what_a_pilot_must_tell_apart() -> None:
    advice = advise(labelled(60, base=MINILM))
    assert advice.strategy == "uncertain"
    assert len(advice.rivals) == 2
    assert advice.confidence < 0.6


def test_a_flip_is_where_the_advice_changes() -> None:
    question = labelled(2000, base=MINILM)
    flip = next(one for one in advise(question).flips if one.along == "labels")
    assert flip.at is not None
    winner = flip.then.split()[0]
    here, there = (advise(question.resized(flip.at * factor / 2000)).leading for factor in (1.3, 0.7))
    assert {here, there} == {"full", winner}


def test_a_budget_too_small_for_anything_says_what_the_smallest_useful_one_is() -> None:
    with pytest.raises(SpecError, match="too small for anything") as refusal:
        advise(labelled(2000, budget="0.001usd", gpu="A100"))
    assert refusal.value.allowed is not None
    least = float(refusal.value.allowed.split("about ")[1].removesuffix("usd"))
    assert advise(labelled(2000, budget=f"{1.1 * least:.4f}usd", gpu="A100")).candidates[0].feasible


def test_money_cannot_be_spent_on_a_device_without_a_price() -> None:
    with pytest.raises(SpecError, match="no price is known for RTX4090"):
        advise(labelled(2000, budget="5usd", gpu="RTX4090"))


def test_a_model_from_scratch_has_the_published_size_for_chinchillas_compute() -> None:
    one = advise(replace(raw(1.0, base=None), tokens=0.0, budget=Budget(amount=5.76e23, unit="flops"))).candidates[0]
    assert one.parameters == pytest.approx(70e9, rel=0.1)
    assert one.tokens == pytest.approx(1.4e12, rel=0.1)


@pytest.mark.parametrize("budget", [None, "1e23flops"])
def test_a_model_from_scratch_is_no_larger_than_its_devices_have_memory_for(budget: str | None) -> None:
    def asked(gpus: int) -> Candidate:
        advice = advise(raw(2e11, base=None, budget=budget, gpu="A100-40GB", gpus=gpus))
        limited = any("the largest that surely fits" in reason for reason in advice.reasons)
        assert limited == (gpus < 512)
        return advice.candidates[0]

    small, middle, large = asked(1), asked(4), asked(512)
    assert small.parameters < middle.parameters < large.parameters
    assert all(one.price is not None and one.price.fits for one in (small, middle, large))
    losses = [one.expectation.badness for one in (small, middle, large) if one.expectation]
    assert losses == sorted(losses, reverse=True)
    if budget is None:
        assert small.tokens == pytest.approx(large.tokens), "all of the data, whatever the size"
    else:
        assert small.tokens > middle.tokens > large.tokens, "all of the budget"


def test_small_models_make_room_by_smaller_micro_batches_before_they_are_refused() -> None:
    question = labelled(5000, base=Base(parameters=400_000_000, tokens=1e12), tokens=5e6, gpu="T4")
    (full,) = [one for one in candidates(question) if one.strategy == "full"]
    assert full.feasible
    assert full.price is not None
    assert full.price.offload == "none"
