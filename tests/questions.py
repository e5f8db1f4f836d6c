"""Questions that tests ask the advisor."""

from __future__ import annotations

from typing import Any

from orchestrator.policy.question import Base, Given, Question, ask
from orchestrator.quantities import parse_budget

MINILM = Base(parameters=22_700_000, tokens=4e9)
ROBERTA = Base(parameters=125_000_000, tokens=30e9)
LLAMA = Base(parameters=7_000_000_000, tokens=2e12)


def labelled(examples: int = 1000, *, base: Base | None = ROBERTA, budget: str | None = None, **given: Any) -> Question:
    """A classification of two classes."""
    return _asked(task="text-classification", examples=examples, classes=2, base=base, budget=budget, **given)


def raw(tokens: float = 1e9, *, base: Base | None = LLAMA, budget: str | None = None, **given: Any) -> Question:
    """Raw text to learn."""
    return _asked(tokens=tokens, base=base, budget=budget, **{"task": "causal-lm", **given})


def _asked(*, base: Base | None, budget: str | None, **given: Any) -> Question:
    return ask(Given(base=base, no_base=base is None, budget=None if budget is None else parse_budget(budget), **given))
