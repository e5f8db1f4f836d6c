"""Which ZeRO stage, offload and micro-batch fit the memory, and what would help when none does.

Comes in: a spec, its `Site` and a way to estimate a layout's memory. Goes out: a `Layout`. Called by `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from orchestrator.errors import SpecError
from orchestrator.planning.hardware import catalogue
from orchestrator.planning.memory import Layout, MemoryEstimate
from orchestrator.planning.placement import USABLE_DEVICE_MEMORY, ChosenPrecision, Site
from orchestrator.planning.run_plan import Interval
from orchestrator.spec import RunSpec

CPU_MICRO_BATCH = 8
CPU_MICRO_BATCH_TOKENS = 4096
"""On a CPU larger micro-batches only spill caches. Both limits are guesses, to be replaced by measurements."""

_SHORTEST_ADVISED = 64
"""Tokens below which a shorter sequence is no advice."""

Offload = Literal["none", "optimizer", "all"]
Estimate = Callable[[Layout], MemoryEstimate]


def choose_layout(
    spec: RunSpec, site: Site, precision: ChosenPrecision, estimate: Estimate
) -> tuple[Layout, tuple[str, ...]]:
    """The least ZeRO stage and offload, and with it the largest micro-batch, whose memory surely fits; and why.

    Surely: the upper end of the interval. When nothing does, it is the layout with the smallest peak.
    """
    training = spec.training
    start = Layout(
        workers=spec.resources.workers,
        device="cuda" if site.gpus_per_worker else "cpu",
        zero_stage=0,
        offload="none",
        precision=precision,
        micro_batch=1 if training.micro_batch == "auto" else training.micro_batch,
        sequence_length=spec.data.sequence_length,
        activation_checkpointing=training.activation_checkpointing,
    )
    layout, why_zero = _choose_zero(spec, site, start, estimate)
    if training.micro_batch == "auto":
        layout, why_micro = _largest_micro_batch(spec, site, layout, estimate)
    else:
        why_micro = "as set"
    passes = training.global_batch // layout.workers // layout.micro_batch
    return layout, (
        f"{why_zero} (at micro_batch {start.micro_batch})",
        f"micro_batch: {layout.micro_batch}, {why_micro}; accumulation: {passes}, so that "
        f"{layout.workers} x {layout.micro_batch} x {passes} = {training.global_batch}",
    )


def _choose_zero(spec: RunSpec, site: Site, start: Layout, estimate: Estimate) -> tuple[Layout, str]:
    def needs(layout: Layout) -> str:
        peak = _gib(estimate(layout).peak_gib)
        return f"zero_stage: {layout.zero_stage}, offload: {layout.offload} needs {peak} of {site.capacity_gib:.3g}"

    options = [replace(start, zero_stage=stage, offload=offload) for stage, offload in _zero_options(spec, site)]
    before: Layout | None = None
    for layout in options:
        if fits(estimate(layout), site, surely=True):
            why = f", the first that surely fits; {needs(before)}" if before else ""
            if layout.workers == 1 and layout.zero_stage == 0:
                why = "; one worker has nothing to shard"
            return layout, needs(layout) + why
        before = layout
    least = min(options, key=lambda one: (estimate(one).host_gib > site.host_gib, estimate(one).peak_gib.mid))
    host = ""
    for layout in (one for one in options if estimate(one).host_gib > site.host_gib):
        needed = estimate(layout).host_gib
        host = f"; offload: {layout.offload} needs {needed:.3g} of {site.host_gib:.3g} GiB of host memory per worker"
    return least, f"{needs(least)}, the least of {len(options)} tried, and none surely fits{host}"


def _largest_micro_batch(spec: RunSpec, site: Site, layout: Layout, estimate: Estimate) -> tuple[Layout, str]:
    share = spec.training.global_batch // layout.workers
    limit = share
    if layout.device == "cpu":
        limit = min(share, CPU_MICRO_BATCH, max(1, CPU_MICRO_BATCH_TOKENS // layout.sequence_length))
    for size in (n for n in range(limit, 0, -1) if share % n == 0):
        larger = replace(layout, micro_batch=size)
        if fits(estimate(larger), site, surely=True):
            cap = f" and is at most {limit}, since on a CPU more only takes memory" if limit < share else ""
            return larger, f"the largest divisor of {share} samples per worker that surely fits{cap}"
    return layout, "the smallest"


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
    if asked.zero_stage == "auto" and spec.resources.workers == 1:
        # Alone there is nothing to shard: stages matter only for what they offload.
        options = [one for one in options if one == (0, "none") or one[1] != "none"]
    return [
        (stage, offload)
        for stage, offload in options
        if asked.zero_stage in ("auto", stage) and asked.offload in ("auto", offload)
    ]


def _gib(interval: Interval) -> str:
    return f"{interval.mid:.3g} ({interval.low:.3g} to {interval.high:.3g}) GiB"


def fits(memory: MemoryEstimate, site: Site, *, surely: bool = False) -> bool:
    """Whether the peak fits: its middle, or `surely` the upper end of its interval."""
    peak = memory.peak_gib.high if surely else memory.peak_gib.mid
    return peak <= site.capacity_gib and memory.host_gib <= site.host_gib


def remedy(spec: RunSpec, site: Site, layout: Layout, estimate: Estimate) -> str:
    """The smallest change that would make a layout fit, as a sentence with the setting to make."""
    for setting, changed in _changes(spec, site, layout):
        if fits(estimate(changed), site):
            return f"it does not fit; smallest change that would: {setting} ({_gib(estimate(changed).peak_gib)})"
    needed = estimate(layout).peak_gib.mid
    larger = [d for d in catalogue().values() if d.kind == "gpu" and d.memory_gib * USABLE_DEVICE_MEMORY >= needed]
    if larger and site.gpus_per_worker:
        least = min(larger, key=lambda d: d.memory_gib)
        return f"it does not fit; no single setting helps, a device with {least.memory_gib:g} GiB ({least.name}) would"
    return (
        "it does not fit, and no single setting helps: use a smaller model, method: lora, or machines with more memory"
    )


def _changes(spec: RunSpec, site: Site, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Settings that need less memory: each alone, the one that costs least first, and then all up to each."""
    singles: list[tuple[str, dict[str, Any]]] = []
    if layout.micro_batch > 1:
        singles.append(("training.micro_batch=1", {"micro_batch": 1}))
    if not layout.activation_checkpointing:
        singles.append(("training.activation_checkpointing=true", {"activation_checkpointing": True}))
    if layout.workers > 1 and layout.zero_stage < 3:
        singles.append(("deepspeed.zero_stage=3", {"zero_stage": 3}))
    if site.gpus_per_worker and layout.offload != "all":
        setting = "deepspeed.zero_stage=3 deepspeed.offload=all"
        singles.append((setting, {"zero_stage": 3, "offload": "all"}))
    # More workers only where each brings a device: on a CPU they share the same memory.
    workers = [layout.workers * factor for factor in (2, 4, 8, 16, 32, 64) if site.gpus_per_worker]
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
