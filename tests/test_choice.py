from __future__ import annotations

from orchestrator.policy.candidates import Candidate, candidates
from orchestrator.policy.choice import choose, confidence_in, with_front
from orchestrator.policy.question import Question
from tests.questions import LLAMA, MINILM, labelled, raw


def feasible(question: Question) -> list[Candidate]:
    return [one for one in candidates(question) if one.feasible]


def test_among_equals_the_one_that_asks_for_less_is_chosen() -> None:
    chosen, why = choose(feasible(labelled(3000)), labelled(3000))
    assert chosen.strategy == "full", "adapters are as good and save nothing that matters for a small model"
    assert "best" in why


def test_among_equals_a_materially_cheaper_one_wins() -> None:
    question = labelled(20_000, base=LLAMA, gpu="H100", gpus=1)
    assert choose(feasible(question), question)[0].strategy == "peft"


def test_the_goal_cost_takes_the_cheapest_that_is_good_enough() -> None:
    question = labelled(3000, goal="cost")
    chosen, _ = choose(feasible(question), question)
    assert chosen.strategy == "peft"
    assert chosen.price is not None
    best = next(one for one in feasible(question) if one.strategy == "full")
    assert best.price is not None
    assert chosen.price.gpu_hours.mid < best.price.gpu_hours.mid


def test_the_goal_retain_avoids_what_forgets() -> None:
    question = raw(20e9, domain="far", goal="retain")
    assert choose(feasible(question), question)[0].strategy == "continued"


def test_confidence_is_high_where_evidence_separates_and_low_at_a_crossing() -> None:
    def confidence(examples: int) -> float:
        question = labelled(examples, base=MINILM)
        options = feasible(question)
        return confidence_in(choose(options, question)[0], options, question)[0]

    assert confidence(5000) > 0.85
    assert confidence(50) < 0.7


def test_a_lone_strategy_is_certain() -> None:
    question = raw(1e9, base=None)
    options = feasible(question)
    assert confidence_in(options[0], options, question) == (1.0, ())


def test_nothing_on_the_front_is_beaten_in_everything() -> None:
    marked = [one for one in with_front(candidates(labelled(2000))) if one.on_front]
    assert marked
    figures = [
        (one.expectation.badness, one.price.gpu_hours.mid, one.price.peak_gib.mid)
        for one in marked
        if one.expectation and one.price
    ]
    assert not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for a in figures for b in figures)
