"""How big a model for how many tokens: under scarce data, and for a life of inference.

Comes in: FLOPs, unique tokens, a loss to reach, tokens to serve. Goes out: an `Allocation`, or what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.errors import SpecError
from orchestrator.policy.laws.scaling import (
    FLOPS_PER_PARAMETER_TOKEN,
    INFERENCE_FLOPS_PER_PARAMETER_TOKEN,
    REFIT,
    REPETITION,
    Allocation,
    PretrainingLaw,
    refuse_unless_positive,
    repeated_loss,
)

_GOLDEN = (math.sqrt(5) - 1) / 2
_TOLERANCE = 1e-5
"""Of the logarithm of what is searched for."""
_WORTHLESS_AFTER = 5.0
"""Decay constants after which repeating, or a surplus of parameters, has given 1 - e^-5 = 99.3 % of what it can."""
_BRACKET = 10.0
"""Beyond the bounds named where it is used; the optimum lies within, the search only takes a few steps longer."""
_LEAST_SHARE = 1e-3
"""Of the optimal size. Whoever serves a model of this share trained it on more tokens than there are."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model sized for its training and its inference together."""

    allocation: Allocation
    inference_tokens: float
    flops: float
    """Training and inference FLOPs, 6 N D + 2 N D_inf."""
    saving: float
    """Share of the FLOPs of the training-optimal model with the same loss and inference; 0 to 1."""
    optimal: Allocation
    """That training-optimal model."""


def data_constrained_optimal(flops: float, unique: float, *, law: PretrainingLaw = REFIT) -> Allocation:
    """The split of at most `flops` with the lowest `repeated_loss` on `unique` tokens: epochs before parameters.

    FLOPs beyond the point where more of either is worthless stay unspent.
    """
    refuse_unless_positive(flops=flops, unique_tokens=unique)
    best = law.optimal(flops)
    fitting = REPETITION.parameters_for(unique)
    if best.tokens <= unique and best.parameters <= fitting:
        return best
    most_tokens = unique * (1 + _WORTHLESS_AFTER * REPETITION.repetitions_worth)
    most_parameters = fitting * (1 + _WORTHLESS_AFTER * REPETITION.surplus_worth)
    product = min(flops / FLOPS_PER_PARAMETER_TOKEN, most_tokens * most_parameters)
    parameters = golden_section(
        lambda size: repeated_loss(size, product / size, unique, law=law),
        low=min(fitting, product / most_tokens) / _BRACKET,
        high=max(most_parameters, product / unique) * _BRACKET,
    )
    return Allocation(parameters=parameters, tokens=product / parameters)


def inference_aware(loss: float, inference_tokens: float, *, law: PretrainingLaw = REFIT) -> ServedModel:
    """The model that reaches `loss` and then serves `inference_tokens` with the fewest FLOPs (Sardana 2023).

    Minimises 6 N D + 2 N D_inf over L(N, D) = loss. A served token costs as much FLOPs per device hour as a trained
    one here; in practice inference achieves less, which favours small models further.
    Raises SpecError when no model reaches the loss, or the tokens are negative.
    """
    if not inference_tokens >= 0:
        raise SpecError(
            "tokens to serve cannot be negative", got=f"{inference_tokens:g}", do="leave --inference-tokens out, or 0"
        )
    optimal = law.cheapest(loss)
    # At this size even endless data leaves the loss too high.
    least = (law.size_scale / (loss - law.irreducible)) ** (1 / law.size_exponent)
    parameters = golden_section(
        lambda size: _served_flops(law, loss, size, inference_tokens),
        low=max(least * (1 + 1e-9), optimal.parameters * _LEAST_SHARE),
        high=optimal.parameters,
    )
    if _served_flops(law, loss, parameters, inference_tokens) > (whole := _total(optimal, inference_tokens)):
        parameters = optimal.parameters
    allocation = Allocation(parameters=parameters, tokens=law.tokens_for_loss(loss, parameters))
    flops = _total(allocation, inference_tokens)
    return ServedModel(
        allocation=allocation,
        inference_tokens=inference_tokens,
        flops=flops,
        saving=max(0.0, 1 - flops / whole),
        optimal=optimal,
    )


def _total(allocation: Allocation, inference_tokens: float) -> float:
    return allocation.flops + INFERENCE_FLOPS_PER_PARAMETER_TOKEN * allocation.parameters * inference_tokens


def _served_flops(law: PretrainingLaw, loss: float, parameters: float, inference_tokens: float) -> float:
    tokens = law.tokens_for_loss(loss, parameters)
    return _total(Allocation(parameters=parameters, tokens=tokens), inference_tokens)


def golden_section(function: Callable[[float], float], *, low: float, high: float) -> float:
    """Where `function` of a positive number is least between `low` and `high`, to 1 part in 100,000.

    The function must fall, then rise; the search runs over the logarithm.
    """
    left, right = math.log(low), math.log(high)
    inner, outer = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    at_inner, at_outer = function(math.exp(inner)), function(math.exp(outer))
    while right - left > _TOLERANCE:
        if at_inner <= at_outer:
            right, outer, at_outer = outer, inner, at_inner
            inner = right - _GOLDEN * (right - left)
            at_inner = function(math.exp(inner))
        else:
            left, inner, at_inner = inner, outer, at_outer
            outer = left + _GOLDEN * (right - left)
            at_outer = function(math.exp(outer))
    return math.exp((left + right) / 2)
