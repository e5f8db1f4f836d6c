"""What a training of a stated size takes, without a spec: time, money and peak memory, as intervals.

Comes in: a `Workload`. Goes out: an `Estimate`. Called by the `estimate` command and by the advisor. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.architectures.families import ModelShape
from orchestrator.architectures.standard_shape import MOST_SIZES, standard_shape
from orchestrator.errors import SpecError
from orchestrator.intervals import Interval
from orchestrator.methods.registry import PRICED
from orchestrator.planning.hardware import Device
from orchestrator.planning.memory import GIB, Layout, MemoryEstimate, Optimizer, Trainer, load_bytes, peak_memory
from orchestrator.planning.placement import USABLE_DEVICE_MEMORY, ChosenPrecision
from orchestrator.planning.throughput import PricedRun, RunCost, flops_per_token, run_cost
from orchestrator.quantities import MOST_SAMPLES, MOST_WORKERS, human_count

Offload = Literal["none", "optimizer", "all"]

OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "adamw-8bit", "paged-adamw")

HEAD_CLASSES = 2
"""Classes of the head on frozen features: the number does not show in memory or time."""
ASSUMED_SHAPE = Interval(low=0.75, mid=1.0, high=1.10)
"""Widens the interval of the peak where only the number of parameters is known: gated or plain MLPs, vocabularies from
32,000 to 256,000. From the residuals of `tests/evidence/score_memory.py` without the models' sizes."""
MOST_PRICED = 10**24
"""Tokens: the advisor also prices a hundred times the data, and what a model processes in its life."""
CPU_GIB_PER_CORE = 8.0
"""Memory for a worker on one CPU core, of which the catalogue knows nothing: a guess, the most that usual machines have
beside a core."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training, described by sizes alone."""

    parameters: int
    """All weights of the model."""
    tokens: float
    """Tokens to train on, every epoch counted."""
    device: Device
    gpus: int = 1
    """Devices; on a CPU, worker processes of one core each."""
    method: str = "full"
    """One of `PRICED`."""
    precision: ChosenPrecision | None = None
    """None: what `run` takes on the device, 16-bit weights with fp32 master copies (fp32 on a CPU)."""
    master_weights: bool | None = None
    """Whether fp32 copies of trained 16-bit weights are kept, as DeepSpeed does. None: not where bf16 was asked for,
    since a model loaded in bf16 is trained so by plain PyTorch, peft, torchtune and litgpt."""
    optimizer: Optimizer = "adamw"
    zero_stage: int | None = None
    """None: the least that surely fits."""
    offload: Offload | None = None
    """None: none."""
    sequence_length: int = 2048
    micro_batch: int = 1
    """Samples per device and forward pass."""
    shape: ModelShape | None = None
    """None: `standard_shape` of the parameters."""
    activation_checkpointing: bool = False
    lora_rank: int = 8
    """Rank of the adapters of `lora` and `qlora`."""
    nodes: int | None = None
    """Machines that the devices are spread over; None where it does not matter."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the workload takes; intervals hold 90 %."""

    gpu_hours: Interval
    wall_hours: Interval
    usd: Interval | None
    """None where no price is known."""
    peak_gib: Interval
    """Peak memory per device, as PyTorch's allocator counts it."""
    fits: bool
    """Whether the upper end of the peak fits the device; of the host's memory, which nobody states, see `reasons`."""
    zero_stage: int
    offload: Offload
    memory: MemoryEstimate
    """The peak by its parts."""
    shape: ModelShape
    """The sizes that were given, or assumed."""
    trainable: int
    """Weights that the method trains."""
    reasons: tuple[str, ...]


