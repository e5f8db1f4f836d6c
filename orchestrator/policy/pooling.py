"""Several measurements of one log ratio -> what they say together, with outliers and strangers held back.

Pure statistics for `corrections`: Student-t errors by iteratively reweighted means, a spread that is learnt from the
measurements and from what is usual, and a shared drift that averaging does not remove.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.intervals import Z90

_DEGREES_OF_FREEDOM = 4.0
"""Of the Student-t error: the usual choice for data with some gross outliers (Lange, Little & Taylor 1989)."""
_SCALE_PER_SD = Z90 / 2.132
"""The Student-t of that many degrees with the 90 % interval of a normal distribution has this share of its width."""
_SPREAD_PRIOR_RUNS = 8.0
"""The usual spread counts as much as so many measurements: enough that a lone outlier cannot pass for spread (by the
count in `_fit` it adds degrees of freedom + 1 times the squared scale, and more must be there to hold it)."""
_MOST_ROUNDS = 200
_CLOSE = 1e-10
_SMALLEST_SCALE = 1e-3  # runs that agree to the last digit do not make the next one certain
_Fit = tuple[float, float]
"""Center and Student-t scale."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run's log of measured over predicted."""

    log_ratio: float
    weight: float = 1.0
    """Above 0, at most 1: how much of a full measurement it is."""
    drift: float = 0.0
    """Standard deviation of what sets its circumstances apart from those asked about; common to all measurements."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """What the measurements say together, as a normal likelihood of the log ratio."""

    mean: float
    variance: float
    """Of the mean."""
    spread: float
    """Standard deviation of a single run about it, of the normal distribution with the same 90 % interval."""


def pool(measurements: Sequence[Measurement], *, prior_sd: float, usual_spread: float) -> Pooled:
    """Measurements together, given a normal prior about 0 that says how far they can be believed to lie from it.

    How much runs differ is learnt from their distances to each other. Then, of the two explanations that the truth is
    near the prior or near the median, the likelier one is taken: a lone measurement many prior deviations away is
    rather an outlier than the truth, several that agree are not. The prior decides only that; it is no part of what
    comes out.
    """
    assert measurements, "there is something to pool"
    usual = usual_spread * _SCALE_PER_SD
    starts = (0.0, _median([m.log_ratio for m in measurements]))
    alone = [_fit(measurements, start, usual=usual) for start in starts]
    _, scale = max(alone, key=lambda fit: _log_density(measurements, fit, usual=usual))
    fits = [_fit(measurements, start, usual=usual, scale=scale, prior_sd=prior_sd) for start in starts]
    center, _ = max(fits, key=lambda fit: _log_density(measurements, fit, usual=usual, prior_sd=prior_sd))
    noise = [scale**2 / m.weight for m in measurements]
    trust = _trust(measurements, center, scale)
    shares = [u / (n + m.drift**2) for u, n, m in zip(trust, noise, measurements, strict=True)]
    total = sum(shares)
    mean = sum(share * m.log_ratio for share, m in zip(shares, measurements, strict=True)) / total
    # Noise averages out; the drift is common to all, so it does not.
    averaged = sum(share**2 * n / u for share, n, u in zip(shares, noise, trust, strict=True)) / total**2
    drift = sum(share * m.drift for share, m in zip(shares, measurements, strict=True)) / total
    return Pooled(mean=mean, variance=averaged + drift**2, spread=scale / _SCALE_PER_SD)


def _fit(
    measurements: Sequence[Measurement],
    start: float,
    *,
    usual: float,
    scale: float | None = None,
    prior_sd: float = math.inf,
) -> _Fit:
    """The likeliest center and scale near a start, by expectation maximisation; a scale that is given stays."""
    center, width = start, scale or usual
    for _ in range(_MOST_ROUNDS):
        trust = _trust(measurements, center, width)
        shares = [u / _variance(m, width) for u, m in zip(trust, measurements, strict=True)]
        weighted = sum(share * m.log_ratio for share, m in zip(shares, measurements, strict=True))
        moved = weighted / (sum(shares) + prior_sd**-2)
        if scale is None:
            # Of a squared distance, noise has the part that it has of the variance; the rest is drift.
            noise = sum(
                u * (m.log_ratio - moved) ** 2 * width**2 / _variance(m, width)
                for u, m in zip(trust, measurements, strict=True)
            )
            # One less than there are: the center is theirs too.
            count = len(measurements) - 1 + _SPREAD_PRIOR_RUNS
            width = max(_SMALLEST_SCALE, math.sqrt((_SPREAD_PRIOR_RUNS * usual**2 + noise) / count))
        if abs(moved - center) < _CLOSE:
            return moved, width
        center = moved
    return center, width


def _trust(measurements: Sequence[Measurement], center: float, scale: float) -> list[float]:
    """Above 1 near the center, towards 0 far away: the Student-t weights."""
    return [
        (_DEGREES_OF_FREEDOM + 1) / (_DEGREES_OF_FREEDOM + (m.log_ratio - center) ** 2 / _variance(m, scale))
        for m in measurements
    ]


def _variance(measurement: Measurement, scale: float) -> float:
    return scale**2 / measurement.weight + measurement.drift**2


def _log_density(measurements: Sequence[Measurement], fit: _Fit, *, usual: float, prior_sd: float = math.inf) -> float:
    """Logarithm of prior times likelihood, constants left out."""
    center, scale = fit
    total = -((center / prior_sd) ** 2) / 2
    total -= _SPREAD_PRIOR_RUNS * (math.log(scale) + (usual / scale) ** 2 / 2)
    for m in measurements:
        variance = _variance(m, scale)
        distance = (m.log_ratio - center) ** 2 / (_DEGREES_OF_FREEDOM * variance)
        total -= math.log(variance) / 2 + (_DEGREES_OF_FREEDOM + 1) / 2 * math.log1p(distance)
    return total


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
