"""Question -> Recommendation: candidates compared on quality, money, hours and memory, with confidence and flip points.

Pure. `candidates` prices and expects, `choice` compares, `flips` asks where the answer would change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from orchestrator.errors import SpecError
from orchestrator.policy.candidates import Candidate, candidates
from orchestrator.policy.choice import choose, confidence_in, utility, with_front
from orchestrator.policy.flips import Flip, flips
from orchestrator.policy.question import Question
from orchestrator.policy.strategies import Name

CERTAIN = 0.6
"""Confidence below which the answer is `uncertain`."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The advice, with everything it rests on."""

    strategy: str
    """A strategy's name, or `uncertain`."""
    leading: Name
    """The best guess, also when uncertain."""
    confidence: float
    """Probability that no other strategy is better by more than a tie."""
    candidates: tuple[Candidate, ...]
    """Best first, infeasible ones last."""
    flips: tuple[Flip, ...]
    reasons: tuple[str, ...]
    rivals: tuple[Name, ...]
    """What a pilot has to tell apart; empty when the advice is certain."""
    changed_by_history: tuple[str, ...] = ()
    """What past runs changed about the figures, a sentence each."""


def advise(question: Question) -> Recommendation:
    """The best feasible strategy for the goal.

    Raises SpecError when nothing is feasible, naming the smallest useful budget, or when the budget is money and the
    device has no known price.
    """
    _refuse_unpriced(question)
    everything = with_front(candidates(question))
    feasible = [one for one in everything if one.feasible]
    if not feasible:
        raise _nothing_feasible(question, everything)
    chosen, why = choose(feasible, question)
    confidence, rivals = confidence_in(chosen, feasible, question)
    certain = confidence >= CERTAIN
    ranked = sorted(everything, key=lambda one: (not one.feasible, one is not chosen, utility(one, question)))
    return Recommendation(
        strategy=chosen.strategy if certain else "uncertain",
        leading=chosen.strategy,
        confidence=confidence,
        candidates=tuple(ranked),
        flips=tuple(flips(question, everything, chosen.strategy)),
        reasons=tuple(_reasons(chosen, why, feasible, question)),
        rivals=() if certain else (chosen.strategy, *rivals),
        changed_by_history=_changed_by_history(question, chosen.strategy),
    )


def _reasons(chosen: Candidate, why: str, feasible: list[Candidate], question: Question) -> Iterator[str]:
    yield f"{chosen.strategy}: {why}"
    for one in sorted(feasible, key=lambda one: (one is not chosen, utility(one, question))):
        assert one.expectation is not None
        doubt = "; only a rule of thumb" if one.expectation.rule_of_thumb else ""
        yield from (f"{one.strategy}: {reason}{doubt}" for reason in one.expectation.reasons)
        yield from _about_memory(one, question)
    if chosen.share < 1:
        yield f"the budget {question.budget} covers {chosen.share:.0%} of the work; the figures are for that part"
    yield from (f"measured: {fact}" for fact in question.measured)
    for assumption in question.assumed:
        yield f"assumed: {assumption}"


def _about_memory(one: Candidate, question: Question) -> Iterator[str]:
    assert one.price is not None
    peak, host_gib = one.price.peak_gib, one.price.host_gib
    if not one.price.fits:
        yield f"{one.strategy}: may not fit: {peak.mid:.3g} ({peak.low:.3g} to {peak.high:.3g}) GiB a device"
    if host_gib > 0:
        yield (
            f"{one.strategy}: offloads {host_gib:.3g} GiB a device to the host, of about {question.device.host_gib:g} "
            f"that usual machines have beside each {question.device.name}"
        )


def _changed_by_history(question: Question, strategy: Name) -> tuple[str, ...]:
    if question.learned is None:
        return ()
    from orchestrator.policy.apply_history import changed

    return changed(question, strategy)


def _refuse_unpriced(question: Question) -> None:
    if question.budget is not None and question.budget.unit == "usd" and question.device.usd_per_hour is None:
        raise SpecError(
            f"no price is known for {question.device.name}, so a budget in money cannot be spent on it",
            got=str(question.budget),
            do="give the budget in gpu-hours, or a usd_per_hour in configs/devices.yaml",
        )


def _nothing_feasible(question: Question, everything: tuple[Candidate, ...]) -> SpecError:
    budget = question.budget
    if budget is None:
        return SpecError(
            "nothing is feasible on this device",
            got="; ".join(f"{one.strategy}: {one.why}" for one in everything),
            do="give a larger device, more of them, or a smaller base model",
        )
    least = smallest_budget(question) if any(one.price is None or one.price.fits for one in everything) else None
    return SpecError(
        "the budget is too small for anything",
        got=str(budget),
        allowed=None if least is None else f"the smallest useful one is about {least:.2g}{budget.unit}",
        do="raise the budget, use a smaller base model, or less data" if least else "use a smaller base model",
    )


def smallest_budget(question: Question) -> float | None:
    """The least amount, in the budget's unit, with which something is feasible; None when no amount helps."""
    assert question.budget is not None
    low, high = question.budget.amount, question.budget.amount
    for _ in range(12):
        high *= 8
        if _any_feasible(question, high):
            break
    else:
        return None
    for _ in range(16):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _any_feasible(question, middle) else (middle, high)
    return high


def _any_feasible(question: Question, amount: float) -> bool:
    assert question.budget is not None
    richer = replace(question, budget=replace(question.budget, amount=amount))
    return any(one.feasible for one in candidates(richer))