def estimate(workload: Workload) -> Estimate:
    """Prices a workload. Raises SpecError when it cannot be as stated."""
    _refuse_nonsense(workload)
    method = PRICED[workload.method]
    shape = workload.shape or standard_shape(workload.parameters)
    if not method.cost.passes_back and not shape.head_parameters:
        shape = replace(shape, head_parameters=HEAD_CLASSES * shape.hidden)
    trainable = method.usual_parameters(shape, rank=workload.lora_rank)
    stage, memory, why_stage = _choose_stage(workload, shape, trainable)
    fits = memory.peak_gib.high <= usable_gib(workload.device)
    cost = _cost(workload, shape, trainable)
    reasons = [_about_shape(workload, shape), *_about_states(workload, shape, trainable, stage, memory), why_stage]
    reasons.extend(cost.reasons)
    reasons.append(_verdict(memory.peak_gib, workload.device))
    reasons.extend(_warnings(workload, shape, stage, memory))
    if not fits:
        reasons.append(_remedy(workload, shape, stage))
    return Estimate(
        gpu_hours=cost.gpu_hours,
        wall_hours=cost.wall_hours,
        usd=cost.usd,
        peak_gib=memory.peak_gib,
        fits=fits,
        zero_stage=stage,
        offload=workload.offload or "none",
        memory=memory,
        shape=shape,
        trainable=trainable,
        reasons=tuple(reasons),
    )


def usable_gib(device: Device) -> float:
    """Memory that a training may use on one device (a CPU: beside one core)."""
    return USABLE_DEVICE_MEMORY * (device.memory_gib or CPU_GIB_PER_CORE)


def fits_machine(peak: Interval, host_gib: float, device: Device) -> bool:
    """Whether a peak surely fits a device, and what is offloaded the memory that usual machines have beside it."""
    return peak.high <= usable_gib(device) and (device.kind == "cpu" or host_gib <= device.host_gib)


def precision_of(workload: Workload) -> ChosenPrecision:
    """The number format: as asked for, or the best that the device has."""
    if workload.precision is not None:
        return workload.precision
    if workload.device.kind == "cpu":
        return "fp32"
    return "bf16" if workload.device.has_bf16 else "fp16"


def _keeps_master(workload: Workload) -> bool:
    if workload.master_weights is not None:
        return workload.master_weights
    # Sharded training keeps fp32 copies by default (DeepSpeed, FSDP mixed precision); plain bf16 on one device does not
    return workload.precision != "bf16" or bool(workload.zero_stage)


def _layout(workload: Workload, stage: int) -> Layout:
    virtual = PRICED[workload.method].cost.virtual_tokens
    return Layout(
        workers=workload.gpus,
        device="cpu" if workload.device.kind == "cpu" else "cuda",
        zero_stage=stage,
        offload=workload.offload or "none",
        precision=precision_of(workload),
        micro_batch=workload.micro_batch,
        sequence_length=workload.sequence_length + virtual,
        activation_checkpointing=workload.activation_checkpointing,
    )


def _memory(workload: Workload, shape: ModelShape, stage: int) -> MemoryEstimate:
    method = PRICED[workload.method]
    memory = peak_memory(
        _layout(workload, stage),
        shape=shape,
        method=method.usual_cost(shape),
        trainable=method.usual_parameters(shape, rank=workload.lora_rank),
        trainer=Trainer(master_weights=_keeps_master(workload), optimizer=workload.optimizer),
    )
    if workload.shape is not None:
        return memory
    low, high = memory.spread.low * ASSUMED_SHAPE.low, memory.spread.high * ASSUMED_SHAPE.high
    return replace(memory, spread=Interval(low=low, mid=1.0, high=high))


def _stages(workload: Workload) -> list[int]:
    """ZeRO stages to try, from least to most communication."""
    if workload.zero_stage is not None:
        return [workload.zero_stage]
    if workload.offload == "all":
        return [3]
    if workload.offload == "optimizer":
        return [2, 3]
    return [0, 1, 2, 3] if workload.gpus > 1 else [0]


def _choose_stage(workload: Workload, shape: ModelShape, trainable: int) -> tuple[int, MemoryEstimate, str]:
    capacity = usable_gib(workload.device)
    tried = [(stage, _memory(workload, shape, stage)) for stage in _stages(workload)]
    if workload.zero_stage is not None:
        return *tried[0], f"zero_stage: {workload.zero_stage}, as set"
    for stage, memory in tried:
        if memory.peak_gib.high <= capacity:
            alone = workload.gpus == 1 and stage == 0
            return (
                stage,
                memory,
                f"zero_stage: {stage}, "
                + ("one device has nothing to shard" if alone else "the least that surely fits"),
            )
    stage, memory = min(tried, key=lambda one: one[1].peak_gib.high)
    if workload.gpus == 1 and stage == 0:
        return stage, memory, "zero_stage: 0, one device has nothing to shard"
    return stage, memory, f"zero_stage: {stage}, the least memory of {len(tried)} tried; none surely fits"


