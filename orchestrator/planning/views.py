"""A plan, or an estimate, for a person and for a program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrator.intervals import Interval
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.run_plan import RunPlan
from orchestrator.planning.search_plan import SearchPlan
from orchestrator.planning.stages_plan import StagesPlan
from orchestrator.quantities import human_count, human_duration

_PARTS = (
    "weights_gib",
    "gradients_gib",
    "optimizer_gib",
    "activations_gib",
    "logits_gib",
    "step_gib",
    "gathered_gib",
    "buffers_gib",
    "reserve_gib",
)
"""Of the peak; the optimizer's step and the activations with logits and reserve never meet."""
_SIZES = ("parameters", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab")
_SHOWN = 0.005
"""GiB below which a part is not worth a word."""


def plan_answer(plan: RunPlan) -> dict[str, Any]:
    """The JSON of `plan`: every field of the plan, under names that do not change."""
    return plan.to_dict()


def plan_table(
    plan: RunPlan,
    *,
    data: Sequence[str] = (),
    metrics: Sequence[str] = (),
    search: SearchPlan | None = None,
    whole: bool = True,
) -> Group:
    """Figures first, a search's of all trials before those of its base training; then the sizes of an elastic run, why,
    and of the `whole` the DeepSpeed configuration. `data` says in sentences what the training reads, `metrics` what it
    logs."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    device = "core" if plan.device == "cpu" else plan.device_name
    per_worker = plan.cpus_per_worker if plan.device == "cpu" else plan.gpus_per_worker
    rows = [
        *(("data" if not place else "", sentence) for place, sentence in enumerate(data)),
        *(() if search is None else _search_rows(search)),
        ("fits", "yes" if plan.fits else "no"),
        ("workers", f"{plan.workers}, each with {per_worker} {device}{'s' if per_worker > 1 else ''}"),
        ("parameters", f"{human_count(plan.parameters)}, {human_count(plan.trainable_parameters)} of them trained"),
        ("batch", _batch(plan)),
        ("steps", _steps(plan)),
        ("ZeRO stage", f"{plan.zero_stage}" + (f", offload {plan.offload}" if plan.offload != "none" else "")),
        ("precision", plan.precision + (", activation checkpointing" if plan.activation_checkpointing else "")),
        ("peak memory", _range(plan.peak_gib, "{:.3g} GiB") + (" a device" if plan.device == "cuda" else " a worker")),
        ("wall time", _duration(plan.wall_hours)),
        ("device hours", _range(plan.gpu_hours, "{:.3g}")),
        ("cost", _range(plan.usd, "{:.3g} usd")),
        *((("metrics", ", ".join(metrics)),) if metrics else ()),
    ]
    for label, value in rows:
        table.add_row(label, value)
    reasons = Text("\n".join(f"- {reason}" for reason in plan.reasons))
    deepspeed = (Text("\nDeepSpeed", style="bold"), Text(json.dumps(plan.deepspeed, indent=2)))
    sizes = (Text("\nsizes", style="bold"), _sizes_table(plan)) if plan.sizes else ()
    return Group(table, *sizes, Text("\nwhy", style="bold"), reasons, *(deepspeed if plan.trains and whole else ()))


def _search_rows(search: SearchPlan) -> Iterator[tuple[str, str]]:
    """What all trials take; the rows after them are those of the base training."""
    fits = "" if search.fits else f"; may not fit: {', '.join(search.refused)}"
    yield "search", f"{search.trials} trials, {search.at_a_time} at a time{fits}"
    if search.rungs:
        rungs = ", ".join(map(str, search.rungs))
        yield "rungs", f"after steps {rungs} one in {search.reduction_factor} goes on"
    for label, cost in (("all to their end", search.all_to_their_end), ("if rungs halve", search.halving)):
        if cost is not None:
            usd = "no price is known" if cost.usd is None else _range(cost.usd, "{:.3g} usd")
            hours = f"{_duration(cost.wall_hours)}, {_range(cost.gpu_hours, '{:.3g}')} device hours"
            yield label, f"{cost.steps:,} steps, {hours}, {usd}"
    yield from (("", note) for note in search.notes)
    yield "a training", "as the base of the search:"


def stages_table(
    whole: StagesPlan, *, labels: Sequence[str], tasks: Sequence[str], data: Sequence[Sequence[str]]
) -> Group:
    """All stages together, then each in a line, then of each what it reads and why it is planned so."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    fits = "yes" if whole.fits else f"no: {', '.join(whole.refused)}"
    steps = "known once the data is read" if whole.steps is None else f"{whole.steps:,}"
    for label, value in (
        ("stages", f"{len(labels)}, one after the other"),
        ("fits", fits),
        ("steps", steps),
        ("peak memory", f"{_range(whole.peak_gib, '{:.3g} GiB')}, the largest"),
        ("wall time", _duration(whole.wall_hours)),
        ("device hours", _range(whole.gpu_hours, "{:.3g}")),
        ("cost", _range(whole.usd, "{:.3g} usd")),
        *(("", note) for note in whole.notes),
    ):
        table.add_row(label, value)
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stage", "task", "steps", "workers", "peak memory", "wall time", "device hours", "cost"):
        lines.add_column(heading)
    reasons: list[Text] = []
    for label, task, plan, read in zip(labels, tasks, whole.plans, data, strict=True):
        lines.add_row(
            label,
            task,
            "open" if plan.steps is None else f"{plan.steps:,}",
            *_figures(plan.workers, plan.peak_gib, plan.wall_hours, plan.gpu_hours, plan.usd),
        )
        reasons += [Text(f"\n{label}", style="bold"), Text("\n".join(f"- {one}" for one in (*read, *plan.reasons)))]
    return Group(table, Text(), lines, *reasons)


def _figures(
    workers: int, peak: Interval, wall: Interval | None, device: Interval | None, usd: Interval | None
) -> tuple[str, ...]:
    """Middle estimates as a line of a table shows them."""
    return (
        str(workers),
        f"{peak.mid:.3g} GiB",
        "open" if wall is None else human_duration(3600 * wall.mid),
        "open" if device is None else f"{device.mid:.3g}",
        "open" if usd is None else f"{usd.mid:.3g} usd",
    )


def _sizes_table(plan: RunPlan) -> Table:
    """What the run takes if it keeps one of its sizes to the end."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("workers", "room", "accumulation", "peak memory", "wall time", "device hours", "cost"):
        table.add_column(heading)
    for size in plan.sizes:
        workers, *figures = _figures(size.workers, size.peak_gib, size.wall_hours, size.gpu_hours, size.usd)
        table.add_row(workers, "yes" if size.has_room else "not now", str(size.accumulation), *figures)
    return table


def estimate_answer(found: Estimate) -> dict[str, Any]:
    """The JSON of `estimate`."""
    memory = asdict(found.memory)
    return {
        "gpu_hours": asdict(found.gpu_hours),
        "wall_hours": asdict(found.wall_hours),
        "usd": None if found.usd is None else asdict(found.usd),
        "peak_gib": asdict(found.peak_gib),
        "fits": found.fits,
        "zero_stage": found.zero_stage,
        "offload": found.offload,
        "host_gib": memory["host_gib"],
        "memory": {part.removesuffix("_gib"): memory[part] for part in _PARTS},
        "trainable_parameters": found.trainable,
        "shape": {name: getattr(found.shape, name) for name in _SIZES},
        "reasons": list(found.reasons),
    }


def estimate_table(found: Estimate) -> Group:
    """Figures first, then where the memory goes, then why."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("fits", "yes" if found.fits else "no")
    table.add_row("peak memory", _range(found.peak_gib, "{:.3g} GiB") + " a device")
    parts = [(part, getattr(found.memory, part)) for part in _PARTS]
    table.add_row("of it", ", ".join(f"{part.removesuffix('_gib')} {gib:.3g}" for part, gib in parts if gib >= _SHOWN))
    table.add_row("ZeRO stage", f"{found.zero_stage}" + (f", offload {found.offload}" if found.memory.host_gib else ""))
    table.add_row("wall time", _duration(found.wall_hours))
    table.add_row("device hours", _range(found.gpu_hours, "{:.3g}"))
    table.add_row("cost", "no price is known" if found.usd is None else _range(found.usd, "{:.3g} usd"))
    reasons = Text("\n".join(f"- {reason}" for reason in found.reasons))
    return Group(table, Text("\nwhy", style="bold"), reasons)


def _batch(plan: RunPlan) -> str:
    if not plan.trains:
        return f"{plan.micro_batch} at a time on each worker"
    workers = "1 worker" if plan.workers == 1 else f"{plan.workers} workers"
    return f"{plan.global_batch} = {workers} x {plan.micro_batch} micro-batch x {plan.accumulation}"


def _steps(plan: RunPlan) -> str:
    if plan.steps is None and plan.trains:
        return "known once the data is read"
    if not plan.trains:
        return "none: nothing is trained"
    padded = plan.padded_tokens_per_step
    of = "" if padded == plan.tokens_per_step else f" ({human_count(padded)} with padding)"
    return f"{plan.steps:,}, {plan.warmup_steps:,} of them warm-up, {human_count(plan.tokens_per_step)} tokens each{of}"


_LARGE = 1000  # from here on 66.4k reads better than 6.64e+04


def _range(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "known once the data is read"
    middle, low, high = (
        form.replace("{:.3g}", human_count(value) if value >= _LARGE else f"{value:.3g}")
        for value in (interval.mid, interval.low, interval.high)
    )
    return f"{middle} ({low} to {high})"


def _duration(hours: Interval | None) -> str:
    if hours is None:
        return "known once the data is read"
    middle, low, high = (human_duration(3600 * value) for value in (hours.mid, hours.low, hours.high))
    return f"{middle} ({low} to {high})"
