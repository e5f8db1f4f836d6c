"""The values that planning works with: cluster, dataset counts, and the `RunPlan` that `run` carries out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orchestrator.intervals import Interval

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class NodeShape:
    """One machine of a cluster."""

    cpus: int
    """CPU cores that Ray may give out."""
    gpus: int
    """GPUs that Ray may give out."""
    memory_gib: float
    """Host memory."""


@dataclass(frozen=True, kw_only=True)
class ClusterShape:
    """What there is to run on: live from Ray, or as asked for on the command line."""

    nodes: tuple[NodeShape, ...]
    device_name: str
    """Key of the device catalogue: a GPU's name, or `cpu`."""
    may_become: tuple[ClusterShape, ...] = ()
    """What its autoscaler could make of it when asked, the first choice first; empty without one."""

    @property
    def reachable(self) -> tuple[ClusterShape, ...]:
        """The cluster as it is, and what it may become."""
        return (self, *self.may_become)

    @property
    def gpus(self) -> int:
        """GPUs over all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def cpus(self) -> int:
        """CPU cores over all nodes."""
        return sum(node.cpus for node in self.nodes)


@dataclass(frozen=True, kw_only=True)
class DatasetCounts:
    """What the prepared dataset holds, once it has been looked at."""

    train_samples: int
    """Samples of one epoch: packed blocks, or labelled examples."""
    train_tokens: int
    """Tokens of one epoch: special ones included, padding not."""
    validation_samples: int
    validation_tokens: int | None = None
    """Of the held-out samples; None where they were not counted."""
    vocab_size: int
    """Entries of the tokenizer that encoded the data."""
    num_labels: int | None = None
    """Classes, for classification."""
    label_names: tuple[str, ...] | None = None
    """Their names, by number."""
    columns: tuple[tuple[int, int], ...] | None = None
    """Where samples differ in length: (columns that a training sample alone would take, how many samples take them),
    the fewest columns first; None for packed blocks."""
    longest: int | None = None
    """Columns of the longest sample of either split; None for packed blocks."""
    left_over_tokens: int = 0
    """Tokens at the end of the training stream, or without one of the held-out stream, that fill no block."""
    retained: DatasetCounts | None = None
    """The same of the general data of `retain`."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a run keeps from attempt to attempt, whatever its number of workers, unless its spec sets something else or
    memory ran out: so its losses stay what they would have been, to the last bit where the size stays too."""

    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    micro_batch: int
    precision: Literal["fp32", "bf16", "fp16"]
    activation_checkpointing: bool
    gpus_per_worker: int
    """A run that began on GPUs waits for others when it loses them all; it does not go on with CPU cores."""


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """What an elastic run takes if it keeps one of its sizes to the end."""

    workers: int
    has_room: bool
    """Whether the cluster had room for so many when the plan was made."""
    accumulation: int
    peak_gib: Interval
    """Peak memory per device."""
    wall_hours: Interval | None
    """None while `steps` is None, as are the next two."""
    gpu_hours: Interval | None
    usd: Interval | None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything a worker needs to know about how to train; printed it is the dry run; it is logged with the run."""

    workers: int
    device: Device
    device_name: str
    gpus_per_worker: int
    cpus_per_worker: int
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    micro_batch: int
    """Samples per worker and forward pass."""
    accumulation: int
    """Forward passes per optimizer step: global_batch = workers x micro_batch x accumulation."""
    global_batch: int
    sequence_length: int
    """Columns of the longest batch that can occur, whose memory is planned for: the block, or for classification the
    longest row (until the data is read, the cut-off)."""
    precision: Literal["fp32", "bf16", "fp16"]
    activation_checkpointing: bool
    steps: int | None
    """Optimizer steps; None until a length that depends on the dataset has met it."""
    warmup_steps: int | None
    tokens_per_step: int
    """Tokens seen in a step, on average and without padding: what `training.tokens` and `train/tokens` count. For
    classification the cut-off's, an upper bound, until the data is read."""
    padded_tokens_per_step: int
    """Tokens computed in a step, on average: with the padding of rows to the longest of their batch."""
    parameters: int
    """All weights of the model."""
    trainable_parameters: int
    flops_per_step: float
    """Model FLOPs of one optimizer step, on average: padding and attention included, recomputation not."""
    flops_once: float
    """Model FLOPs before the first step: of features of a frozen backbone, which are kept. 0 where none are."""
    usd_per_device_hour: float
    """Price of one device; on a CPU of one worker with its cores. 0 where none is known, and then `usd` is None."""
    states_gib: float
    """Weights, gradients and optimizer states per device: the part of the peak that is certain."""
    peak_gib: Interval
    """Peak memory per device (on a CPU: per worker process)."""
    device_memory_gib: float
    """What a training may use of a device."""
    gpu_hours: Interval | None
    """Device hours; None while `steps` is None."""
    wall_hours: Interval | None
    usd: Interval | None
    fits: bool
    """Whether the upper end of the peak is within the device's memory, and what is offloaded within the host's."""
    deepspeed: dict[str, Any]
    """The whole DeepSpeed configuration."""
    sizes: tuple[SizePlan, ...] = field(default=())
    """The numbers of workers that an elastic run may take, the smallest first; empty for a fixed number."""
    reasons: tuple[str, ...] = field(default=())
    """Why each choice was made, one sentence each; when it does not fit, the smallest change that would."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: fp32 weights, and masters and two moments of those that are trained."""
        return 4 * self.parameters + 12 * self.trainable_parameters

    @property
    def kept(self) -> Kept:
        """What a later attempt of the same run must keep."""
        return Kept(
            zero_stage=self.zero_stage,
            offload=self.offload,
            micro_batch=self.micro_batch,
            precision=self.precision,
            activation_checkpointing=self.activation_checkpointing,
            gpus_per_worker=self.gpus_per_worker,
        )

    @property
    def trains(self) -> bool:
        """Whether DeepSpeed trains anything; else the base is only asked."""
        return bool(self.deepspeed)

    @property
    def usable_workers(self) -> tuple[int, ...]:
        """The numbers of workers that the run may take, with or without room now, the smallest first."""
        return tuple(size.workers for size in self.sizes) or (self.workers,)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return asdict(self)
