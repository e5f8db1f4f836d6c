"""Where the advice changes as one thing changes: data, budget, base size, domain, goal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.facts.domains import DOMAINS
from orchestrator.policy.candidates import Candidate, candidates
from orchestrator.policy.choice import choose
from orchestrator.policy.question import GOALS, Question
from orchestrator.policy.strategies import Name
from orchestrator.quantities import human_count

_STEP = 8.0
_FAR, _FAR_FOR_BASES = 4096.0, 64.0
"""Factors to look at in either direction."""
_BISECTIONS = 5
"""Halvings of a step's logarithm: a flip is placed to 7 %."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One point where the advice changes."""

    when: str
    then: str
    along: str | None = None
    """What changes: `labels`, `tokens`, a unit of budget or `base parameters`; None for a domain or a goal."""
    at: float | None = None
    """The amount of it at which the advice changes."""


def flips(question: Question, everything: Sequence[Candidate], current: Name) -> Iterator[Flip]:
    """The flips nearest to the question, in either direction."""
    if sum(one.price is not None for one in everything) < 2:
        return  # a lone strategy stays the advice whatever its amounts
    what = "labels" if question.labelled else "tokens"
    amount = float(question.examples or question.tokens)
    if amount:
        yield from _along(question.resized, current, amount, what)
    if question.budget is not None:
        budget = question.budget

        def with_budget(factor: float) -> Question:
            return replace(question, budget=replace(budget, amount=budget.amount * factor))

        yield from _along(with_budget, current, budget.amount, budget.unit)
    if question.base is not None:
        base = question.base

        def with_base(factor: float) -> Question:
            larger = replace(base, parameters=max(1, round(base.parameters * factor)), tokens=base.tokens * factor)
            return replace(question, base=larger)

        yield from _along(with_base, current, float(base.parameters), "base parameters", far=_FAR_FOR_BASES)
        for domain in DOMAINS:
            name = _choice(replace(question, domain=domain)) if domain != question.domain else None
            if name not in (None, current):
                yield Flip(when=f"the domain is {domain} instead of {question.domain}", then=f"{name} wins")
    feasible = [one for one in everything if one.feasible]
    for goal in GOALS:
        name = choose(feasible, replace(question, goal=goal))[0].strategy
        if name != current:
            yield Flip(when=f"the goal is {goal} instead of {question.goal}", then=f"{name} wins")


def _along(
    change: Callable[[float], Question], current: Name, amount: float, what: str, *, far: float = _FAR
) -> Iterator[Flip]:
    for step, word in ((_STEP, "above"), (1 / _STEP, "below")):
        near, factor = 1.0, step
        while 1 / far <= factor <= far and amount * factor >= 1:
            name = _choice(change(factor))
            if name is not None and name != current:
                at, winner = _between(change, current, near, factor)
                at = float(f"{amount * at:.2g}")
                yield Flip(when=f"{word} {human_count(at)} {what}", then=f"{winner or name} wins", along=what, at=at)
                break
            near, factor = factor, factor * step


def _between(
    change: Callable[[float], Question], current: Name, near: float, factor: float
) -> tuple[float, Name | None]:
    """The factor of the first change between one that keeps the advice and one that does not, and what wins there."""
    for _ in range(_BISECTIONS):
        middle = (near * factor) ** 0.5
        if _choice(change(middle)) == current:
            near = middle
        else:
            factor = middle
    return factor, _choice(change(factor))


def _choice(question: Question) -> Name | None:
    feasible = [one for one in candidates(question) if one.feasible]
    return choose(feasible, question)[0].strategy if feasible else None
