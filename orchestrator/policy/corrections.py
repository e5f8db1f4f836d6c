"""Past runs -> posterior corrections of what the planner and the laws predict.

Comes in: `RunRecord`s, which `tracking.past_runs` reads from MLflow. Goes out: for a device's throughput, its peak
memory and the quality reached on a dataset a `Correction`, which `advise` applies to its figures.

All in logarithms of measured over predicted. Before any run the ratio is 1, as wide as the prediction's own interval.
A run adds a measurement with heavy tails (Student's t), so that one under load counts for little, and with a drift that
grows with the distance between its size and the one asked about, which more runs of the wrong size do not reduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.intervals import Z90, Interval
from orchestrator.planning.hardware import find_device
from orchestrator.policy.pooling import Measurement, Pooled, pool

Quantity = Literal["throughput", "memory", "loss", "error"]

FEW_STEPS = 10
"""A run of fewer measured steps counts by their share of these (a guess: the median of ten is steady)."""
_SPREAD = {
    "throughput": 0.10,  # guess: a few per cent on a quiet machine; 0.2 in four repeats on two busy cores (measured)
    "memory": 0.03,  # guess, over configurations; four repeats of one differed by 0.2 % (measured)
    "loss": 0.02,  # guess: seeds of fine-tuning on thousands of examples; few examples spread more
    "error": 0.10,  # guess: seeds and a held-out set of about a thousand, whose error of 10 % is known to a tenth
}
"""Run-to-run standard deviation of the log ratio, before the runs at hand say otherwise."""
_SIZE_DRIFT = 0.20
"""Per factor e in parameters: 25 and 43 GFLOP/s at 16 times the weights, measured on a CPU (configs/devices.yaml)."""
_DEVICES_DRIFT = 0.10  # guess, per factor e in devices: communication and shared memory bandwidth
_PEAK_DRIFT = 0.05  # guess, per factor e in predicted peak: a fixed part weighs less in a large one
_MEMORY_PRIOR = 0.13
"""The planner's own interval of 0.85 to 1.30 times its middle, as a standard deviation."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a finished run planned and measured. Every figure is finite, and above zero where it is a divisor."""

    run_id: str
    name: str
    kind: str
    """`pretrain` or `finetune`."""
    method: str
    task: str
    device_name: str
    """Key of the device catalogue."""
    workers: int
    precision: str
    """`fp32`, `bf16` or `fp16`."""
    parameters: int
    trainable_parameters: int
    sequence_length: int
    tokens_per_step: int
    """As planned, on average and without padding."""
    flops_per_step: float
    """As planned: model FLOPs of one optimizer step, those of padding included."""
    steps: int
    """Optimizer steps done."""
    measured_steps: int
    """Steps behind the median, warm-up left out."""
    predicted_tokens_per_second: float
    """As planned, from the first step to the last."""
    measured_tokens_per_second: float
    """Tokens of all workers, without padding, from the first step to the last: the median step, and pauses for
    evaluation and checkpoints."""
    predicted_peak_gib: float
    measured_peak_gib: float
    """Most memory that one device (on a CPU: one worker process) held."""
    predicted_gpu_hours: float
    measured_gpu_hours: float
    """Device hours: every start, evaluations and checkpoints included."""
    train_samples: int
    """Samples of one epoch: labelled examples, or packed blocks."""
    train_tokens: int
    """Tokens of one epoch, without padding."""
    tokens_seen: int
    base_model: str | None = None
    """As the spec named it; None for new weights."""
    data_source: str | None = None
    """`data.train` as the spec named it."""
    data_fingerprint: str | None = None
    """Of the encoded data: the same files under another tokenizer or length have another."""
    eval_loss: float | None = None
    """Last held-out loss, nats per token or per example."""
    eval_accuracy: float | None = None
    """Last held-out accuracy, 0 to 1."""

    def trained_on(self, data: str) -> bool:
        """Whether `data`, a location or a fingerprint of encoded data, is what this run was trained on."""
        if data in (self.data_fingerprint, self.data_source):
            return True
        return self.data_source is not None and Path(data).absolute() == Path(self.data_source).absolute()


