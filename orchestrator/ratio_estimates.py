"""Totals from a sample: ratio estimates with 90 % intervals, for a dataset that is too large to read whole. Pure.

A ratio of two sums (tokens to bytes, rows to bytes on disk) over units drawn at random, times the known total of the
denominator, is what a survey calls the ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.intervals import Z90, Interval


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two totals and the standard error that drawing units at random gives it."""

    value: float
    standard_error: float
    units: int
    """Units that were drawn."""

    def interval(self, total: float = 1.0, *, systematic: float = 0.0) -> Interval:
        """90 % interval of the ratio times a known total, never below zero.

        `systematic` is a relative half-width that drawing more would not narrow, such as a proxy's bias.
        """
        sampling = _quantile(self.units) * self.standard_error
        half = math.hypot(sampling, systematic * self.value)
        return Interval(low=max(0.0, self.value - half), mid=self.value, high=self.value + half).scaled(total)


def ratio(pairs: Sequence[tuple[float, float]], *, share: float) -> Ratio:
    """Sum of numerators over sum of denominators; one (numerator, denominator) per drawn unit.

    `share` is the part of all units that was drawn: with 1, nothing is left to chance. A single unit out of several
    says nothing about its neighbours, so its error is the ratio itself.
    """
    numerators = math.fsum(pair[0] for pair in pairs)
    denominators = math.fsum(pair[1] for pair in pairs)
    assert denominators > 0, "a ratio needs a positive denominator"
    value, units = numerators / denominators, len(pairs)
    if share >= 1:
        return Ratio(value=value, standard_error=0.0, units=units)
    if units < 2:
        return Ratio(value=value, standard_error=value, units=units)
    squares = math.fsum((n - value * d) ** 2 for n, d in pairs) / (units - 1)
    mean = denominators / units
    return Ratio(value=value, standard_error=math.sqrt((1 - share) * squares / units) / mean, units=units)


def product(first: Interval, second: Interval) -> Interval:
    """The product of two independent estimates: relative half-widths add as squares."""
    mid = first.mid * second.mid
    down = math.hypot(_relative(first.mid - first.low, first.mid), _relative(second.mid - second.low, second.mid))
    up = math.hypot(_relative(first.high - first.mid, first.mid), _relative(second.high - second.mid, second.mid))
    return Interval(low=max(0.0, mid * (1 - down)), mid=mid, high=mid * (1 + up))


def inverse(interval: Interval) -> Interval:
    """One over an interval of positive figures; an end at zero becomes infinity."""
    return Interval(
        low=1 / interval.high, mid=1 / interval.mid, high=1 / interval.low if interval.low > 0 else math.inf
    )


def share_interval(count: int, total: int) -> Interval:
    """Wilson's 90 % interval of a share seen as `count` of `total` draws (Wilson 1927); all of 0..1 without draws."""
    if not total:
        return Interval(low=0.0, mid=0.0, high=1.0)
    seen = count / total
    spread = Z90 * math.sqrt(seen * (1 - seen) / total + Z90**2 / (4 * total**2))
    centre, scale = seen + Z90**2 / (2 * total), 1 + Z90**2 / total
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return Interval(low=min(seen, low), mid=seen, high=max(seen, high))  # rounding may put 0 or 1 a hair outside


def exactly(value: float) -> Interval:
    """A figure that was counted."""
    return Interval(low=value, mid=value, high=value)


def _quantile(units: int) -> float:
    """Student's 95 % quantile for `units - 1` degrees of freedom, by the first term of its expansion in 1/df."""
    return Z90 + (Z90**3 + Z90) / (4 * max(1, units - 1))


def _relative(difference: float, middle: float) -> float:
    return difference / middle if middle else 0.0
