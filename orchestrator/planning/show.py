"""A plan for a person and for a program."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from orchestrator.planning.run_plan import Interval, RunPlan
from orchestrator.quantities import human_count, human_duration


def plan_answer(plan: RunPlan) -> dict[str, Any]:
    """The JSON of `plan`: every field of the plan, under names that do not change."""
    return plan.to_dict()


def plan_table(plan: RunPlan) -> Group:
    """Figures first, then why, then the DeepSpeed configuration."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    device = "core" if plan.device == "cpu" else plan.device_name
    per_worker = plan.cpus_per_worker if plan.device == "cpu" else plan.gpus_per_worker
    rows = [
        ("fits", "yes" if plan.fits else "no"),
        ("workers", f"{plan.workers}, each with {per_worker} {device}{'s' if per_worker > 1 else ''}"),
        ("parameters", f"{human_count(plan.parameters)}, {human_count(plan.trainable_parameters)} of them trained"),
        (
            "batch",
            f"{plan.global_batch} = {plan.workers} workers x {plan.micro_batch} micro-batch x {plan.accumulation}",
        ),
        ("steps", _steps(plan)),
        ("ZeRO stage", f"{plan.zero_stage}" + (f", offload {plan.offload}" if plan.offload != "none" else "")),
        ("precision", plan.precision + (", activation checkpointing" if plan.activation_checkpointing else "")),
        ("peak memory", _range(plan.peak_gib, "{:.3g} GiB") + (" a device" if plan.device == "cuda" else " a worker")),
        ("wall time", _duration(plan.wall_hours)),
        ("device hours", _range(plan.gpu_hours, "{:.3g}")),
        ("cost", _range(plan.usd, "{:.3g} usd")),
    ]
    for label, value in rows:
        table.add_row(label, value)
    reasons = Text("\n".join(f"- {reason}" for reason in plan.reasons))
    deepspeed = Text(json.dumps(plan.deepspeed, indent=2))
    return Group(table, Text("\nwhy", style="bold"), reasons, Text("\nDeepSpeed", style="bold"), deepspeed)


def _steps(plan: RunPlan) -> str:
    if plan.steps is None:
        return "known once the data is read"
    return f"{plan.steps:,}, {plan.warmup_steps:,} of them warm-up, {human_count(plan.tokens_per_step)} tokens each"


def _range(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "known once the data is read"
    return f"{form.format(interval.mid)} ({form.format(interval.low)} to {form.format(interval.high)})"


def _duration(hours: Interval | None) -> str:
    if hours is None:
        return "known once the data is read"
    middle, low, high = (human_duration(3600 * value) for value in (hours.mid, hours.low, hours.high))
    return f"{middle} ({low} to {high})"