@dataclass(frozen=True, kw_only=True)
class History:
    """What a store knows of past runs."""

    records: tuple[RunRecord, ...]
    passed_over: int = 0
    """Finished runs that lack a figure: from before it was logged, or ended without a step."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What runs say about one predicted quantity."""

    quantity: Quantity
    factor: Interval
    """Times the prediction: where the next run will lie, with the prediction's usual interval before any run."""
    runs: int
    reason: str
    """Whose runs, and the factor: `3 runs on cpu in fp32: throughput 0.62 x the catalogue's (0.55 to 0.70)`."""
    pooled: Pooled | None = None
    """What the runs say apart from the prior; None without runs."""


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A figure before and after a correction."""

    figure: str
    """Its name in the answer, such as `hours`."""
    before: Interval
    after: Interval
    correction: Correction


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """The runs, to be asked about one device or dataset at a time."""

    records: tuple[RunRecord, ...]

    def throughput(
        self, device_name: str, precision: str, *, parameters: float | None = None, devices: int | None = None
    ) -> Correction:
        """Tokens per second on a device of the catalogue, over the predicted; runs of that precision only.

        Give `parameters` and `devices` of the training asked about, so that runs of other sizes count for less.
        Raises SpecError for a device that the catalogue does not know.
        """
        achieved = find_device(device_name).achieved_fraction
        prior_sd = math.log(achieved.high / achieved.low) / (2 * Z90)
        runs = [run for run in self.records if run.device_name == device_name and run.precision == precision]
        measured = [
            Measurement(
                log_ratio=math.log(run.measured_tokens_per_second / run.predicted_tokens_per_second),
                weight=min(1.0, run.measured_steps / FEW_STEPS),
                drift=math.hypot(
                    _SIZE_DRIFT * _log_distance(run.parameters, parameters),
                    _DEVICES_DRIFT * _log_distance(run.workers, devices),
                ),
            )
            for run in runs
        ]
        where = f"on {device_name} in {precision}"
        return _correction("throughput", measured, prior_sd=prior_sd, where=where, than="the catalogue's")

    def memory(self, device_name: str, *, peak_gib: float | None = None) -> Correction:
        """Peak memory of one device (on a CPU: one worker process), over the planned.

        Give `peak_gib`, the peak predicted for the training asked about, so that runs of other sizes count for less.
        """
        measured = [
            Measurement(
                log_ratio=math.log(run.measured_peak_gib / run.predicted_peak_gib),
                drift=_PEAK_DRIFT * _log_distance(run.predicted_peak_gib, peak_gib),
            )
            for run in self.records
            if run.device_name == device_name
        ]
        where = f"on {device_name}"
        return _correction("memory", measured, prior_sd=_MEMORY_PRIOR, where=where, than="the planned")

    def loss(
        self, data: str, task: str, *, predicted: Callable[[RunRecord], float | None], prior_sd: float
    ) -> Correction:
        """Held-out loss on a dataset (location or fingerprint), over what `predicted` says of each run.

        `predicted` gives the loss that the laws expect of a run, None where they know nothing; `prior_sd` is the
        standard deviation of the log of their common error on a dataset.
        """
        return self._quality("loss", data, task, predicted, prior_sd)

    def error(
        self, data: str, task: str, *, predicted: Callable[[RunRecord], float | None], prior_sd: float
    ) -> Correction:
        """Held-out error rate, 1 - accuracy, on a dataset; otherwise as `loss`."""
        return self._quality("error", data, task, predicted, prior_sd)

    def runs_on(self, data: str, task: str) -> tuple[RunRecord, ...]:
        """The runs of a task that were trained on a dataset (location or fingerprint)."""
        return tuple(run for run in self.records if run.task == task and run.trained_on(data))

    def _quality(
        self,
        quantity: Literal["loss", "error"],
        data: str,
        task: str,
        predicted: Callable[[RunRecord], float | None],
        prior_sd: float,
    ) -> Correction:
        pairs = [(_reached(run, quantity), predicted(run)) for run in self.runs_on(data, task)]
        measured = [
            Measurement(log_ratio=math.log(reached / expected)) for reached, expected in pairs if reached and expected
        ]
        return _correction(quantity, measured, prior_sd=prior_sd, where=f"on {data}", than="the expected")


def corrections(records: Iterable[RunRecord]) -> Corrections:
    """What the runs of a store say; none are needed."""
    return Corrections(records=tuple(records))


def corrected(figure: str, before: Interval, correction: Correction) -> Corrected:
    """A predicted figure, updated by what runs say: precision-weighted with the figure's own interval as the prior.

    Throughput corrects hours and money, the other way round; all else is multiplied. The ends keep their lopsidedness.
    The interval is where the next run will lie, so it is never narrower than runs differ among themselves. Figures are
    above zero; one whose interval has no width is known and stays.
    """
    assert before.low > 0, "a quantity in logarithms is positive"
    sd = math.log(before.high / before.low) / (2 * Z90)
    if correction.pooled is None or sd == 0:
        return Corrected(figure=figure, before=before, after=before, correction=correction)
    shift, after_sd = _posterior(correction.pooled, sd)
    mid = before.mid * math.exp(-shift if correction.quantity == "throughput" else shift)
    ratio = after_sd / sd
    after = Interval(
        low=mid * (before.low / before.mid) ** ratio, mid=mid, high=mid * (before.high / before.mid) ** ratio
    )
    return Corrected(figure=figure, before=before, after=after, correction=correction)


def what_changed(changes: Iterable[Corrected]) -> tuple[str, ...]:
    """One sentence for each correction that rests on runs, with all figures that it moved."""
    figures: dict[str, list[str]] = {}
    for change in changes:
        if change.correction.runs:
            moved = f"{change.figure} {change.before.mid:.2g} -> {change.after.mid:.2g}"
            figures.setdefault(change.correction.reason, []).append(moved)
    return tuple(f"{reason}; {', '.join(dict.fromkeys(moved))}" for reason, moved in figures.items())


def _correction(
    quantity: Quantity, measured: Sequence[Measurement], *, prior_sd: float, where: str, than: str
) -> Correction:
    if not measured:
        ends = math.exp(Z90 * prior_sd)
        factor = Interval(low=1 / ends, mid=1.0, high=ends)
        return Correction(quantity=quantity, factor=factor, runs=0, reason=f"no run {where}: {quantity} as predicted")
    pooled = pool(measured, prior_sd=prior_sd, usual_spread=_SPREAD[quantity])
    shift, sd = _posterior(pooled, prior_sd)
    factor = Interval(low=math.exp(shift - Z90 * sd), mid=math.exp(shift), high=math.exp(shift + Z90 * sd))
    runs = len(measured)
    reason = (
        f"{runs} run{'s' if runs > 1 else ''} {where}: {quantity} {factor.mid:.2f} x {than} "
        f"({factor.low:.2f} to {factor.high:.2f})"
    )
    return Correction(quantity=quantity, factor=factor, runs=runs, reason=reason, pooled=pooled)


def _posterior(pooled: Pooled, prior_sd: float) -> tuple[float, float]:
    """Mean log ratio, and the standard deviation of where the next run lies about it.

    Normal prior times normal likelihood; the next run's own spread comes on top. That may not make the interval wider
    than the prior's, which holds it already, unless the runs themselves differ by more.
    """
    prior, runs = prior_sd**-2, pooled.variance**-1
    mean = pooled.mean * runs / (prior + runs)
    next_run = 1 / (prior + runs) + pooled.spread**2
    return mean, math.sqrt(min(next_run, max(prior_sd**2, pooled.spread**2)))


def _reached(run: RunRecord, quantity: Literal["loss", "error"]) -> float | None:
    if quantity == "loss":
        return run.eval_loss
    return None if run.eval_accuracy is None else 1 - run.eval_accuracy


def _log_distance(of_run: float, asked: float | None) -> float:
    """How many factors of e lie between a run's size and the one asked about; none when no size was given."""
    return 0.0 if asked is None else abs(math.log(of_run / asked))
