"""Numbers as people write them: `10B`, `2M`, `1e-4`, `50usd`. Pure; used by the spec and the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

_SUFFIX = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_COUNT = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+]?[0-9]+)?)\s*([kmbgt]?)\s*$", re.IGNORECASE)
_BUDGET = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+]?[0-9]+)?)\s*([a-z-]+)\s*$", re.IGNORECASE)

BudgetUnit = Literal["usd", "gpu-hours", "flops", "hours"]
BUDGET_UNITS: tuple[BudgetUnit, ...] = ("usd", "gpu-hours", "flops", "hours")


def parse_count(value: Any) -> Any:
    """A positive whole number from `2000000`, `2M`, `1.5k` or `1e6`; anything else is returned unchanged.

    Returning the input lets the type check behind it name the field in its message.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = _COUNT.match(value)
    if match is None:
        return value
    number = float(match[1].replace("_", "")) * _SUFFIX[match[2].lower()]
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else value


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
    match = _BUDGET.match(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in BUDGET_UNITS:
        raise ValueError(
            f"a budget is a number and one of {', '.join(BUDGET_UNITS)}, such as 50usd or 8hours; got {text!r}"
        )
    amount = float(match[1].replace("_", ""))
    if not amount > 0:
        raise ValueError(f"a budget must be above zero; got {text!r}")
    return Budget(amount=amount, unit=unit)


def human_count(number: float) -> str:
    """`1234567` as `1.23M`: three significant digits and a suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
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
