"""Loss after fine-tuning on so many examples, fitted to the few sizes that pilots or past runs have measured.

Comes in: pairs of examples and held-out loss. Goes out: a `FinetuningCurve` that answers with 90 % intervals, which
widen beyond the measured sizes. Called by the advisor for pilots and history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import DataError
from orchestrator.planning.run_plan import Interval

MINIMUM_SIZES = 4
"""Different numbers of examples without which the law's four constants stay open."""
_USUAL_LOG_SD = 0.01
_USUAL_WEIGHT = 2.0
"""Scatter of measured losses around the law (0.002 to 0.04 on 30 models, Lin 2024), and how many measurements that
knowledge counts for."""
_DROP_SD = 2.0
"""Whole fall of the log loss from no examples to endless ones, as far as one can know before: e^2 up to 2/3 (guess)."""
_HALF_REACH = 100.0
"""Factor beyond the measured sizes in which the half-way point may lie."""
_HALVES, _EXPONENTS = 25, tuple(0.125 * step for step in range(1, 13))
"""Grid of the two constants that are not linear. Published exponents lie within 0.1 to 1.5 [M, from memory]."""
_NEGLIGIBLE = 1e-6
_QUANTILES = (-1.5932, -0.9674, -0.5895, -0.2822, 0.0, 0.2822, 0.5895, 0.9674, 1.5932)
"""Nine equally likely values of a standard normal: the middles of its ninths."""


@dataclass(frozen=True, kw_only=True)
class _Node:
    """One pair of non-linear constants, with the best floor and drop for it."""

    half: float
    exponent: float
    floor: float
    drop: float
    covariance: tuple[float, float, float]
    """Variance of floor, of drop, and their covariance, per unit of noise variance."""
    weight: float

    def log_loss(self, examples: float) -> float:
        return self.floor + self.drop * _share_left(examples, self.half, self.exponent)

    def variance(self, examples: float) -> float:
        left = _share_left(examples, self.half, self.exponent)
        of_floor, of_drop, both = self.covariance
        return of_floor + 2 * left * both + left * left * of_drop


@dataclass(frozen=True, kw_only=True)
class FinetuningCurve:
    """ln L(n) = floor + drop / (1 + (n / half)^exponent): the rectified law of Lin 2024 (ICML), as its code fits it.

    n are examples of one task, for one base model and method; L is any held-out loss above zero. The law adds to a
    power law the start that pretraining gives. Extrapolating 8 times beyond the data it was 4 to 6 % off on 30 models
    and 3 tasks, a plain power law 2 to 16 %; at 64 times 5 to 21 %.
    """

    nodes: tuple[_Node, ...]
    log_sd: float
    """Scatter of a measured loss around the curve, in its logarithm."""
    examples: tuple[float, float]
    """Smallest and largest size measured."""

    def loss(self, examples: float) -> Interval:
        """The loss that a further run on so many examples will show."""
        spread: list[tuple[float, float]] = []
        for node in self.nodes:
            sd = self.log_sd * math.sqrt(1 + node.variance(examples))
            spread.extend((node.log_loss(examples) + sd * z, node.weight) for z in _QUANTILES)
        spread.sort()
        low, mid, high = (math.exp(_weighted_quantile(spread, share)) for share in (0.05, 0.5, 0.95))
        return Interval(low=low, mid=mid, high=high)

    def in_range(self, examples: float, *, reach: float = 8.0) -> bool:
        """Whether `examples` is no further beyond the measured sizes than the law has been checked, 8 times."""
        low, high = self.examples
        return low / reach <= examples <= high * reach


