"""Time and money: model FLOPs of a step, over what devices achieve of their peak.

Comes in: the model's shape, the method and a device of the catalogue. Goes out: FLOPs, and a `RunCost`.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.planning.hardware import Device
from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.run_plan import Interval
from orchestrator.spec import Method, Precision

STARTUP_SECONDS = Interval(low=18.0, mid=35.0, high=52.0)
"""From the entry point to the first step: imports and process start. Measured on a 2-core machine; mid is between."""
RECOMPUTATION = 4 / 3
"""Activation checkpointing does the forward pass twice: 4 units of work instead of 3."""


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a whole training takes."""

    wall_hours: Interval
    gpu_hours: Interval
    """Device hours: wall hours times workers."""
    usd: Interval | None
    """None where no price is known."""


def flops_per_token(shape: ModelShape, *, method: Method, trainable: int, sequence_length: int) -> float:
    """Model FLOPs of training on one token: 2 per weight forward, 2 for activation and 2 for weight gradients.

    Weights that count are those multiplied with every token: no lookup tables, but the output layer also when it
    is tied to one, and no classification head, which sees one position per text. Frozen weights need no weight
    gradient (`lora`: 4), and below a trained head no gradient at all (`head`: 2).
    Attention adds 12 x layers x width x length, half of it where a token sees only those before it (PaLM, app. B).
    """
    weights = shape.parameters - shape.embedding_parameters - shape.head_parameters
    if shape.tied and not shape.head_parameters:
        weights += shape.vocab * shape.hidden
    width = shape.heads * shape.head_dim
    attention = 12 * shape.layers * width * sequence_length * (0.5 if shape.causal else 1.0)
    if method == "head":
        return 2 * weights + attention / 3 + 6 * trainable / sequence_length
    if method == "lora":
        return 4 * weights + attention + 6 * (trainable - shape.head_parameters)
    return 6 * weights + attention


def run_cost(
    flops_per_step: float,
    *,
    steps: int,
    workers: int,
    device: Device,
    precision: Precision,
    cpus_per_worker: int = 1,
    usd_per_device_hour: float | None,
    activation_checkpointing: bool = False,
) -> RunCost:
    """Hours and money of `steps` steps and the start, evaluation not included.

    On a CPU one device is a worker with its `cpus_per_worker` cores.
    """
    cores = cpus_per_worker if device.kind == "cpu" else 1
    peak = workers * cores * device.peak_flops(precision)
    work = flops_per_step * steps * (RECOMPUTATION if activation_checkpointing else 1.0)
    achieved, start = device.achieved_fraction, STARTUP_SECONDS
    wall = Interval(
        low=(start.low + work / (peak * achieved.high)) / 3600,
        mid=(start.mid + work / (peak * achieved.mid)) / 3600,
        high=(start.high + work / (peak * achieved.low)) / 3600,
    )
    device_hours = wall.scaled(workers)
    return RunCost(
        wall_hours=wall,
        gpu_hours=device_hours,
        usd=None if usd_per_device_hour is None else device_hours.scaled(usd_per_device_hour),
    )
