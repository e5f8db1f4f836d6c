"""Learning rate and batch size to start from, by published laws; their disagreement is the interval.

Comes in: parameters, tokens, training FLOPs. Goes out: an `Interval`, never more than a starting point for a search.
"""

from __future__ import annotations

import math

from orchestrator.planning.run_plan import Interval
from orchestrator.policy.laws import FLOPS_PER_PARAMETER_TOKEN, REFIT, FittedRange, refuse_unless_positive
from orchestrator.policy.transfer_laws import LORA_LEARNING_RATE_RATIO

PORIAN_RANGE = FittedRange(parameters=(5e6, 901e6))
"""Porian 2024, arXiv 2406.19146; parameters with the output layer, without the input embedding."""
DEEPSEEK_RANGE = FittedRange(flops=(1e17, 2e19))
"""DeepSeek LLM 2024, arXiv 2401.02954, section 3.1 [M]; checked there at 1e20."""

_SEQUENCE_TOKENS = 2048
"""Length of the sequences that Porian's batch sizes count [M]."""
_DISAGREEMENT = 1.5
"""Factor by which the interval goes beyond the two laws: near the optimum the loss is flat to about this (guess)."""


def suggested_learning_rate(parameters: float, *, tokens: float | None = None) -> Interval:
    """Peak learning rate of AdamW for new weights: between Porian's 3.7 N^-0.36 and DeepSeek's 0.3118 C^-0.125.

    `tokens` are those of the training, compute-optimal ones when not given.
    """
    refuse_unless_positive(parameters=parameters)
    flops = FLOPS_PER_PARAMETER_TOKEN * parameters * (tokens or REFIT.optimal_tokens(parameters))
    return _between(3.7 * parameters**-0.36, 0.3118 * flops**-0.1250)


def suggested_batch_tokens(flops: float) -> Interval:
    """Tokens per optimizer step: between Porian's 0.00037 N^0.703 sequences and DeepSeek's 0.2920 C^0.3271 tokens.

    For the compute-optimal size at `flops` training FLOPs.
    """
    refuse_unless_positive(flops=flops)
    parameters = REFIT.optimal(flops).parameters
    return _between(0.00037 * parameters**0.703 * _SEQUENCE_TOKENS, 0.2920 * flops**0.3271)


def lora_learning_rate(full: float) -> float:
    """The learning rate that suits LoRA where `full` suits full fine-tuning."""
    return full * LORA_LEARNING_RATE_RATIO


def _between(one: float, other: float) -> Interval:
    return Interval(
        low=min(one, other) / _DISAGREEMENT, mid=math.sqrt(one * other), high=max(one, other) * _DISAGREEMENT
    )
