"""Question -> what every strategy is expected to give as the data grows from a hundredth to a hundredfold. Pure.

The same functions decide here as in `advise`, so the curves and the advice cannot disagree. Where no data was given,
the budget grows instead. Drawn on the advisor's page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.policy.candidates import candidates
from orchestrator.policy.choice import choose
from orchestrator.policy.expectation import Expectation
from orchestrator.policy.flips import Flip
from orchestrator.policy.question import Question
from orchestrator.policy.strategies import Name

REACH = 100.0
"""How far to either side of what was asked."""
STEPS_PER_DECADE = 20
"""12 % apart: finer than the advice's own doubt about where it changes."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Expectations along one quantity. All sequences have one entry for each of `amounts`."""

    what: str
    """What the amounts count: labels, tokens, or a budget's unit."""
    asked: float
    amounts: tuple[float, ...]
    """Rising."""
    expectations: dict[Name, tuple[Expectation | None, ...]]
    """None where the strategy is not feasible; strategies that never are have no entry."""
    advised: tuple[Name | None, ...]
    """None where nothing is feasible."""

    def stretches(self) -> tuple[tuple[Name, float, float], ...]:
        """(strategy, from, to) wherever one strategy is advised without a break; neighbours share an end."""
        ends = [self.amounts[0], *((a * b) ** 0.5 for a, b in zip(self.amounts, self.amounts[1:], strict=False))]
        ends.append(self.amounts[-1])
        found: list[tuple[Name, float, float]] = []
        for place, name in enumerate(self.advised):
            if name is None:
                continue
            low, high = ends[place], ends[place + 1]
            if found and found[-1][0] == name and found[-1][2] == low:
                low = found.pop()[1]
            found.append((name, low, high))
        return tuple(found)


def sweep(question: Question) -> Sweep | None:
    """What happens along the amount of data, or of budget; None when neither is given."""
    varied = _varied(question)
    if varied is None:
        return None
    what, asked, changed = varied
    per_side = round(STEPS_PER_DECADE * 2)
    factors = [REACH ** (step / per_side) for step in range(-per_side, per_side + 1)]
    factors = [factor for factor in factors if what not in ("labels", "tokens") or round(asked * factor) >= 1]
    expectations: dict[Name, list[Expectation | None]] = {}
    advised: list[Name | None] = []
    for factor in factors:
        everything = candidates(changed(factor))
        feasible = [one for one in everything if one.feasible]
        advised.append(choose(feasible, changed(factor))[0].strategy if feasible else None)
        for one in everything:
            expectations.setdefault(one.strategy, []).append(one.expectation if one.feasible else None)
    return Sweep(
        what=what,
        asked=asked,
        amounts=tuple(asked * factor for factor in factors),
        expectations={name: tuple(values) for name, values in expectations.items() if any(values)},
        advised=tuple(advised),
    )


def _varied(question: Question) -> tuple[str, float, Callable[[float], Question]] | None:
    """(what grows, how much of it was asked about, the question with a multiple of it)."""
    if question.labelled:
        return "labels", float(question.examples), question.resized
    if question.tokens:
        return "tokens", question.tokens, question.resized
    text, budget = question.unlabeled_tokens, question.budget
    if text:
        return "tokens", text, lambda factor: replace(question, unlabeled_tokens=text * factor)
    if budget is None:
        return None
    return (
        budget.unit,
        budget.amount,
        lambda factor: replace(question, budget=replace(budget, amount=budget.amount * factor)),
    )


def flips_along(flips: Sequence[Flip], what: str) -> tuple[tuple[float, Flip], ...]:
    """(amount, flip) of those flips that lie along `what`, by rising amount."""
    found = [(flip.at, flip) for flip in flips if flip.along == what and flip.at is not None]
    return tuple(sorted(found, key=lambda pair: pair[0]))
