"""What a strategy takes: its trainings as `Work`, priced by the planner's estimates, cut to the budget.

Estimates are linear in tokens (a start, then a rate), so each kind of work is estimated twice and all amounts follow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.architectures.standard_shape import standard_shape
from orchestrator.intervals import Interval
from orchestrator.methods.registry import PRICED
from orchestrator.planning.estimate import Estimate, Workload, estimate, fits_machine, precision_of
from orchestrator.planning.hardware import Device, find_device
from orchestrator.planning.throughput import flops_per_token
from orchestrator.policy.question import Question
from orchestrator.quantities import Budget

if TYPE_CHECKING:
    from orchestrator.policy.corrections import Corrected

_REFERENCE_TOKENS = 1e9
_LONGEST_SAMPLE, _SHORTEST_SAMPLE = 2048, 16
_SMALL_MODEL = 1_000_000_000
_CLUSTER_SIZES = tuple(2**power for power in range(15))
"""Devices to choose from where their number is open; 16,384 trained the largest published model (Llama 3.1, 405B)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training, or one pass of inference (`head` with nothing to learn costs the same)."""

    method: str
    parameters: int
    tokens: float
    """Tokens processed, every epoch counted."""
    sequence_length: int
    """Tokens of a sample, on average and with its padding."""
    longest: int | None = None
    """Of the longest batch, whose memory is needed; None where all are as long."""
    note: str | None = None
    """What else an answer has to say of it."""

    def scaled(self, factor: float) -> Work:
        """The same on `factor` times the tokens."""
        return replace(self, tokens=self.tokens * factor)


@dataclass(frozen=True, kw_only=True)
class Price:
    """What works take together; memory is that of the largest."""

    gpu_hours: Interval
    hours: Interval
    usd: Interval | None
    flops: float
    peak_gib: Interval
    host_gib: float
    """Host memory per device, for what is offloaded."""
    fits: bool
    """Whether the upper end of the peak fits the device, and what is offloaded a usual host."""
    may_fit: bool
    """Whether at least the middle of the peak does."""
    memory_note: str
    gpus: int
    """Devices of the largest work."""
    offload: str

    def in_unit(self, budget: Budget) -> float:
        """The middle estimate in the budget's unit."""
        if budget.unit == "flops":
            return self.flops
        if budget.unit == "usd":
            assert self.usd is not None  # a device without a price is refused before
            return self.usd.mid
        return self.gpu_hours.mid if budget.unit == "gpu-hours" else self.hours.mid


def sample_length(question: Question) -> int:
    """Tokens of one sample in training: an example, or a block of raw text."""
    if not question.labelled:
        return _LONGEST_SAMPLE
    return int(min(_LONGEST_SAMPLE, max(_SHORTEST_SAMPLE, question.tokens_per_example)))


def longest_sample(question: Question) -> int | None:
    """Tokens of the longest batch of measured rows; None where all samples count as long as each other."""
    return None if question.seen is None else max(question.seen.widest, sample_length(question))


def price(works: Iterable[Work], question: Question) -> Price:
    """The works one after the other on the question's devices. Raises what `estimate` raises."""
    parts = [_learned(work, _part(work, question.device, question.gpus), question) for work in works]
    peak = max(parts, key=lambda part: part.peak_gib.mid)
    usd = [part.usd for part in parts if part.usd is not None]
    return Price(
        gpu_hours=_sum(part.gpu_hours for part in parts),
        hours=_sum(part.hours for part in parts),
        usd=_sum(usd) if len(usd) == len(parts) else None,
        flops=sum(part.flops for part in parts),
        peak_gib=peak.peak_gib,
        host_gib=peak.host_gib,
        fits=all(part.fits for part in parts),
        may_fit=all(part.may_fit for part in parts),
        memory_note=peak.memory_note,
        gpus=max(part.gpus for part in parts),
        offload=peak.offload,
    )


def affordable_share(works: tuple[Work, ...], question: Question) -> float:
    """The part of the works' tokens, 0 to 1, that the middle estimate leaves inside the budget."""
    if question.budget is None:
        return 1.0
    whole = price(works, question).in_unit(question.budget)
    if whole <= question.budget.amount:
        return 1.0
    start = price([work.scaled(0) for work in works], question).in_unit(question.budget)
    if not whole > start:  # so few tokens that the start is all of it
        return 0.0
    return max(0.0, (question.budget.amount - start) / (whole - start))


def flops_per_token_of(method: str, parameters: int, sequence_length: int) -> float:
    """Model FLOPs per token processed, attention included."""
    shape = standard_shape(parameters)
    trained = parameters if PRICED[method].cost.trains_all else 0
    return flops_per_token(shape, method=PRICED[method].cost, trainable=trained, sequence_length=sequence_length)


def _part(work: Work, device: Device, gpus: int | None) -> Price:
    lengths = work.sequence_length, work.longest or work.sequence_length
    rates = _rates(work.method, work.parameters, lengths, device.name, gpus)
    start, reference, longest = rates.start, rates.reference, rates.longest
    share = work.tokens / _REFERENCE_TOKENS

    def between(low: Interval, high: Interval) -> Interval:
        return Interval(
            low=low.low + share * (high.low - low.low),
            mid=low.mid + share * (high.mid - low.mid),
            high=low.high + share * (high.high - low.high),
        )

    priced = start.usd is not None and reference.usd is not None
    return Price(
        gpu_hours=between(start.gpu_hours, reference.gpu_hours),
        hours=between(start.wall_hours, reference.wall_hours),
        usd=between(start.usd, reference.usd) if priced else None,  # type: ignore[arg-type]
        flops=rates.flops_per_token * work.tokens,
        peak_gib=longest.peak_gib,
        host_gib=longest.memory.host_gib,
        fits=_fits(longest, device),
        may_fit=_may_fit(longest.peak_gib, longest.memory.host_gib, device),
        memory_note=longest.reasons[-1] if longest.reasons else "",
        gpus=rates.layout.gpus,
        offload=longest.offload,
    )


