"""How much of its peak a device reaches in training: by family of devices, model size and scale, with an interval.

Two figures are kept apart. The benchmark fraction is that of some minutes of steady steps. The whole-run fraction is
what published trainings reached from their first step to their last; over the benchmark's it is the goodput, which
restarts, evaluation, checkpoints and idle devices bring down. Read from the device catalogue; used by `throughput`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.intervals import Z90, Interval

REFERENCE_PARAMETERS = 1e10
REFERENCE_TOKENS = 1e12
"""The model size and length at which `Utilization.fraction` is stated."""
FEWEST_TOKENS = 3e11
MOST_TOKENS = 2e12
"""Between these the fraction grows with the tokens: those of published trainings on A100. Longer ones are worth more
work on their speed."""
BENCHMARK_SIZE_EXPONENT = 0.06
"""Benchmarks on A100 grow by it: 0.389 at 125M, 0.519 at 13B (llm-foundry's benchmarking table)."""
ONE_NODE_GOODPUT = 0.9
"""Goodput of a training on one node: Llama 3 (arXiv 2407.21783) kept more than 90 % of its time effective even on
16,384 H100; the rest is evaluation and checkpoints. Of one-node trainings, llm.c's GPT-2 got 0.55 of its A100s."""
ONE_NODE_DEVICES = 8
CLUSTER_DEVICES = 32
"""Up to the first number of devices the one-node speed is expected, from the second on that of published clusters.
Pythia was trained on 32 and 64 devices, no faster than models of its size on hundreds."""
ONE_NODE_DEVICE_HOURS = 1e3
CLUSTER_DEVICE_HOURS = 1e4
"""Likewise for the length: 1e4 hours are 52 days of one node. Published one-node trainings took 12 to 3456."""
MATRIX_PRODUCT_FRACTION = 0.87
"""What the best shape of a 16-bit matrix product alone gets of an A100's peak (ml-engineering: 271.2 of 312 TFLOP/s).
No training gets more."""


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """What trainings on one family of devices reach of the peak."""

    fraction: float
    """Model FLOP/s over the peak, of whole trainings of 10B parameters on 1T tokens: the median."""
    size_exponent: float
    """The fraction grows with this power of the parameters: small matrices leave more of a device unused."""
    length_exponent: float
    """Likewise with this power of the tokens, from 3e11 to 2e12."""
    smallest: float
    largest: float
    """Parameters between which it grows: those of published trainings, or until matrices are wide enough."""
    spread: float
    """Standard deviation of ln(published / predicted), each training predicted from the others."""
    runs: int
    """Published trainings behind these figures; 0 where the spread is a judgement."""
    benchmark: Interval | None
    """The fraction in benchmarks of 10B parameters; None where none are published."""

    def whole_run(self, parameters: float | None = None, tokens: float | None = None) -> float:
        """The fraction of a long training on a cluster; 10B parameters and 1T tokens where they are not given."""
        length = min(max(tokens or REFERENCE_TOKENS, FEWEST_TOKENS), MOST_TOKENS) / REFERENCE_TOKENS
        relative = math.pow(self._relative_size(parameters), self.size_exponent) * math.pow(
            length, self.length_exponent
        )
        return self.fraction * relative

    def benchmark_at(self, parameters: float | None = None) -> float | None:
        """The fraction in a benchmark; None where none are published."""
        if self.benchmark is None:
            return None
        return self.benchmark.mid * math.pow(min(1.0, self._relative_size(parameters)), BENCHMARK_SIZE_EXPONENT)

    def achieved(self, *, parameters: float | None, tokens: float | None, devices: int, device_hours: float) -> float:
        """The fraction to expect of a training of about `device_hours` on `devices`.

        On one node it is near the benchmark's; from there it goes, in the logarithm of devices and hours, to that of
        whole published runs. Devices times fraction always grows with the devices, so more of them are never slower.
        """
        whole, benchmark = self.whole_run(parameters, tokens), self.benchmark_at(parameters)
        if benchmark is None:
            return whole
        one_node = _share_left(devices, ONE_NODE_DEVICES, CLUSTER_DEVICES)
        one_node *= _share_left(device_hours, ONE_NODE_DEVICE_HOURS, CLUSTER_DEVICE_HOURS)
        return whole * math.pow(ONE_NODE_GOODPUT * benchmark / whole, one_node)

    def interval(self, mid: float) -> Interval:
        """The 90 % interval about a fraction: log-normal, wider where few trainings were published."""
        width = self.spread * Z90
        if self.runs:
            width = self.spread * _student_95(self.runs - 2) * math.sqrt(1 + 1 / self.runs)
        high = max(min(mid * math.exp(width), MATRIX_PRODUCT_FRACTION), 1.01 * mid)
        return Interval(low=mid * math.exp(-width), mid=mid, high=high)

    def _relative_size(self, parameters: float | None) -> float:
        size = REFERENCE_PARAMETERS if parameters is None else parameters
        return min(max(size, self.smallest), self.largest) / REFERENCE_PARAMETERS


def without_tensor_cores(fraction: float, peak_ratio: float) -> float:
    """The fraction of the fp32 peak that goes with a fraction of a 16-bit peak `peak_ratio` times as high.

    Only matrix products slow down by that ratio; all else moves twice the bytes. Derived, not measured: an A100's 0.36
    in bf16 becomes 0.74 of the 19.5 TFLOP/s of fp32.
    """
    products = 1 / MATRIX_PRODUCT_FRACTION
    rest = max(0.0, 1 / fraction - products)
    return peak_ratio / (peak_ratio * products + 2 * rest)


def _share_left(value: float, start: float, end: float) -> float:
    """1 up to `start`, 0 from `end` on, and linear in the logarithm between."""
    return min(1.0, max(0.0, math.log(end / max(value, 1e-9)) / math.log(end / start)))


def _student_95(freedom: int) -> float:
    """95 % quantile of Student's t, by the first terms of its expansion about the normal one (Cornish-Fisher)."""
    first = (Z90**3 + Z90) / 4
    second = (5 * Z90**5 + 16 * Z90**3 + 3 * Z90) / 96
    return Z90 + first / freedom + second / freedom**2
