"""How sure the pretraining law is: its parameters as a distribution, and the intervals that follow.

Comes in: parameters, tokens or FLOPs. Goes out: samples of the law, and 90 % intervals of losses and optimal sizes.
Deterministic: the same seed draws the same laws.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.planning.run_plan import Interval
from orchestrator.policy.laws import REFIT, PretrainingLaw

Z90 = 1.645
"""Standard deviations from the middle of a normal distribution to the ends of its 90 % interval."""

_PIVOT_PARAMETERS = 2e7
_PIVOT_TOKENS = 8e8
"""Where each reducible term is known apart from its exponent: A and alpha correlate at 0.9998, A / 2e7^alpha and alpha
hardly."""
_SPREADS = (0.0096, 0.0108, 0.0257, 0.0152, 0.0209)
_CORRELATIONS = (
    (1.0,),
    (-0.507, 1.0),
    (0.153, -0.006, 1.0),
    (-0.083, 0.248, 0.578, 1.0),
    (0.347, -0.126, 0.613, -0.264, 1.0),
)
"""Standard deviations and correlations of ln(A / 2e7^alpha), ln(B / 8e8^beta), E in nats, alpha and beta.

From 1,000 bootstrap fits made for this module to the 240 runs that Besiroglu 2024 published, by its own method (Huber
loss of 1e-3 on log losses). Their 95 % intervals agree with the printed ones: A 284 to 712 (printed 285 to 744), B 1109
to 5974 (1042 to 5810), E 1.771 to 1.871 (1.769 to 1.871), alpha .316 to .371 (.317 to .373), beta .335 to .417 (.331 to
.415)."""

FIT_LOG_SD = 0.0075
"""Scatter of those runs around the law, in the logarithm of the loss (computed on them)."""
CORPUS_LOG_SD = 0.18
"""Shift of all losses on another corpus and vocabulary, in the logarithm: -0.22 for the Pile, +0.14 for C4 on average
(tests/evidence/losses.csv). Two corpora only."""
SAMPLES = 400
"""Draws behind an interval: its ends then tremble by 2 to 4 % of its width from seed to seed (measured)."""


@functools.cache
def posterior_samples(count: int = SAMPLES, seed: int = 0) -> tuple[PretrainingLaw, ...]:
    """`count` laws that the runs could as well have come from, around `REFIT`."""
    draws = random.Random(seed)
    root = _cholesky(_CORRELATIONS)
    return tuple(_drawn(root, [draws.gauss(0, 1) for _ in _SPREADS]) for _ in range(count))


def loss_interval(parameters: float, tokens: float, *, corpus_log_sd: float = 0.0) -> Interval:
    """Nats per token of a new run on fresh tokens: uncertain parameters of the law, and runs scatter around it.

    `corpus_log_sd` adds what another corpus or tokenizer shifts; with 0 the run is on the law's own.
    """
    middle = REFIT.loss(parameters, tokens)
    # Drawn laws are valid for the same arguments, so they need no second check.
    low, high = _ends([law.loss(parameters, tokens) for law in posterior_samples()])
    scatter = Z90 * middle * math.hypot(FIT_LOG_SD, corpus_log_sd)
    return Interval(
        low=middle - math.hypot(max(0.0, middle - low), scatter),
        mid=middle,
        high=middle + math.hypot(max(0.0, high - middle), scatter),
    )


def optimal_parameters_interval(flops: float) -> Interval:
    """Compute-optimal size for `flops`, as far as the runs behind the law determine it."""
    middle = REFIT.optimal(flops).parameters
    low, high = _ends([law.optimal(flops).parameters for law in posterior_samples()])
    return Interval(low=min(low, middle), mid=middle, high=max(high, middle))


def _drawn(root: Sequence[Sequence[float]], normals: Sequence[float]) -> PretrainingLaw:
    """One law, `normals` standard deviations from `REFIT` along the rows of `root`."""
    size, data, irreducible, size_exponent, data_exponent = (
        spread * sum(weight * normal for weight, normal in zip(row, normals, strict=True))
        for spread, row in zip(_SPREADS, root, strict=True)
    )
    return replace(
        REFIT,
        irreducible=REFIT.irreducible + irreducible,
        # The term at its pivot moves by `size`; with the exponent that fixes A.
        size_scale=REFIT.size_scale * math.exp(size) * _PIVOT_PARAMETERS**size_exponent,
        data_scale=REFIT.data_scale * math.exp(data) * _PIVOT_TOKENS**data_exponent,
        size_exponent=REFIT.size_exponent + size_exponent,
        data_exponent=REFIT.data_exponent + data_exponent,
    )


def _cholesky(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """The lower triangle whose product with its transpose is the symmetric matrix that has `matrix` as its own."""
    size = len(matrix)
    root = [[0.0] * size for _ in range(size)]
    for row in range(size):
        for column in range(row + 1):
            rest = matrix[row][column] - sum(root[row][k] * root[column][k] for k in range(column))
            root[row][column] = math.sqrt(rest) if row == column else rest / root[column][column]
    return root


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The 5th and the 95th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.05 * last)], ordered[round(0.95 * last)]
