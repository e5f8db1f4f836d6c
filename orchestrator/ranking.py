"""Which figure ranks runs, and which of two values is better: one answer for searches and `compare`. Pure.

Causal language models are ranked by bits per byte of the held-out text, whatever their tokenizers: nats per token
depend on how long the tokens are. Where tokenizer and text are the same both give the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

QUALITY_OF_TASK: Mapping[str, str] = {
    "causal-lm": "eval/loss",
    # There are no bits per byte of hidden tokens: a finer tokenizer leaves other pieces of a hidden word in sight, so
    # pseudo-likelihoods of two tokenizers do not compare (Kauf and Ivanova 2023).
    "masked-lm": "eval/loss",
    "text-classification": "eval/accuracy",
}
"""The metric that says how good a task's result is."""
HIGHER_IS_BETTER = ("eval/accuracy",)
PER_TOKEN = ("eval/loss", "eval/perplexity", "train/loss")
"""Metrics that, of a language model, are a mean over tokens: values of two tokenizers are of different units."""

WORST = -math.inf


def is_higher_better(metric: str, mode: str | None = None) -> bool:
    """Which way a metric is good; `mode` (`min` or `max`) decides where a user has said so."""
    return metric in HIGHER_IS_BETTER if mode in (None, "auto") else mode == "max"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The metric that ranks results, and which way it is good."""

    metric: str
    higher_is_better: bool

    @classmethod
    def of(cls, metric: str, mode: str | None = None) -> Goal:
        """The goal of a metric, the way that `mode` says or that is known."""
        return cls(metric=metric, higher_is_better=is_higher_better(metric, mode))

    def goodness(self, value: float | None) -> float:
        """A value so that larger is better; what is no number, infinite or absent is `WORST`."""
        if value is None or not math.isfinite(value):
            return WORST
        return value if self.higher_is_better else -value

    def best_of(self, values: Sequence[float | None]) -> int:
        """Place of the best value, of equals the first. Raises ValueError when there is none."""
        return max(range(len(values)), key=lambda place: self.goodness(values[place]))
