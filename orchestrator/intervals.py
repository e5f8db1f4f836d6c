"""Figures with their 90 % intervals: what the planner and the advisor answer with."""

from __future__ import annotations

from dataclasses import dataclass

Z90 = 1.645
"""Standard deviations from the middle of a normal distribution to the ends of its 90 % interval."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 90 % interval with its middle."""

    low: float
    mid: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """All three figures times a factor."""
        return Interval(low=self.low * factor, mid=self.mid * factor, high=self.high * factor)

    def at_least(self, other: Interval) -> Interval:
        """The larger of both at each of the three."""
        return Interval(low=max(self.low, other.low), mid=max(self.mid, other.mid), high=max(self.high, other.high))

    def __add__(self, other: Interval) -> Interval:
        """The sum of both, as if they were wrong the same way: no error makes up for another."""
        return Interval(low=self.low + other.low, mid=self.mid + other.mid, high=self.high + other.high)


ZERO = Interval(low=0.0, mid=0.0, high=0.0)
"""Where sums begin."""
