"""How big a model to pretrain, on how many tokens: from budget, unique data, memory and what inference will cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.policy.language_quality import OVERFITTING_EPOCHS, SCARCE_EPOCHS, raw_epochs, raw_tokens
from orchestrator.policy.laws.scaling import FLOPS_PER_PARAMETER_TOKEN, REFIT, Allocation
from orchestrator.policy.pricing import Work, price, sample_length
from orchestrator.policy.question import Question

_SMALLEST_MODEL = 1_000_000
_FIRST_GUESS_FLOPS, _MOST_FLOPS, _WIDEN = 1e20, 1e30, 16.0
_CLOSE = 1.01
"""Sizes that differ by less are as good."""
_BISECTIONS = 14
"""Halvings of the logarithm of `_WIDEN`: to 0.02 %."""


@dataclass(frozen=True, kw_only=True)
class NewModel:
    """What to pretrain."""

    parameters: int
    tokens: float
    """Tokens trained on, repetitions counted."""
    best_parameters: int
    """The size that budget and data alone ask for: larger where the devices have no memory for it."""


def size_from_scratch(question: Question) -> NewModel:
    """The base's own size where there is one, else the best for budget and data that surely fits the devices.

    A size that memory cuts is trained on more tokens for the same budget, as long as repeating them does no harm;
    without a budget on the same tokens.
    """
    unique = raw_tokens(question)
    if question.base is not None:
        size = question.base.parameters
        return NewModel(parameters=size, tokens=unique * raw_epochs(unique, size), best_parameters=size)
    best = _size_for_data(unique) if question.budget is None else _size_for_budget(question, unique)
    wanted = max(_SMALLEST_MODEL, round(best.parameters))
    size = _largest_that_fits(wanted, question)
    tokens = best.tokens
    if question.budget is not None:
        most = OVERFITTING_EPOCHS * unique if unique else math.inf
        tokens = max(tokens, min(tokens * wanted / size, most))
    return NewModel(parameters=size, tokens=tokens, best_parameters=wanted)


def _largest_that_fits(wanted: int, question: Question) -> int:
    """A size up to `wanted` that surely fits; `wanted` itself where none does."""

    def fits(size: int) -> bool:
        work = Work(method="full", parameters=size, tokens=1e9, sequence_length=sample_length(question))
        return price([work], question).fits

    if fits(wanted) or not fits(_SMALLEST_MODEL):
        return wanted
    low, high = _SMALLEST_MODEL, wanted
    while high > _CLOSE * low:
        middle = round(math.sqrt(low * high))
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size_for_data(unique: float) -> Allocation:
    """The size for which the data, repeated as far as it is worth it, is the optimal amount."""
    tokens = unique * SCARCE_EPOCHS
    reference = REFIT.optimal(1e21)
    flops = 1e21 * (tokens / reference.tokens) ** (1 / (1 - REFIT.optimal_size_exponent))
    return REFIT.optimal(flops)


def _size_for_budget(question: Question, unique: float) -> Allocation:
    from orchestrator.policy.laws.sizing import data_constrained_optimal

    flops = affordable_flops(question)
    if question.inference_tokens:
        return _for_inference(flops, question.inference_tokens, unique)
    return data_constrained_optimal(flops, unique) if unique else REFIT.optimal(flops)


def affordable_flops(question: Question) -> float:
    """Training FLOPs, as the laws count them, whose best model the budget pays for on the question's devices.

    The most whose price at their own best size is inside the budget: prices jump where a size needs another layout.
    """
    budget = question.budget
    assert budget is not None
    length = sample_length(question)

    def spent(flops: float) -> float:
        best = REFIT.optimal(flops)
        size = max(_SMALLEST_MODEL, round(best.parameters))
        tokens = flops / FLOPS_PER_PARAMETER_TOKEN / size
        work = Work(method="full", parameters=size, tokens=tokens, sequence_length=length)
        return price([work], question).in_unit(budget)

    low = high = _FIRST_GUESS_FLOPS
    while spent(high) <= budget.amount and high < _MOST_FLOPS:
        low, high = high, high * _WIDEN
    while spent(low) > budget.amount and low > 1:
        low, high = low / _WIDEN, low
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if spent(middle) <= budget.amount else (low, middle)
    return low


def _for_inference(flops: float, inference_tokens: float, unique: float) -> Allocation:
    """The split of the training compute whose model is cheapest, training and inference together, for its quality."""
    from orchestrator.policy.laws.sizing import data_constrained_optimal, inference_aware

    low, high = math.log(REFIT.irreducible * 1e-3), math.log(20.0)  # reducible loss, nats
    for _ in range(60):
        middle = (low + high) / 2
        if inference_aware(REFIT.irreducible + math.exp(middle), inference_tokens).allocation.flops > flops:
            low = middle
        else:
            high = middle
    best = inference_aware(REFIT.irreducible + math.exp(high), inference_tokens).allocation
    return best if not unique or best.tokens <= 4 * unique else data_constrained_optimal(flops, unique)
