"""Candidates -> the one to advise, how sure that is, and the front. Pure.

Differences between strategies on the same task are known far better than levels, so confidence is the probability that
the chosen strategy is the best or tied with it, drawn from the strategies' own spreads alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.policy.candidates import Candidate
from orchestrator.policy.question import Goal, Question
from orchestrator.policy.strategies import ORDER, Name

TIE = {"error": 0.05, "loss": 0.02}
"""Differences that do not matter: 5 % of the errors (one standard error of 1,500 test rows at 80 % accuracy is that),
and 0.02 nats (twice the error of loss laws near their data)."""
COST_TIE = {"error": 0.22, "loss": 0.10}
"""What goal `cost` gives up for a cheaper strategy: 25 % more errors, or 0.1 nats. A choice, not a law."""
FORGETTING_WEIGHT: dict[Goal, float] = {"quality": 0.1, "cost": 0.1, "retain": 1.0}
"""How much of the base's lost skill counts against the task's gain. A choice."""
MATERIAL_RATIO = 0.5
"""A tied strategy is materially cheaper at half the money,"""
MATERIAL_MEMORY = 0.25
"""or when it saves a quarter of a device's memory."""
MATTERS = {"error": 0.10, "loss": 0.05}
"""Regret that matters: being worse than the best by more than this is being wrong. Twice a tie; a choice."""
_DRAWS = 1500


def choose(feasible: Sequence[Candidate], question: Question) -> tuple[Candidate, str]:
    """The candidate to advise, and why it and not the one with the best expectation."""
    best = min(feasible, key=lambda one: utility(one, question))
    tolerance = _tolerance(best, question)
    tied = [one for one in feasible if utility(one, question) <= utility(best, question) + tolerance]
    if question.goal == "cost":
        cheapest = min(tied, key=lambda one: (_money(one), ORDER.index(one.strategy)))
        return cheapest, "the cheapest of those that are good enough"
    chosen = min(tied, key=lambda one: ORDER.index(one.strategy))
    for rival in sorted(tied, key=_money):
        if _materially_cheaper(rival, chosen, question):
            return rival, f"statistically tied with {chosen.strategy}, and materially cheaper"
    if chosen is not best:
        why = "needs fewer resources" if _needs_less(chosen, best) else "is the simpler method"
        return chosen, f"statistically tied with {best.strategy}, and {why}"
    plain = min(feasible, key=lambda one: one.expectation.badness if one.expectation else math.inf)
    if plain is not chosen:
        return chosen, f"the best once what the base forgets is counted; {plain.strategy} alone on the task"
    return chosen, "the best expected result"


def with_front(everything: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The candidates, those marked that no other feasible one beats in quality, money, hours and memory together."""
    feasible = [one for one in everything if one.feasible]

    def beaten(one: Candidate) -> bool:
        own = _figures(one)
        return any(
            other is not one
            and _figures(other) != own
            and all(a <= b for a, b in zip(_figures(other), own, strict=True))
            for other in feasible
        )

    return tuple(replace(one, on_front=one.feasible and not beaten(one)) for one in everything)


def _figures(one: Candidate) -> tuple[float, ...]:
    assert one.price is not None
    assert one.expectation is not None
    return (one.expectation.badness, _money(one), one.price.hours.mid, one.price.peak_gib.mid)


def utility(one: Candidate, question: Question) -> float:
    """What is minimised: the task's badness, and the base's lost skill as far as the goal cares."""
    if one.expectation is None:
        return float("inf")
    return one.expectation.badness + FORGETTING_WEIGHT[question.goal] * one.expectation.forgetting


def _tolerance(one: Candidate, question: Question) -> float:
    assert one.expectation is not None
    return (COST_TIE if question.goal == "cost" else TIE)[one.expectation.kind]


def _money(one: Candidate) -> float:
    assert one.price is not None
    return one.price.usd.mid if one.price.usd is not None else one.price.gpu_hours.mid


def _needs_less(one: Candidate, other: Candidate) -> bool:
    return all(own <= its for own, its in zip(_figures(one)[1:], _figures(other)[1:], strict=True))


def _materially_cheaper(one: Candidate, other: Candidate, question: Question) -> bool:
    assert one.price is not None
    assert other.price is not None
    if _money(one) <= MATERIAL_RATIO * _money(other):
        return True
    saved = other.price.peak_gib.mid - one.price.peak_gib.mid
    return saved >= MATERIAL_MEMORY * question.device.memory_gib > 0


def confidence_in(
    chosen: Candidate, feasible: Sequence[Candidate], question: Question
) -> tuple[float, tuple[Name, ...]]:
    """(probability that nothing beats the choice by more than a tie, who does it most often)."""
    assert chosen.expectation is not None
    others = [one for one in feasible if one is not chosen]
    if not others:
        return 1.0, ()
    draw, tolerance = random.Random(0), max(_tolerance(chosen, question), MATTERS[chosen.expectation.kind])
    wins, losses = 0, dict.fromkeys((one.strategy for one in others), 0)
    for _ in range(_DRAWS):
        own = _drawn(chosen, question, draw)
        values = [(_drawn(one, question, draw), one.strategy) for one in others]
        best, name = min(values)
        if own <= best + tolerance:
            wins += 1
        else:
            losses[name] += 1
    rivals = sorted((name for name in losses if losses[name]), key=lambda name: -losses[name])
    return wins / _DRAWS, tuple(rivals[:1])


def _drawn(one: Candidate, question: Question, draw: random.Random) -> float:
    assert one.expectation is not None
    return utility(one, question) + draw.gauss(0.0, one.expectation.spread)