def _cost(workload: Workload, shape: ModelShape, trainable: int) -> RunCost:
    method = PRICED[workload.method].usual_cost(shape)
    flops = workload.tokens * flops_per_token(
        shape, method=method, trainable=trainable, sequence_length=workload.sequence_length
    )
    return run_cost(
        PricedRun(
            flops_per_step=flops,
            steps=1,
            workers=workload.gpus,
            device=workload.device,
            precision=precision_of(workload),
            usd_per_device_hour=workload.device.usd_per_hour,
            activation_checkpointing=workload.activation_checkpointing,
            method=method,
            parameters=shape.parameters,
            trainable=trainable,
            zero_stage=workload.zero_stage,
            offload=workload.offload or "none",
            nodes=workload.nodes,
        )
    )


# -- why -------------------------------------------------------------------------------------------------------------


def _about_shape(workload: Workload, shape: ModelShape) -> str:
    sizes = f"{shape.layers} layers of {shape.hidden}, {shape.heads} heads, a vocabulary of {human_count(shape.vocab)}"
    known = "as given" if workload.shape is not None else "assumed from published models of this size"
    return f"shape: {human_count(shape.parameters)} parameters, {sizes}, {known}"


def _about_states(
    workload: Workload, shape: ModelShape, trainable: int, stage: int, memory: MemoryEstimate
) -> Iterator[str]:
    precision, method = precision_of(workload), PRICED[workload.method]
    share = 100 * trainable / shape.parameters
    yield f"method: {method.name} trains {human_count(trainable)} of them ({share:.3g} %)"
    if precision == "fp32" or not method.cost.trains_all:
        return
    other = _memory(replace(workload, master_weights=not _keeps_master(workload)), shape, stage).peak_gib.mid
    if not _keeps_master(workload):
        yield (
            f"precision: weights, gradients and moments all in {precision}, as plain PyTorch trains a model loaded so; "
            f"with fp32 master weights, as `plan` and `run` train, it is {other:.3g} GiB (--master-weights)"
        )
    elif precision == "bf16":
        yield (
            f"precision: bf16 with fp32 master weights and moments, as `plan` and `run` train; all in bf16, as plain "
            f"PyTorch trains a model loaded so, it would be {other:.3g} GiB (--no-master-weights)"
        )
    else:
        yield "precision: fp16 with fp32 master weights and moments, as `plan` and `run` train"


def _verdict(peak: Interval, device: Device) -> str:
    capacity = usable_gib(device)
    of = f"the {capacity:.3g} GiB that a training may use of {device.memory_gib or CPU_GIB_PER_CORE:g}"
    where = "beside each core (assumed)" if device.kind == "cpu" else f"on the {device.name}"
    needs = f"memory: {peak.mid:.3g} ({peak.low:.3g} to {peak.high:.3g}) GiB against {of} {where}"
    if peak.high <= capacity:
        return f"{needs}: it fits"
    return f"{needs}: " + ("it may fit, but not surely" if peak.mid <= capacity else "it does not fit")


def _warnings(workload: Workload, shape: ModelShape, stage: int, memory: MemoryEstimate) -> Iterator[str]:
    if memory.host_gib:
        yield (
            f"host memory: {memory.host_gib:.3g} GiB per device for what is offloaded must be there; usual machines "
            f"have about {workload.device.host_gib:g} beside each {workload.device.name}"
        )
    loading = load_bytes(_layout(workload, stage), shape) / GIB
    if stage == 3 and workload.gpus > 1 and loading > memory.peak_gib.mid and workload.device.kind != "cpu":
        yield (
            f"loading: a loader that puts the whole model on every device before sharding it takes {loading:.3g} GiB; "
            "`run` shards while it loads"
        )


def _remedy(workload: Workload, shape: ModelShape, stage: int) -> str:
    """The smallest change that would surely fit, as options of the command."""
    for option, changed, to in _changes(workload, stage):
        memory = _memory(changed, shape, to)
        if fits_machine(memory.peak_gib, memory.host_gib, workload.device):
            return f"smallest change that surely fits: {option} ({memory.peak_gib.mid:.3g} GiB)"
    return "no single change surely fits: take a smaller model, or a device with more memory"