def _learned(work: Work, part: Price, question: Question) -> Price:
    """The price as past runs on such devices correct it."""
    changes = {change.figure: change.after for change in changes_of_price(work, part, question)}
    if not changes:
        return part
    peak = changes["peak GiB"]
    return replace(
        part,
        gpu_hours=changes["device hours"],
        hours=changes["hours"],
        usd=changes.get("usd"),
        peak_gib=peak,
        fits=fits_machine(peak, part.host_gib, question.device) or (part.fits and question.device.kind == "cpu"),
        may_fit=_may_fit(peak, part.host_gib, question.device),
    )


def _fits(found: Estimate, device: Device) -> bool:
    return fits_machine(found.peak_gib, found.memory.host_gib, device)


def _may_fit(peak: Interval, host_gib: float, device: Device) -> bool:
    return fits_machine(replace(peak, high=peak.mid), host_gib, device)


def changes_of_price(work: Work, part: Price, question: Question) -> tuple[Corrected, ...]:
    """What past runs change about a work's figures; nothing without a history, or for no work."""
    if question.learned is None or not part.hours.low > 0:
        return ()
    from orchestrator.policy.corrections import corrected

    known = question.learned.corrections
    precision = precision_of(replace(_workload(work, question.device), gpus=part.gpus))
    pace = known.throughput(question.device.name, precision, parameters=work.parameters, devices=part.gpus)
    memory = known.memory(question.device.name, peak_gib=part.peak_gib.mid)
    figures = [("device hours", part.gpu_hours, pace), ("hours", part.hours, pace), ("peak GiB", part.peak_gib, memory)]
    if part.usd is not None and part.usd.low > 0:
        figures.append(("usd", part.usd, pace))
    return tuple(corrected(*figure) for figure in figures)


def _workload(work: Work, device: Device) -> Workload:
    small = work.parameters < _SMALL_MODEL
    return Workload(
        parameters=work.parameters,
        tokens=_REFERENCE_TOKENS,
        device=device,
        method=work.method,
        sequence_length=work.sequence_length,
        micro_batch=8 if small else 1,
        activation_checkpointing=not small and PRICED[work.method].cost.passes_back,
    )


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """Estimates of one kind of work in the first layout that fits; where none does, in the one that was asked for, or
    on the largest cluster where the number of devices is open."""

    start: Estimate
    """Of nothing."""
    reference: Estimate
    """Of 1e9 tokens."""
    longest: Estimate
    """Of as many in batches that are all as long as the longest: for memory."""
    flops_per_token: float
    layout: Workload


@functools.cache
def _rates(method: str, parameters: int, lengths: tuple[int, int], device_name: str, gpus: int | None) -> _Rates:
    """The rates of a work whose batches have so many tokens a sample, (on average, at most)."""
    work = Work(method=method, parameters=parameters, tokens=_REFERENCE_TOKENS, sequence_length=lengths[1])
    workload = _workload(work, find_device(device_name))
    for layout in _layouts(workload, gpus):
        longest = estimate(layout)
        if _fits(longest, layout.device):
            break
    else:
        if gpus is not None:
            layout = replace(workload, gpus=gpus)
            longest = estimate(layout)
    usual = replace(layout, sequence_length=lengths[0])
    return _Rates(
        start=estimate(replace(usual, tokens=1.0)),
        reference=longest if lengths[0] == lengths[1] else estimate(usual),
        longest=longest,
        flops_per_token=flops_per_token_of(method, parameters, lengths[0]),
        layout=layout,
    )


def _layouts(workload: Workload, gpus: int | None) -> Iterator[Workload]:
    """Ways to make room, the cheapest first: a small micro-batch, checkpointing, then more devices where their number
    is open, else offloading to the host."""
    if gpus is None:
        # Estimates are the slow part, and 16-bit weights alone rule most counts out.
        least = 2 * workload.parameters / (workload.device.memory_gib * 2**30) if workload.device.memory_gib else 1
        for count in _CLUSTER_SIZES:
            if count >= least or count == _CLUSTER_SIZES[-1]:
                yield from _on(count, workload)
        return
    yield from _on(gpus, workload)
    if workload.device.kind == "gpu" and PRICED[workload.method].cost.trains_all:
        *_, frugal = _on(gpus, workload)
        yield replace(frugal, zero_stage=2, offload="optimizer")
        yield replace(frugal, zero_stage=3, offload="optimizer")
        yield replace(frugal, zero_stage=3, offload="all")


def _on(gpus: int, workload: Workload) -> Iterator[Workload]:
    """On so many devices, as it is and then with less and less activations."""
    given = replace(workload, gpus=gpus)
    yield given
    if given.micro_batch > 1:
        yield replace(given, micro_batch=1)
    if not given.activation_checkpointing and PRICED[given.method].cost.passes_back:
        yield replace(given, micro_batch=1, activation_checkpointing=True)


def _sum(parts: Iterable[Interval]) -> Interval:
    """Ends added: the parts share the device, so their errors go together."""
    listed = list(parts)
    return Interval(
        low=sum(part.low for part in listed),
        mid=sum(part.mid for part in listed),
        high=sum(part.high for part in listed),
    )
