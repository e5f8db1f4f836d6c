"""Time and money: model FLOPs of a training, over what its devices achieve of their peak.

Comes in: the model's shape, the method and a device of the catalogue. Goes out: FLOPs, and a `RunCost` with the reasons
for its speed. How much of the peak is achieved is `utilization`'s; what devices send each other, `communication`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.architectures.families import ModelShape
from orchestrator.intervals import Interval
from orchestrator.methods.base import ALL_WEIGHTS, MethodCost
from orchestrator.planning.communication import Step, nodes_of, slowdown
from orchestrator.planning.hardware import Device
from orchestrator.planning.utilization import without_tensor_cores

if TYPE_CHECKING:
    from orchestrator.spec import Precision

STARTUP_SECONDS = Interval(low=18.0, mid=25.0, high=52.0)
"""From asking for the workers to the end of their first step, which every start costs: processes, imports, the model.
Two workers on two cores took 18 s on a quiet machine (`make chaos`: killed worker to first new step), 31 s at a load
of 8 (measured); 52 s were seen. The driver's own start, some 15 s more, and the preparing of data hold no devices."""
RECOMPUTATION = 4 / 3
"""Activation checkpointing does the forward pass twice: 4 units of work instead of 3."""
DEQUANTISATION = 1.4
"""QLoRA's time over LoRA's: 1.13 with 8192 tokens a micro-batch (fsdp_qlora, 7B on two RTX 3090: 998 s sharded, 881 s
for LoRA with a whole copy each) to 2.0 with about 1000 (litgpt's resource tables, from memory): weights are unpacked
in every pass, however few the tokens."""
LARGEST_USUAL_BATCH = 4.19e6
"""Tokens: LLaMA and Llama 2 (all sizes), BLOOM-176B and StarCoder used 4M; GPT-3 3.2M; OPT-175B 2M."""
SMALLEST_USUAL_BATCH = 0.5e6
"""Tokens: GPT-3 125M to 760M, GPT-2."""
SHORTEST_DEVICE_STEP = 2048
"""Tokens: a device gets at least one sequence in a step."""


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a whole training takes, and why."""

    wall_hours: Interval
    gpu_hours: Interval
    """Device hours: wall hours times workers."""
    usd: Interval | None
    """None where no price is known."""
    achieved_fraction: Interval
    """Model FLOP/s over the peak, from the first step to the last, without recomputation."""
    benchmark_fraction: float | None
    """What benchmarks of such a model reach on the device; None where none are published."""
    goodput: float | None
    """What restarts, evaluation, checkpoints and idle devices leave of the benchmark's speed."""
    reasons: tuple[str, ...]
    """A sentence each on the fraction of the peak, and on communication and offload where they cost time."""


def flops_per_token(shape: ModelShape, *, method: MethodCost, trainable: int, sequence_length: int) -> float:
    """Model FLOPs of training on one token: 2 per weight forward, 2 for activation and 2 for weight gradients.

    Weights that count are those multiplied with every token: no lookup tables, but the output layer also when it
    is tied to one, and no classification head, which sees one position per text. A masked language model's output
    layer and the dense layer before it count in full: Hugging Face's heads compute every position, predicted or not.
    Frozen weights need no weight gradient (`lora` and its like: 4), and below a trained head or layer no gradient at
    all (`head`: 2).
    Attention adds 12 x layers x width x length, half of it where a token sees only those before it (PaLM, app. B).
    """
    weights = shape.parameters + shape.used_again - shape.embedding_parameters - shape.head_parameters
    if shape.tied and not shape.head_parameters:
        weights += shape.vocab * shape.hidden
    width = shape.heads * shape.head_dim
    attention = 12 * shape.layers * width * sequence_length * (0.5 if shape.causal else 1.0)
    if method.trains_layers and not method.trains_all:
        return (2 + 4 * method.backward_share) * weights + attention * (1 + 2 * method.backward_share) / 3
    if not method.passes_back:
        return 2 * weights + attention / 3 + 6 * trainable / sequence_length
    if not method.trains_all:
        return 4 * weights + attention + 6 * (trainable - shape.head_parameters)
    return 6 * weights + attention


def usual_batch_tokens(parameters: float) -> float:
    """Tokens of an optimizer step in published pretraining of such a size: 0.5M up to 140M parameters, 4M from 10B."""
    return max(SMALLEST_USUAL_BATCH, LARGEST_USUAL_BATCH * math.sqrt(min(1.0, parameters / 1e10)))


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeed:
    """How fast past runs were."""

    factor: Interval
    """Times the speed that the catalogue expects: where the next run will lie."""
    reason: str
    """Whose runs, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class PricedRun:
    """A training to be priced."""

    flops_per_step: float
    """Model FLOPs."""
    steps: int
    flops_once: float = 0.0
    """Before the first step."""
    workers: int
    device: Device
    precision: Precision
    cpus_per_worker: int = 1
    """On a CPU one device is a worker with so many cores."""
    usd_per_device_hour: float | None
    activation_checkpointing: bool = False
    method: MethodCost = ALL_WEIGHTS
    parameters: float | None = None
    """All weights; turns on the effect of model size, and with it those of `zero_stage` and `offload`."""
    trainable: float | None = None
    """Weights with gradients; None is all."""
    zero_stage: int | None = None
    """None takes the fraction of the peak of published trainings, which mix data, tensor and pipeline parallelism so
    that the network keeps up; give it where it is really chosen."""
    offload: str = "none"
    nodes: int | None = None
    """None is as few machines of 8 devices as hold the workers."""
    tokens_per_device_step: float | None = None
    """None is a usual batch over the workers."""
    accumulation: int = 1
    """Micro-batches that a step comes in."""
    network_gb_s: float | None = None
    """GB/s from one device to other nodes; None is the catalogue's."""
    measured: MeasuredSpeed | None = None
    """What past runs say of the device's speed; None takes the catalogue's."""


