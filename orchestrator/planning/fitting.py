"""Which ZeRO stage, offload, checkpointing and micro-batch: the fastest that surely fit; what helps when none does.

Comes in: a spec, its `Site`, and ways to estimate a layout's memory and time. Goes out: a `Layout`. Called by `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import SpecError
from orchestrator.intervals import Interval
from orchestrator.methods.registry import method_of
from orchestrator.planning.hardware import catalogue
from orchestrator.planning.memory import Layout, MemoryEstimate
from orchestrator.planning.placement import USABLE_DEVICE_MEMORY, ChosenPrecision, Site
from orchestrator.quantities import divisors

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec

CPU_MICRO_BATCH = 8
CPU_MICRO_BATCH_TOKENS = 4096
"""On a CPU larger micro-batches only spill caches. Both limits are guesses, to be replaced by measurements."""
SAME_TIME = 1.01
"""Layouts whose hours differ less than this are equally fast; the simpler one is taken."""

_SHORTEST_ADVISED = 64
"""Tokens below which a shorter sequence is no advice."""

Offload = Literal["none", "optimizer", "all"]
Estimate = Callable[[Layout], MemoryEstimate]
Pace = Callable[[Layout], float]
"""Hours that a training takes in a layout."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A layout that surely fits, with its largest micro-batch, and the hours of the training."""

    layout: Layout
    hours: float


def choose_layout(
    spec: RunSpec, site: Site, precision: ChosenPrecision, *, estimate: Estimate, pace: Pace
) -> tuple[Layout, tuple[str, ...]]:
    """The fastest layout whose memory surely fits, the simplest of equally fast ones; and why.

    Surely: the upper end of the interval. When nothing does, it is the layout with the smallest peak. Since the
    number of workers is settled before, the fastest is also the cheapest.
    """
    options = layout_options(spec, site, precision)
    largest = [(one, largest_micro_batch(spec, site, one, estimate)) for one in options]
    fitting = [_Candidate(layout=fit, hours=pace(fit)) for _, fit in largest if fit is not None]
    if fitting:
        least = min(candidate.hours for candidate in fitting)
        chosen = next(one for one in fitting if one.hours <= SAME_TIME * least)
        rejected = [one for one, fit in largest if fit is None]
        layout, why = chosen.layout, _why_chosen(chosen, fitting, rejected, site, estimate)
    else:
        layout, why = least_memory(options, site, estimate)
    recomputing = (why_checkpointing(spec, site, layout, estimate),) if method_of(spec.method).trains else ()
    return layout, (why, *recomputing, _why_micro_batch(spec, layout, bool(fitting)))


def layout_options(spec: RunSpec, site: Site, precision: ChosenPrecision) -> list[Layout]:
    """Every layout to try, with the micro-batch of the spec or of one sample, the simplest first."""
    training = spec.training
    start = Layout(
        workers=site.workers,
        device="cuda" if site.gpus_per_worker else "cpu",
        zero_stage=0,
        offload="none",
        precision=precision,
        micro_batch=1 if training.micro_batch == "auto" else training.micro_batch,
        sequence_length=spec.data.sequence_length,
        activation_checkpointing=False,
    )
    return [
        replace(start, zero_stage=stage, offload=offload, activation_checkpointing=recompute)
        for recompute in _checkpointing(training.activation_checkpointing)
        if not recompute or method_of(spec.method).recomputes
        for stage, offload in _zero_options(spec, site)
    ]


def _checkpointing(asked: bool | str) -> tuple[bool, ...]:
    """Whether to recompute activations: both are tried for `auto`, keeping them first."""
    return (False, True) if asked == "auto" else (bool(asked),)


def largest_micro_batch(spec: RunSpec, site: Site, option: Layout, estimate: Estimate) -> Layout | None:
    """The option with the largest micro-batch that surely fits, the one of the spec where it is set; or None."""
    share = spec.training.global_batch // option.workers
    sizes = [option.micro_batch]
    if spec.training.micro_batch == "auto":
        sizes = divisors(share, most=micro_batch_limit(option, share))[::-1]
    layouts = (replace(option, micro_batch=size) for size in sizes)
    return next((layout for layout in layouts if fits(estimate(layout), site)), None)


