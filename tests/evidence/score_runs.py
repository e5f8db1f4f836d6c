"""GPU-hours against published trainings: `python -m tests.evidence.score_runs` prints every row and the score.

`runs.csv` says in its column `use` what a row is for. `score`: the public cases that are scored. `added`: further
trainings whose source was read; they are fitted, not scored. `memory`: figures known but not looked up; they are
neither, and show how the model does on other trainings (not quite unseen: that length enters at all, and not only size,
was decided by them and by leave-one-out). `benchmark`: steady steps, to compare with the catalogue's benchmark
fractions. `none`: size or tokens were not published.

The catalogue's fractions are least squares in the logarithm, one line for each family of devices, over `score` and
`added`. Left out are distilled models, whose hours are not their own FLOPs', and trainings on one node, whose speed is
the benchmarks'. Leave-one-out predicts each training by a line fitted without it.
"""

from __future__ import annotations

import csv
import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orchestrator.architectures.standard_shape import standard_shape
from orchestrator.intervals import Interval
from orchestrator.methods.registry import PRICED
from orchestrator.planning.hardware import Device, find_device
from orchestrator.planning.throughput import PricedRun, RunCost, flops_per_token, run_cost
from orchestrator.planning.utilization import (
    FEWEST_TOKENS,
    MOST_TOKENS,
    ONE_NODE_DEVICES,
    REFERENCE_PARAMETERS,
    REFERENCE_TOKENS,
    Utilization,
)

