"""Numbers as people write them: `10B`, `2M`, `1e-4`, `50usd`. Pure; used by the spec and the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

_ZEROS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
_NUMBER = r"((?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]{1,6})?)"
_COUNT = re.compile(rf"^\s*{_NUMBER}\s*([kmbgt]?)\s*$", re.IGNORECASE | re.ASCII)
_BUDGET = re.compile(rf"^\s*{_NUMBER}\s*([a-z-]+)\s*$", re.IGNORECASE | re.ASCII)
_MOST_CHARACTERS, _MOST_DIGITS = 100, 40
"""Of a number as people write it: nothing that is counted here needs more."""
MOST = 10**15
"""Of anything counted: tokens, steps, documents. Thirty times the tokens of the longest training published (Qwen3)."""
MOST_WORKERS = 10**6
"""Five times the devices of the largest cluster (Colossus, 200,000)."""
MOST_SAMPLES = 10**8
"""Samples of a batch or tokens of a sample: a hundred times the million observations of OpenAI Five's batches (2019),
ten times the longest context (Llama 4 Scout, 10M tokens)."""
MOST_INFERENCE = 10**18
"""Tokens that a model processes in its life: all models of Google together process 1e15 in a month (2025)."""
LEAST_BUDGET, MOST_BUDGET = 1e-9, 1e40
"""In any unit. A single step of the smallest model takes more; the largest training published took 5e26 FLOPs (a guess
of Epoch AI's for Grok 4)."""

BudgetUnit = Literal["usd", "gpu-hours", "flops", "hours"]
BUDGET_UNITS: tuple[BudgetUnit, ...] = ("usd", "gpu-hours", "flops", "hours")


def parse_count(value: Any) -> Any:
    """A positive whole number from `2000000`, `2M`, `1.5k` or `1e6`, exact; anything else is returned unchanged.

    Returning the input lets the type check behind it name the field in its message; a number beyond all use comes back
    as infinity, which no count is.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value) if abs(value) < 10**_MOST_DIGITS else math.inf
    if not isinstance(value, str) or len(value) > _MOST_CHARACTERS:
        return value
    match = _COUNT.match(value)
    if match is None:
        return value
    number = Decimal(match[1].replace("_", "")).scaleb(_ZEROS[match[2].lower()])
    if number.adjusted() >= _MOST_DIGITS:
        return math.inf
    return int(number) if number == number.to_integral_value() else value


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit a run may not pass: an amount of one unit."""

    amount: float
    unit: BudgetUnit

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


def parse_budget(text: str) -> Budget:
    """`500usd`, `100gpu-hours`, `1e20flops` or `8hours` as a `Budget`.

    Raises ValueError with the allowed forms when the text is none of these or not above zero.
    """
    text = text[:_MOST_CHARACTERS]
    match = _BUDGET.match(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in BUDGET_UNITS:
        raise ValueError(
            f"a budget is a number and one of {', '.join(BUDGET_UNITS)}, such as 50usd or 8hours; got {text!r}"
        )
    amount = float(match[1].replace("_", ""))
    if not amount > 0:
        raise ValueError(f"a budget must be above zero; got {text!r}")
    if not LEAST_BUDGET <= amount <= MOST_BUDGET:
        raise ValueError(f"a budget is between {LEAST_BUDGET:g} and {MOST_BUDGET:g} of its unit; got {text!r}")
    return Budget(amount=amount, unit=unit)


def divisors(number: int, *, least: int = 1, most: int | None = None) -> list[int]:
    """The divisors of a number from `least` to `most`, the smallest first, in the time of its square root."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    high = [number // n for n in reversed(low) if n * n != number]
    return [n for n in (*low, *high) if n >= least and (most is None or n <= most)]


def human_count(number: float) -> str:
    """`1234567` as `1.23M`: three significant digits and a suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:  # from here on it rounds to 1 of them
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def human_duration(seconds: float) -> str:
    """Seconds as `48s`, `3m05s` or `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
