"""Learning rates to start from, by published laws; their disagreement is the interval.

Comes in: parameters, tokens, training FLOPs. Goes out: an `Interval`, never more than a starting point for a search.
"""

from __future__ import annotations

import math

from orchestrator.intervals import Interval
from orchestrator.policy.laws.scaling import FLOPS_PER_PARAMETER_TOKEN, REFIT, refuse_unless_positive

_DISAGREEMENT = 1.5
"""Factor by which the interval goes beyond the two laws: near the optimum the loss is flat to about this (guess)."""


def suggested_learning_rate(parameters: float, *, tokens: float | None = None) -> Interval:
    """Peak learning rate of AdamW for new weights: between Porian's 3.7 N^-0.36 and DeepSeek's 0.3118 C^-0.125.

    Porian 2024, arXiv 2406.19146, on 5M to 901M parameters; DeepSeek LLM 2024, arXiv 2401.02954, section 3.1 [M, from
    memory], on 1e17 to 2e19 FLOPs, checked there at 1e20. `tokens` are those of the training, compute-optimal ones when
    not given.
    """
    refuse_unless_positive(parameters=parameters)
    flops = FLOPS_PER_PARAMETER_TOKEN * parameters * (tokens or REFIT.optimal_tokens(parameters))
    return _between(3.7 * parameters**-0.36, 0.3118 * flops**-0.1250)


def _between(one: float, other: float) -> Interval:
    return Interval(
        low=min(one, other) / _DISAGREEMENT, mid=math.sqrt(one * other), high=max(one, other) * _DISAGREEMENT
    )