def run_cost(run: PricedRun) -> RunCost:
    """Hours and money of a training's steps and its start."""
    cores = run.cpus_per_worker if run.device.kind == "cpu" else 1
    speed = cores * run.device.peak_flops(run.precision)
    work = (run.flops_once + run.flops_per_step * run.steps) * (DEQUANTISATION if run.method.is_quantised else 1.0)
    fraction, goodput, reasons = _fraction(
        run.device, run.precision, work / cores, workers=run.workers, parameters=run.parameters
    )
    if run.measured is not None:
        fraction *= run.measured.factor.mid
        reasons += (f"history: {run.measured.reason}",)
    repeated, slower = RECOMPUTATION if run.activation_checkpointing else 1.0, 1.0
    if run.parameters is not None:
        usual = max(usual_batch_tokens(run.parameters) / run.workers, SHORTEST_DEVICE_STEP)
        step = Step(
            parameters=run.parameters,
            trainable=run.parameters if run.trainable is None else run.trainable,
            workers=run.workers,
            nodes=run.nodes or nodes_of(run.workers),
            zero_stage=run.zero_stage,
            offload=run.offload,
            tokens_per_device=run.tokens_per_device_step or usual,
            accumulation=run.accumulation,
            method=run.method,
            element_bytes=4 if run.precision == "fp32" else 2,
            network_gb_s=run.network_gb_s,
        )
        slower, why = slowdown(step, run.device, flops_per_second=speed * fraction / repeated)
        reasons += why
    reached = run.device.utilization.interval(fraction)
    if run.measured is not None:
        reached = run.measured.factor.scaled(fraction / run.measured.factor.mid)
    wall = _wall_hours(work * repeated * slower / (run.workers * speed), reached)
    device_hours = wall.scaled(run.workers)
    return RunCost(
        wall_hours=wall,
        gpu_hours=device_hours,
        usd=None if run.usd_per_device_hour is None else device_hours.scaled(run.usd_per_device_hour),
        achieved_fraction=reached.scaled(1 / slower),
        benchmark_fraction=run.device.utilization.benchmark_at(run.parameters),
        goodput=goodput,
        reasons=reasons,
    )


def _wall_hours(seconds_at_peak: float, fraction: Interval) -> Interval:
    """Hours from asking for the workers to the last step."""
    return Interval(
        low=(STARTUP_SECONDS.low + seconds_at_peak / fraction.high) / 3600,
        mid=(STARTUP_SECONDS.mid + seconds_at_peak / fraction.mid) / 3600,
        high=(STARTUP_SECONDS.high + seconds_at_peak / fraction.low) / 3600,
    )


def _fraction(
    device: Device, precision: Precision, flops: float, *, workers: int, parameters: float | None
) -> tuple[float, float | None, tuple[str, ...]]:
    """Fraction of the peak, its share of what benchmarks reach, and a sentence on both; `flops` is the whole work."""
    facts = device.utilization
    benchmark = facts.benchmark_at(parameters)
    tokens = None if parameters is None else flops / (6 * parameters)  # near enough: its exponent is about 0.1
    device_hours = flops / (device.peak_flops(precision) * facts.whole_run(parameters, tokens)) / 3600
    fraction = facts.achieved(parameters=parameters, tokens=tokens, devices=workers, device_hours=device_hours)
    origin = f"from {facts.runs} published trainings" if facts.runs else "from few published trainings"
    why = f"speed: {100 * fraction:.3g} % of the peak of the {device.name}, {origin}"
    goodput = None if benchmark is None else min(1.0, fraction / benchmark)
    if benchmark is not None and goodput is not None:
        why += (
            f"; benchmarks reach {100 * benchmark:.3g} %, so restarts, evaluation, checkpoints and idle devices leave "
            f"a goodput of {goodput:.2f}"
        )
    if precision != "fp32" or device.kind == "cpu":
        return fraction, goodput, (why,)
    slow = without_tensor_cores(fraction, device.bf16_tflops / device.fp32_tflops)
    why_slow = f"fp32 leaves the tensor cores out: {100 * slow:.3g} % of {device.fp32_tflops:g} TFLOP/s"
    return slow, goodput, (why, why_slow)