def micro_batch_limit(layout: Layout, share: int) -> int:
    """The largest micro-batch that is worth trying, given the samples of a worker and step."""
    if layout.device == "cuda":
        return share
    return min(share, CPU_MICRO_BATCH, max(1, CPU_MICRO_BATCH_TOKENS // layout.sequence_length))


def least_memory(options: list[Layout], site: Site, estimate: Estimate) -> tuple[Layout, str]:
    """The option with the smallest peak, for when nothing surely fits; and why."""
    least = min(options, key=lambda one: (estimate(one).host_gib > site.host_gib, estimate(one).peak_gib.mid))
    host = ""
    for layout in (one for one in options if estimate(one).host_gib > site.host_gib):
        needed = estimate(layout).host_gib
        host = f"; offload: {layout.offload} needs {needed:.3g} of {site.host_gib:.3g} GiB of host memory per worker"
    return least, f"{needs(least, site, estimate)}, the least of {len(options)} tried, and none surely fits{host}"


# -- why -------------------------------------------------------------------------------------------------------------


def _why_chosen(
    chosen: _Candidate, fitting: list[_Candidate], rejected: list[Layout], site: Site, estimate: Estimate
) -> str:
    layout = chosen.layout
    why = needs(layout, site, estimate)
    if layout.workers == 1 and layout.zero_stage == 0:
        why += "; one worker has nothing to shard"
    elif len(fitting) > 1:
        why += f", the simplest of the fastest among {len(fitting)} that surely fit"
    if rejected:
        # Of what does not fit, the one that is closest to what was chosen.
        before = [one for one in rejected if one.activation_checkpointing <= layout.activation_checkpointing]
        why += (
            f"; {needs((before or rejected)[-1], site, estimate)}, too much at micro_batch {rejected[-1].micro_batch}"
        )
    others = [one for one in fitting if one is not chosen]
    if others:
        after = min(others, key=lambda one: one.hours)
        more = 100 * (after.hours / chosen.hours - 1)
        time = f"{more:.0f} % slower" if more >= 1 else "as fast"
        why += f"; next would be {layout_name(after.layout)}, {time}"
    return why


def why_checkpointing(spec: RunSpec, site: Site, layout: Layout, estimate: Estimate) -> str:
    """Why activations are recomputed or not."""
    if spec.training.activation_checkpointing in (True, False):
        return f"activation_checkpointing: {str(layout.activation_checkpointing).lower()}, as set"
    if not layout.activation_checkpointing:
        return "activation_checkpointing: false, since memory suffices without and it costs a third more time"
    kept = estimate(replace(layout, activation_checkpointing=False)).peak_gib
    return f"activation_checkpointing: true; without it the same layout needs {_gib(kept)} of {site.capacity_gib:.3g}"


def _why_micro_batch(spec: RunSpec, layout: Layout, fit: bool) -> str:
    batch = spec.training.global_batch
    share = batch // layout.workers
    limit = micro_batch_limit(layout, share)
    if spec.training.micro_batch != "auto":
        why = "as set"
    elif not fit:
        why = "the smallest"
    else:
        cap = f" and is at most {limit}, since on a CPU more only takes memory" if limit < share else ""
        why = f"the largest divisor of {share} samples per worker that surely fits{cap}"
    if not method_of(spec.method).trains:
        return f"micro_batch: {layout.micro_batch} rows at a time, {why}"
    passes = share // layout.micro_batch
    return (
        f"micro_batch: {layout.micro_batch}, {why}; accumulation: {passes}, so that "
        f"{layout.workers} x {layout.micro_batch} x {passes} = {batch}"
    )


def layout_name(layout: Layout) -> str:
    """A layout by its stage, offload and recomputation."""
    recompute = " with activation checkpointing" if layout.activation_checkpointing else ""
    return f"zero_stage: {layout.zero_stage}, offload: {layout.offload}{recompute}"


def needs(layout: Layout, site: Site, estimate: Estimate) -> str:
    """A layout by name, with its peak and what there is for it."""
    return f"{layout_name(layout)} needs {_gib(estimate(layout).peak_gib)} of {site.capacity_gib:.3g}"


def _gib(interval: Interval) -> str:
    return f"{interval.mid:.3g} ({interval.low:.3g} to {interval.high:.3g}) GiB"


# -- what there is to try --------------------------------------------------------------------------------------------


def _zero_options(spec: RunSpec, site: Site) -> list[tuple[int, Offload]]:
    """ZeRO stage and offload to try, from least to most communication."""
    asked = spec.deepspeed
    if site.device.kind == "cpu" and asked.offload in ("optimizer", "all"):
        raise SpecError(
            "on a CPU there is no device memory to offload from",
            got=f"deepspeed.offload: {asked.offload}",
            do="set deepspeed.offload=none",
        )
    options: list[tuple[int, Offload]] = [(0, "none"), (1, "none"), (2, "none"), (3, "none")]
    if site.device.kind != "cpu":
        options += [(2, "optimizer"), (3, "optimizer"), (3, "all")]
        if asked.zero_stage == 1:  # stage 2 is no slower under offload, so nobody else is given stage 1
            options.append((1, "optimizer"))
    if asked.zero_stage == "auto" and site.workers == 1:
        # Alone there is nothing to shard: stages matter only for what they offload.
        options = [one for one in options if one == (0, "none") or one[1] != "none"]
    return [
        (stage, offload)
        for stage, offload in options
        if asked.zero_stage in ("auto", stage)
        and asked.offload in ("auto", offload)
        and stage <= method_of(spec.method).largest_zero_stage(spec)
    ]


def fits(memory: MemoryEstimate, site: Site) -> bool:
    """Whether the peak surely fits, which is to say the upper end of its interval."""
    return memory.peak_gib.high <= site.capacity_gib and memory.host_gib <= site.host_gib


def remedy(spec: RunSpec, site: Site, layout: Layout, estimate: Estimate) -> str:
    """The smallest change that would make a layout surely fit, as a sentence with the setting to make."""
    for setting, changed in _changes(spec, site, layout):
        if fits(estimate(changed), site):
            return f"it does not surely fit; smallest change that would: {setting} ({_gib(estimate(changed).peak_gib)})"
    needed = estimate(layout).peak_gib.high
    larger = [d for d in catalogue().values() if d.kind == "gpu" and d.memory_gib * USABLE_DEVICE_MEMORY >= needed]
    if larger and site.gpus_per_worker:
        least = min(larger, key=lambda d: d.memory_gib)
        device = f"a device with {least.memory_gib:g} GiB ({least.name})"
        return f"it does not surely fit; no single setting helps, {device} would"
    return (
        "it does not surely fit, and no single setting helps: use a smaller model, method: lora, or machines with more "
        "memory"
    )


def _changes(spec: RunSpec, site: Site, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Settings that need less memory: each alone, the one that costs least first, and then all up to each."""
    singles: list[tuple[str, dict[str, Any]]] = []
    method = method_of(spec.method)
    shards = method.largest_zero_stage(spec) == 3
    if layout.micro_batch > 1:
        singles.append(("training.micro_batch=1", {"micro_batch": 1}))
    if not layout.activation_checkpointing and method.recomputes:
        singles.append(("training.activation_checkpointing=true", {"activation_checkpointing": True}))
    if layout.workers > 1 and layout.zero_stage < 3 and shards:
        singles.append(("deepspeed.zero_stage=3", {"zero_stage": 3}))
    if site.gpus_per_worker and layout.offload != "all" and shards:
        setting = "deepspeed.zero_stage=3 deepspeed.offload=all"
        singles.append((setting, {"zero_stage": 3, "offload": "all"}))
    # More workers only where each brings a device: on a CPU they share the same memory.
    workers = [layout.workers * factor for factor in (2, 4, 8, 16, 32, 64) if site.gpus_per_worker and shards]
    for count in (n for n in workers if spec.training.global_batch % (n * layout.micro_batch) == 0):
        setting = f"resources.workers={count} deepspeed.zero_stage=3"
        singles.append((setting, {"workers": count, "zero_stage": 3}))
    for length in (layout.sequence_length // divisor for divisor in (2, 4, 8, 16)):
        if length >= _SHORTEST_ADVISED:
            singles.append((f"data.sequence_length={length}", {"sequence_length": length}))
    for setting, change in singles:
        yield setting, replace(layout, **change)
    together: dict[str, str] = {}
    for setting, change in singles:
        together |= dict(part.split("=", 1) for part in setting.split())
        layout = replace(layout, **change)
        yield " ".join(f"{key}={value}" for key, value in together.items()), layout