def _changes(workload: Workload, stage: int) -> Iterator[tuple[str, Workload, int]]:
    """Changes from the cheapest to the most drastic, with the ZeRO stage of each."""
    if not workload.activation_checkpointing:
        yield "--activation-checkpointing", replace(workload, activation_checkpointing=True), stage
    if workload.micro_batch > 1:
        yield "--micro-batch 1", replace(workload, micro_batch=1), stage
    if workload.gpus > 1 and stage < 3:
        yield "--zero-stage 3", workload, 3
    if workload.device.kind != "cpu":
        light = replace(workload, activation_checkpointing=True, micro_batch=1)
        flags = "--activation-checkpointing --micro-batch 1"
        yield flags, light, stage
        for offload in ("optimizer", "all"):
            changed = replace(light, offload=offload, master_weights=True)
            yield f"{flags} --zero-stage 3 --offload {offload}", changed, 3
        for count in (workload.gpus * 2**power for power in range(1, 8)):
            yield f"{flags} --gpus {count} --zero-stage 3", replace(light, gpus=count, nodes=None), 3
        if (smaller := PRICED[workload.method].quantised) is not None:
            yield f"{flags} --method {smaller}", replace(light, method=smaller), stage


# -- mistakes --------------------------------------------------------------------------------------------------------


def _refuse_nonsense(workload: Workload) -> None:
    if workload.method not in PRICED:
        raise SpecError("no such method", got=f"--method {workload.method}", allowed=", ".join(PRICED))
    if workload.optimizer not in OPTIMIZERS:
        raise SpecError("no such optimizer", got=f"--optimizer {workload.optimizer}", allowed=", ".join(OPTIMIZERS))
    for option, value, most in (
        ("--params", workload.parameters, MOST_SIZES["parameters"]),
        ("--tokens", workload.tokens, MOST_PRICED),
        ("--gpus", workload.gpus, MOST_WORKERS),
        ("--seq", workload.sequence_length, MOST_SAMPLES),
        ("--micro-batch", workload.micro_batch, MOST_SAMPLES),
        ("--lora-rank", workload.lora_rank, MOST_SAMPLES),
        ("--nodes", 1 if workload.nodes is None else workload.nodes, MOST_WORKERS),
    ):
        if not value > 0:
            raise SpecError(f"{option} must be above zero", got=value)
        if value > most:
            raise SpecError(f"{option} is beyond all use", got=value, allowed=f"up to {most:.0e}")
    if workload.nodes is not None and workload.gpus % workload.nodes:
        raise SpecError("the GPUs do not split evenly", got=f"--gpus {workload.gpus} --nodes {workload.nodes}")
    _refuse_layout(workload)
    _refuse_precision(workload)


def _refuse_layout(workload: Workload) -> None:
    stage, offload = workload.zero_stage, workload.offload or "none"
    if stage not in (None, 0, 1, 2, 3):
        raise SpecError("no such ZeRO stage", got=f"--zero-stage {stage}", allowed="0, 1, 2, 3")
    if offload not in ("none", "optimizer", "all"):
        raise SpecError("nothing of that name can be offloaded", got=offload, allowed="none, optimizer, all")
    if offload == "all" and stage not in (None, 3):
        raise SpecError("offloading weights needs ZeRO stage 3", got=f"--offload all --zero-stage {stage}")
    if offload == "optimizer" and stage == 0:
        raise SpecError("offloading the optimizer needs ZeRO stage 1, 2 or 3", got="--offload optimizer --zero-stage 0")
    if offload != "none" and workload.device.kind == "cpu":
        raise SpecError("on a CPU there is no device memory to offload from", got=f"--offload {offload}")


def _refuse_precision(workload: Workload) -> None:
    device, precision = workload.device, workload.precision
    if precision not in (None, "bf16", "fp16", "fp32"):
        raise SpecError("no such precision", got=f"--precision {precision}", allowed="bf16, fp16, fp32")
    if precision == "bf16" and device.kind == "gpu" and not device.has_bf16:
        raise SpecError(f"the {device.name} has no bf16", got="--precision bf16", allowed="fp16, fp32")
    if precision == "fp16" and device.kind == "cpu":
        raise SpecError("DeepSpeed trains in fp16 only on GPUs", got="--precision fp16", allowed="fp32, bf16")