EVIDENCE = Path(__file__).with_name("runs.csv")
SEQUENCE_LENGTH = 2048
"""Tokens: that of most of the trainings; attention is 1 to 10 % of the FLOPs at it."""
UNPUBLISHED_DEVICES = 1024
"""Where the number of devices was not published; any number of them above 31 gives the same."""
FITTED_FAMILIES = {"a100": "A100-80GB", "h100": "H100-80GB"}
"""Families with enough trainings for a line, each with a device of it."""
BASELINE_FRACTION = 0.40
"""Of the peak: the rule of thumb that GPU-hours are 6 x parameters x tokens at 40 %."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A training as published."""

    name: str
    parameters: int
    tokens: float
    device: Device
    devices: int | None
    gpu_hours: float
    zero_stage: int | None
    distilled: bool
    use: str

    @property
    def family(self) -> str | None:
        """The family whose line it belongs to."""
        for family, device in FITTED_FAMILIES.items():
            if self.device.utilization == find_device(device).utilization:
                return family
        return None

    @property
    def on_one_node(self) -> bool:
        """Whether no network was in the way."""
        return self.devices is not None and self.devices <= ONE_NODE_DEVICES


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A published training beside its prediction."""

    run: PublishedRun
    gpu_hours: Interval
    baseline_gpu_hours: float

    @property
    def error(self) -> float:
        """Of the middle, relative to what was published."""
        return self.gpu_hours.mid / self.run.gpu_hours - 1

    @property
    def covered(self) -> bool:
        """Whether the interval holds what was published."""
        return self.gpu_hours.low <= self.run.gpu_hours <= self.gpu_hours.high


@dataclass(frozen=True, kw_only=True)
class RunsScore:
    """How good the predictions are over the rows to score."""

    rows: tuple[Prediction, ...]
    median_error: float
    """Median absolute relative error of GPU-hours."""
    coverage: float
    """Share inside the 90 % interval."""
    baseline_error: float
    """Median absolute relative error of 6ND at 40 % of the peak."""
    left_out: tuple[Prediction, ...]
    """Each predicted by the lines fitted without it."""
    left_out_error: float
    left_out_coverage: float
    unseen: tuple[Prediction, ...]
    """Trainings that were never fitted."""
    unseen_error: float
    unseen_coverage: float


def read_runs() -> list[PublishedRun]:
    """All trainings whose size, tokens and hours were published."""
    with EVIDENCE.open(newline="", encoding="utf-8") as stream:
        return [
            PublishedRun(
                name=raw["name"],
                parameters=int(raw["parameters"]),
                tokens=float(raw["tokens"]),
                device=find_device(raw["gpu"]),
                devices=int(raw["gpu_count"]) if raw["gpu_count"] else None,
                gpu_hours=float(raw["gpu_hours"]),
                zero_stage=int(raw["zero_stage"]) if raw["zero_stage"] else None,
                distilled=raw["distilled"] == "yes",
                use=raw["use"],
            )
            for raw in csv.DictReader(stream)
            if raw["use"] in ("score", "added", "memory")
        ]


def read_benchmarks() -> list[tuple[str, float, float]]:
    """(name, published fraction of the peak, the catalogue's benchmark fraction) of steady steps."""
    with EVIDENCE.open(newline="", encoding="utf-8") as stream:
        rows = [raw for raw in csv.DictReader(stream) if raw["use"] == "benchmark"]
    benchmarks = []
    for raw in rows:
        device, parameters = find_device(raw["gpu"]), int(raw["parameters"])
        speed = float(raw["tokens_per_second_per_gpu"]) * _flops_per_token(parameters)
        predicted = device.utilization.benchmark_at(parameters)
        assert predicted is not None  # the rows are of A100 and H100
        benchmarks.append((raw["name"], speed / device.peak_flops("bf16"), predicted))
    return benchmarks


def score() -> RunsScore:
    """The predictions of the catalogue as it is, and of lines fitted without each row."""
    runs = read_runs()
    scored = [run for run in runs if run.use == "score"]
    rows = tuple(predict(run) for run in scored)
    left_out = tuple(predict(run, fitted_without(run, runs)) for run in scored)
    unseen = tuple(predict(run) for run in runs if run.use == "memory")
    return RunsScore(
        rows=rows,
        median_error=_median_error(rows),
        coverage=_coverage(rows),
        baseline_error=statistics.median(abs(row.baseline_gpu_hours / row.run.gpu_hours - 1) for row in rows),
        left_out=left_out,
        left_out_error=_median_error(left_out),
        left_out_coverage=_coverage(left_out),
        unseen=unseen,
        unseen_error=_median_error(unseen),
        unseen_coverage=_coverage(unseen),
    )


def predict(run: PublishedRun, utilization: Utilization | None = None) -> Prediction:
    """GPU-hours of a training from its sizes, device and scale; its name does not enter."""
    baseline = 6 * run.parameters * run.tokens / (BASELINE_FRACTION * run.device.peak_flops("bf16")) / 3600
    return Prediction(run=run, gpu_hours=_cost(run, utilization).gpu_hours, baseline_gpu_hours=baseline)


def _cost(run: PublishedRun, utilization: Utilization | None = None) -> RunCost:
    return run_cost(
        PricedRun(
            flops_per_step=_flops_per_token(run.parameters) * run.tokens,
            steps=1,
            workers=run.devices or UNPUBLISHED_DEVICES,
            device=run.device if utilization is None else replace(run.device, utilization=utilization),
            precision="bf16",
            usd_per_device_hour=None,
            parameters=run.parameters,
            zero_stage=run.zero_stage,
        )
    )


def _flops_per_token(parameters: int) -> float:
    shape = standard_shape(parameters)
    return flops_per_token(shape, method=PRICED["full"].cost, trainable=parameters, sequence_length=SEQUENCE_LENGTH)


def fitted_without(left_out: PublishedRun, runs: Sequence[PublishedRun]) -> Utilization:
    """The utilization of a training's devices, fitted without it; the catalogue's where nothing is fitted."""
    family = left_out.family
    if family is None:
        return left_out.device.utilization
    return fit(family, [run for run in runs if run is not left_out])


def fit(family: str, runs: Sequence[PublishedRun]) -> Utilization:
    """Least squares of ln(fraction) on ln(parameters) over a family's fitted trainings, and on ln(tokens) for A100.

    Trainings on H100 are nearly all longer than where the effect of length ends, so they take the catalogue's.
    """
    facts = find_device(FITTED_FAMILIES[family]).utilization
    chosen = [run for run in runs if run.family == family and _fitted(run)]
    sizes, lengths = np.array([_log_size(run, facts) for run in chosen]), np.array([_log_length(run) for run in chosen])
    fractions = np.array([_log_fraction(run, facts) for run in chosen])
    if family == "a100":
        columns = np.stack([np.ones_like(sizes), sizes, lengths], axis=1)
        level, slope, growth = np.linalg.lstsq(columns, fractions)[0]
    else:
        growth = facts.length_exponent
        columns = np.stack([np.ones_like(sizes), sizes], axis=1)
        level, slope = np.linalg.lstsq(columns, fractions - growth * lengths)[0]
    return replace(
        facts,
        fraction=math.exp(level),
        size_exponent=float(slope),
        length_exponent=float(growth),
        runs=len(chosen),
    )


def spread(family: str, runs: Sequence[PublishedRun]) -> float:
    """Root mean square of ln(published / predicted), each of a family's fitted trainings left out in turn."""
    chosen = [run for run in runs if run.family == family and _fitted(run)]
    errors = [math.log(run.gpu_hours / predict(run, fitted_without(run, runs)).gpu_hours.mid) for run in chosen]
    return math.sqrt(statistics.fmean(error**2 for error in errors))


def _fitted(run: PublishedRun) -> bool:
    return run.use in ("score", "added") and not run.distilled and not run.on_one_node


def _log_size(run: PublishedRun, facts: Utilization) -> float:
    return math.log(min(max(run.parameters, facts.smallest), facts.largest) / REFERENCE_PARAMETERS)


def _log_length(run: PublishedRun) -> float:
    return math.log(min(max(run.tokens, FEWEST_TOKENS), MOST_TOKENS) / REFERENCE_TOKENS)


@functools.cache
def _log_fraction(run: PublishedRun, facts: Utilization) -> float:
    """ln of the fraction without what the network cost, where ZeRO-3 was published."""
    predicted = _cost(run).gpu_hours.mid
    return math.log(facts.whole_run(run.parameters, run.tokens) * predicted / run.gpu_hours)


def _median_error(rows: Sequence[Prediction]) -> float:
    return statistics.median(abs(row.error) for row in rows)


def _coverage(rows: Sequence[Prediction]) -> float:
    return statistics.fmean(row.covered for row in rows)


def table(result: RunsScore) -> Iterator[str]:
    """The lines that `python -m tests.evidence.score_runs` prints."""
    heading = f"{'training':34}{'device':12}{'published':>12}{'predicted':>12}{'90 % interval':>26}"
    yield f"{heading}{'error':>8}{'left out':>10}{'6ND, 40 %':>11}"
    for row, other in zip(result.rows, result.left_out, strict=True):
        baseline = row.baseline_gpu_hours / row.run.gpu_hours - 1
        yield f"{_line(row)}{100 * other.error:>+9.0f}%{100 * baseline:>+10.0f}%"
    yield "never fitted, from memory:"
    yield from (_line(row) for row in result.unseen)
    for what, error, coverage in (
        ("catalogue", result.median_error, result.coverage),
        ("left out", result.left_out_error, result.left_out_coverage),
        ("never fitted", result.unseen_error, result.unseen_coverage),
    ):
        yield f"{what}: median error {100 * error:.1f} %, {100 * coverage:.0f} % inside the 90 % interval"
    yield f"6ND at 40 % of the peak: median error {100 * result.baseline_error:.1f} %"
    yield "benchmarks:"
    for name, published, predicted in read_benchmarks():
        yield f"{name:34}{published:>12.3f}{predicted:>12.3f}"
    for family in FITTED_FAMILIES:
        line = fit(family, read_runs())
        yield (
            f"{family}: fraction {line.fraction:.3f}, size_exponent {line.size_exponent:.3f}, "
            f"length_exponent {line.length_exponent:.3f}, spread {spread(family, read_runs()):.3f}, runs {line.runs}"
        )


def _line(row: Prediction) -> str:
    run, hours = row.run, row.gpu_hours
    interval = f"{hours.low:,.0f} to {hours.high:,.0f}{' ' if row.covered else '*'}"
    figures = f"{run.gpu_hours:>12,.0f}{hours.mid:>12,.0f}{interval:>26}{100 * row.error:>+7.0f}%"
    name = f"{run.name} (distilled)" if run.distilled else run.name
    return f"{name[:33]:34}{run.device.name:12}{figures}"


if __name__ == "__main__":
    print("\n".join(table(score())))
