"""How big a model to pretrain, on how many tokens: from budget, unique data and what inference will cost."""

from __future__ import annotations

import math

from orchestrator.policy.language import SCARCE_EPOCHS, raw_epochs, raw_tokens
from orchestrator.policy.laws import FLOPS_PER_PARAMETER_TOKEN, REFIT, Allocation
from orchestrator.policy.pricing import Work, price, sample_length
from orchestrator.policy.question import Question

_SMALLEST_MODEL = 1_000_000
_FIRST_GUESS_FLOPS, _MOST_FLOPS, _WIDEN = 1e20, 1e30, 16.0
_BISECTIONS = 14
"""Halvings of the logarithm of `_WIDEN`: to 0.02 %."""


def size_from_scratch(question: Question) -> tuple[int, float]:
    """(parameters, tokens) to pretrain: the base's own size where there is one, else the best for budget and data."""
    unique = raw_tokens(question)
    if question.base is not None:
        return question.base.parameters, unique * raw_epochs(unique, question.base.parameters)
    best = _size_for_data(unique) if question.budget is None else _size_for_budget(question, unique)
    return max(_SMALLEST_MODEL, round(best.parameters)), best.tokens


def _size_for_data(unique: float) -> Allocation:
    """The size for which the data, repeated as far as it is worth it, is the optimal amount."""
    tokens = unique * SCARCE_EPOCHS
    reference = REFIT.optimal(1e21)
    flops = 1e21 * (tokens / reference.tokens) ** (1 / (1 - REFIT.optimal_size_exponent))
    return REFIT.optimal(flops)


def _size_for_budget(question: Question, unique: float) -> Allocation:
    from orchestrator.policy.sizing import data_constrained_optimal

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
    from orchestrator.policy.sizing import data_constrained_optimal, inference_aware

    low, high = math.log(REFIT.irreducible * 1e-3), math.log(20.0)  # reducible loss, nats
    for _ in range(60):
        middle = (low + high) / 2
        if inference_aware(REFIT.irreducible + math.exp(middle), inference_tokens).allocation.flops > flops:
            low = middle
        else:
            high = middle
    best = inference_aware(REFIT.irreducible + math.exp(high), inference_tokens).allocation
    return best if not unique or best.tokens <= 4 * unique else data_constrained_optimal(flops, unique)
