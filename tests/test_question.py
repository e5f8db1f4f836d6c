from __future__ import annotations

import pytest

from orchestrator.errors import SpecError
from orchestrator.policy.question import Base, Given, ask, usual_base_tokens
from orchestrator.quantities import parse_budget


def test_every_gap_is_filled_with_a_stated_assumption() -> None:
    question = ask(Given(examples=500))
    assert question.task == "text-classification"
    assert (question.classes, question.domain, question.device.name) == (2, "near", "H100-80GB")
    assert question.base is not None
    said = " ".join(question.assumed)
    for word in ("text-classification", "2 classes", "128 tokens", "base of 125M", "H100-80GB", "domain near"):
        assert word in said


def test_what_is_given_is_not_assumed() -> None:
    base = Base(parameters=10**9, tokens=1e12)
    given = Given(task="causal-lm", examples=500, tokens=1e6, base=base, domain="far", gpu="A100", gpus=4)
    question = ask(given)
    assert question.assumed == ()
    assert (question.gpus, question.tokens_per_example) == (4, 2000)


def test_a_named_device_is_one_and_an_open_one_as_many_as_needed() -> None:
    assert ask(Given(examples=5, gpu="L4")).gpus == 1
    assert ask(Given(examples=5)).gpus is None


def test_labels_per_class_count_for_all_classes() -> None:
    assert ask(Given(labels_per_class=8, classes=5)).examples == 40


def test_raw_text_is_for_what_the_base_can_learn_from_it() -> None:
    tasks = [ask(Given(tokens=5e6, base=Base(parameters=1, tokens=1, is_encoder=one))).task for one in (False, True)]
    assert tasks == ["causal-lm", "masked-lm"]


def test_a_base_that_fills_gaps_is_an_encoder_even_if_only_its_size_is_known() -> None:
    for base in (None, Base(parameters=10**8, tokens=1e10)):
        found = ask(Given(tokens=5e6, task="masked-lm", base=base)).base
        assert found is not None
        assert found.is_encoder


def test_a_budget_alone_asks_what_to_pretrain() -> None:
    question = ask(Given(budget=parse_budget("500usd")))
    assert question.base is None
    assert question.task == "causal-lm"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (Given(), "nothing to advise on"),
        (Given(examples=5, no_base=True, base=Base(parameters=1, tokens=1)), "--no-base-model"),
        (
            Given(tokens=5, task="masked-lm", base=Base(parameters=1, tokens=1, name="gpt2")),
            "cannot learn to fill gaps",
        ),
        (Given(examples=5, base_tokens=5.0), "--base-tokens"),
        (Given(examples=5, gpu="L4", gpus=0), "at least one device"),
        (Given(examples=10, labels_per_class=8, classes=5), "more labels than examples"),
        (Given(examples=10, tokens=5.0), "fewer tokens than examples"),
        (Given(examples=10, gpu="H1000"), "no such device"),
    ],
)
def test_contradictions_are_refused_with_a_remedy(given: Given, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as refusal:
        ask(given)
    assert refusal.value.do


def test_larger_bases_saw_more_tokens_up_to_what_is_usual() -> None:
    assert usual_base_tokens(125_000_000) == pytest.approx(30e9, rel=0.1)
    assert usual_base_tokens(70_000_000_000) == 2e12
