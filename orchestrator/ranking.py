"""Which figure ranks runs, and which of two values is better: one answer for searches and `compare`. Pure.

Causal language models are ranked by bits per byte of the held-out text, whatever their tokenizers: nats per token
depend on how long the tokens are. Where tokenizer and text are the same both give the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import SpecError
from orchestrator.tasks.base import BITS_PER_BYTE
from orchestrator.tasks.registry import LEARNT

HIGHER_IS_BETTER = ("eval/accuracy", "eval/macro_f1")
PER_TOKEN = ("eval/loss", "eval/perplexity", "train/loss")
"""Metrics that, of a language model, are a mean over tokens: values of two tokenizers are of different units."""

WORST = -math.inf
_IN_BITS = {name for name, task in LEARNT.items() if BITS_PER_BYTE in task.metrics}


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


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How a result was measured. None is what a run of an earlier version has not said."""

    task: str | None
    held_out: str | None
    """Fingerprint of the held-out text."""
    tokenizer: str | None
    """Fingerprint of what cuts it into tokens."""
    masking_rate: float | None = None
    """Of a masked language model."""

    def unit(self, metric: str) -> str | None:
        """What a value of the metric is a mean over, where that is not the same for all results of the task."""
        task = LEARNT.get(self.task or "")
        if metric not in PER_TOKEN or task is None or not task.models_language:
            return None
        cut = None if self.tokenizer is None else f"tokens of tokenizer {self.tokenizer[:6]}"
        masked = task.hides_tokens and self.masking_rate is not None
        return ", ".join(filter(None, (cut, f"{self.masking_rate:.0%} hidden" if masked else None))) or None


def check_alike(trials: Mapping[str, Measured], metric: str) -> None:
    """Raises SpecError when the trials of a search, by name, are not measured alike and so cannot be ranked."""
    remedy = "search over it in runs of their own, which `orchestrator compare` shows in groups"
    bits = trials and all(trial.task in _IN_BITS for trial in trials.values())
    for what, found, do in (
        ("do not learn the same task", {name: trial.task for name, trial in trials.items()}, remedy),
        (
            "are not measured on the same held-out data",
            {name: trial.held_out for name, trial in trials.items()},
            f"name it in data.validation, or {remedy}",
        ),
        (
            f"have {metric} in different units",
            {name: trial.unit(metric) for name, trial in trials.items()},
            f"set search.metric={BITS_PER_BYTE}" if bits else remedy,
        ),
    ):
        distinct = {value: name for name, value in reversed(found.items())}
        if len(distinct) > 1:
            some = "; ".join(
                f"{name}: {value}" for value, name in sorted(distinct.items(), key=lambda item: item[1])[:4]
            )
            raise SpecError(f"the trials of this search {what}, so they cannot be ranked", got=some, do=do)