def fit_curve(points: Sequence[tuple[float, float]]) -> FinetuningCurve:
    """The curves that (examples, loss) points allow, each weighted by how well it fits. Order does not matter.

    For every half-way point and exponent of a grid, floor and drop follow by least squares on log losses.
    Raises DataError for fewer than 4 different sizes, or a loss that has no logarithm.
    """
    _check(points)
    sizes = [float(examples) for examples, _ in points]
    logs = [math.log(loss) for _, loss in points]
    grid = [(half, exponent) for half in _halves(sizes) for exponent in _EXPONENTS]
    shares = [[_share_left(size, half, exponent) for size in sizes] for half, exponent in grid]
    # First without the prior on the drop, to learn the noise that the prior is weighed against.
    least = min(_solve(left, logs, ridge=1e-9)[1] for left in shares)
    freedom = max(0, len(points) - MINIMUM_SIZES) + _USUAL_WEIGHT
    variance = (least + _USUAL_WEIGHT * _USUAL_LOG_SD**2) / freedom
    solved = [_solve(left, logs, ridge=variance / _DROP_SD**2) for left in shares]
    best = min(squares for _, squares in solved)
    weights = [math.exp(-(squares - best) / (2 * variance)) for _, squares in solved]
    total = sum(weights)
    nodes = tuple(
        _Node(half=half, exponent=exponent, floor=floor, drop=drop, covariance=covariance, weight=weight / total)
        for (half, exponent), ((floor, drop, covariance), _), weight in zip(grid, solved, weights, strict=True)
        if weight > _NEGLIGIBLE
    )
    return FinetuningCurve(nodes=nodes, log_sd=math.sqrt(variance), examples=(min(sizes), max(sizes)))


_Solution = tuple[float, float, tuple[float, float, float]]


def _solve(left: Sequence[float], logs: Sequence[float], *, ridge: float) -> tuple[_Solution, float]:
    """(floor, drop, covariance) and the penalised sum of squares; a curve that would rise is flat instead."""
    count, total, squares = len(left), sum(left), sum(x * x for x in left) + ridge
    log_total, product = sum(logs), sum(x * y for x, y in zip(left, logs, strict=True))
    determinant = count * squares - total * total
    drop = (count * product - total * log_total) / determinant
    covariance = (squares / determinant, count / determinant, -total / determinant)
    if drop < 0:
        drop, covariance = 0.0, (1 / count, 0.0, 0.0)
    floor = (log_total - drop * total) / count
    misfit = sum((y - floor - drop * x) ** 2 for x, y in zip(left, logs, strict=True))
    return (floor, drop, covariance), misfit + ridge * drop * drop


def _share_left(examples: float, half: float, exponent: float) -> float:
    """Share of the drop still to come after `examples`: 1 at none, 1/2 at `half`."""
    return float(1 / (1 + (examples / half) ** exponent))


def _halves(sizes: Sequence[float]) -> list[float]:
    low = math.log(min(size for size in sizes if size > 0) / _HALF_REACH)
    high = math.log(max(sizes) * _HALF_REACH)
    return [math.exp(low + (high - low) * step / (_HALVES - 1)) for step in range(_HALVES)]


def _weighted_quantile(ordered: Sequence[tuple[float, float]], share: float) -> float:
    """Value below which `share` of the weight lies; `ordered` are (value, weight) with rising values."""
    target, passed = share * sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        passed += weight
        if passed >= target:
            return value
    return ordered[-1][0]


def _check(points: Sequence[tuple[float, float]]) -> None:
    sizes = {examples for examples, _ in points}
    if len(sizes) < MINIMUM_SIZES:
        raise DataError(
            "too few sizes to fit a fine-tuning curve",
            got=f"{len(sizes)} different numbers of examples",
            allowed=f"{MINIMUM_SIZES} or more",
            do="measure more sizes, best spread over a factor of 8 or more",
        )
    for examples, loss in points:
        if not (0 <= examples < math.inf and 0 < loss < math.inf):
            raise DataError(
                "a point of a fine-tuning curve is impossible",
                got=f"loss {loss:g} after {examples:g} examples",
                allowed="a finite loss above 0, and 0 or more examples",
                do="leave the run out",
            )
