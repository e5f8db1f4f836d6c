"""Peak memory of one device: weights, gradients, optimizer, activations, logits and buffers under ZeRO and offload.

Comes in: a `Layout`, the model's shape and the method. Goes out: a `MemoryEstimate`. Called by `plan`, which tries
layouts, and by `estimate`. `tests/evidence/score_memory.py` compares it with published measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.architectures.families import ModelShape
from orchestrator.intervals import Interval
from orchestrator.methods.base import MethodCost
from orchestrator.methods.peft_method import linear_modules

GIB = 2**30
BUCKET_ELEMENTS = 200_000_000
"""Most gradients (and weights) that DeepSpeed moves at a time; its default of 5e8 takes 1 GB even for a tiny model."""
LIVE_ELEMENTS = 1_000_000_000
"""Most weights that ZeRO-3 keeps gathered: DeepSpeed's default for `stage3_max_live_parameters`."""

"""What is trained: all weights, some kind of adapter beside frozen weights, or a head on frozen features."""
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw"]
"""AdamW with moments in the number format of the weights or master weights, of one byte each, or paged to the host."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a quantised weight: 4 bits, one byte of scale per 64 weights and 4 bytes per 256 scales (Dettmers 2023)."""
ALLOCATOR_SHARE = 0.08
"""What a CUDA allocator holds beside the tensors that autograd keeps, as a share of them: temporaries of unfused
operations and fragments. Fitted to `tests/evidence/memory.csv`; between 0.05 and 0.15 the median error hardly moves."""
NO_SHARDING = Interval(low=0.75, mid=1.0, high=1.30)
"""Width of the 90 % interval where a device holds whole weights, from the residuals of the same table."""
SHARDED_WEIGHTS = Interval(low=0.65, mid=1.0, high=1.50)
"""The same where weights are sharded or on the host: loaders and gathering differ more between frameworks."""
ON_A_CPU = Interval(low=0.85, mid=1.0, high=1.30)
"""The same for a worker process on a CPU, from the residuals of `tests/evidence/measured_memory.csv`: 24 of 25 lie
inside, and one of 15M weights took less."""

BASELINE_GIB = {
    # Measured on a Ray worker: 0.57 with a toy model, and 0.06 to 0.20 more than follows from their sizes with six
    # trainings of 2M to 23M weights, whatever their batch: heap that the allocator keeps.
    "cpu": 0.7,
    "cuda": 0.1,  # guess: cuBLAS workspaces; the CUDA context lies outside the allocator, see `USABLE_DEVICE_MEMORY`
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one training lies on its devices."""

    workers: int
    device: Literal["cpu", "cuda"]
    zero_stage: int
    offload: Literal["none", "optimizer", "all"]
    precision: Literal["fp32", "bf16", "fp16"]
    micro_batch: int
    sequence_length: int
    activation_checkpointing: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight, gradient or activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on one device."""
        return self.micro_batch * self.sequence_length

    def shards(self, from_stage: int) -> int:
        """Over how many devices something is spread that ZeRO shards from a stage on."""
        return self.workers if self.zero_stage >= from_stage else 1


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Where the memory of one device goes at its peak, in GiB; on a CPU, of one worker process.

    On a GPU the sum is what `torch.cuda.max_memory_reserved` shows; `nvidia-smi` adds the CUDA context.
    """

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    """Adam's moments, the fp32 master weights, and with `retain.l2sp` their values in the base."""
    activations_gib: float
    logits_gib: float
    """Logits, their log-softmax and the gradients of both."""
    step_gib: float
    """fp32 gradients and temporaries of the optimizer step; they never meet activations and logits."""
    gathered_gib: float
    """Whole weights gathered from shards or from the host, and copies of quantised ones in 16 bits."""
    buffers_gib: float
    """Communication buckets, and what the framework takes before any model."""
    reserve_gib: float
    """Temporaries and fragments that the allocator holds beside activations and logits."""
    load_gib: float
    """Before training, where every device holds all weights until they are sharded; it never meets the rest."""
    checkpoint_gib: float
    """On a CPU, the copy of rank 0's state that is written behind the training, and features; on a GPU they count as
    host memory."""
    host_gib: float
    """Pinned host memory per worker, for what is offloaded and the copy of a checkpoint; no part of the peak."""
    spread: Interval = ON_A_CPU
    """The 90 % interval as multiples of the middle."""

    @property
    def states_gib(self) -> float:
        """What is there from the first step to the last; it follows from the number of weights, without an interval."""
        return self.weights_gib + self.gradients_gib + self.optimizer_gib

    @property
    def peak_gib(self) -> Interval:
        """The most memory in use at a time."""
        kept = self.states_gib + self.gathered_gib + self.buffers_gib + self.checkpoint_gib
        working = max(self.activations_gib + self.logits_gib + self.reserve_gib, self.step_gib)
        return self.spread.scaled(max(kept + working, self.load_gib))


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What the software that trains does with memory; by default as plain PyTorch with DeepSpeed's optimizers."""

    master_weights: bool = True
    """Whether 16-bit weights have fp32 copies; without, everything is in 16 bits, as plain PyTorch trains a model that
    was loaded so."""
    optimizer: Optimizer = "adamw"
    fused_step: bool = False
    """Whether the optimizer steps inside the backward pass, so that no gradients gather."""
    loss_chunks: int = 1
    """In how many pieces the loss is computed."""
    predicted_share: float = 1.0
    """For which part of the tokens."""
    loads_whole: bool = False
    """Whether the whole model is on every device before it is sharded, as in DeepSpeed without `zero.Init`."""
    copies_checkpoints: bool = False
    """Whether a copy in host memory is kept for checkpoints, as `run` does."""
    features: int = 0
    """Rows whose features every worker keeps in host memory, as wide as the model, in fp32."""
    accumulates: bool = False
    """Whether gradients of several micro-batches are summed: those of bf16 in fp32, 4 bytes each."""
    anchors: bool = False
    """Whether the values that trained weights began with are kept beside their masters, in fp32 (`retain.l2sp`)."""


_PLAIN = Trainer()


def peak_memory(
    layout: Layout, *, shape: ModelShape, method: MethodCost, trainable: int, trainer: Trainer = _PLAIN
) -> MemoryEstimate:
    """Memory of one device while it trains `trainable` of the shape's weights by a method.

    Bytes per weight follow DeepSpeed 0.19's ZeRO optimizers: in 16 bits 2 for the weight, 2 for its gradient and 12
    for master and moments, and at the step 4 for the fp32 gradient; in fp32 4, 4 and 8, and 4 more for the master
    copy that stages 1 to 3 keep all the same; without master weights 2 + 2 + 4. Anchors are counted for every trained
    weight, though those of a new head have none.
    """
    width, shared = layout.weight_bytes, trainable / layout.shards(1)
    states = _optimizer_bytes(layout, master_weights=trainer.master_weights, optimizer=trainer.optimizer)
    offloaded = layout.offload != "none"
    anchors = 4 * shared if trainer.anchors else 0.0
    weights = 0.0 if layout.offload == "all" else _weight_bytes(layout, shape, method) / layout.shards(3)
    host = 0.0
    if offloaded:  # 16 bytes a weight, 18 with the weights, half as much again: DeepSpeed's own estimators
        held = _weight_bytes(layout, shape, method) / layout.workers if layout.offload == "all" else 0
        host = 1.5 * (16 * shared + held) + anchors
    copied = _checkpoint_bytes(layout, trainable, states) if trainer.copies_checkpoints else 0.0
    copied += 4 * shape.hidden * trainer.features
    on_cpu = layout.device == "cpu"
    gradient = 4 if trainer.accumulates and layout.precision == "bf16" else width
    activations = _activation_bytes(layout, shape, method)
    logits = (
        _logit_bytes(layout, shape, trainer.predicted_share) / trainer.loss_chunks if not shape.head_parameters else 0.0
    )
    return MemoryEstimate(
        weights_gib=weights / GIB,
        gradients_gib=0.0 if offloaded or trainer.fused_step else gradient * trainable / layout.shards(2) / GIB,
        optimizer_gib=0.0 if offloaded else (states * shared + anchors) / GIB,
        activations_gib=activations / GIB,
        logits_gib=logits / GIB,
        # With master weights 4 for the fp32 gradient and 4 for Adam's denominator; else the denominator alone, or
        # before it DeepSpeed's bucket of all gradients, which is as large.
        step_gib=0.0 if offloaded else (8 if _copied(layout, trainer.master_weights) else width) * shared / GIB,
        gathered_gib=_gathered_bytes(layout, shape, method) / GIB,
        buffers_gib=BASELINE_GIB[layout.device] + _bucket_bytes(layout, trainable) / GIB,
        reserve_gib=0.0 if on_cpu else ALLOCATOR_SHARE * (activations + logits) / GIB,
        load_gib=load_bytes(layout, shape) / GIB if trainer.loads_whole else 0.0,
        checkpoint_gib=copied / GIB if on_cpu else 0.0,
        host_gib=(host if on_cpu else host + copied) / GIB,
        spread=_spread(layout),
    )


def load_bytes(layout: Layout, shape: ModelShape) -> float:
    """What a loader without `zero.Init` or a meta device takes: all weights, and one shard beside them."""
    shard = 0 if layout.offload == "all" else 1 / layout.shards(3)
    return layout.weight_bytes * shape.parameters * (1 + shard)


def _spread(layout: Layout) -> Interval:
    if layout.device == "cpu":
        return ON_A_CPU
    shares = layout.zero_stage == 3 and layout.workers > 1
    return SHARDED_WEIGHTS if shares or layout.offload != "none" else NO_SHARDING


def _optimizer_bytes(layout: Layout, *, master_weights: bool, optimizer: Optimizer) -> float:
    """Bytes of master copy and moments per trained weight."""
    moment = 4 if master_weights else layout.weight_bytes
    moments = {"adamw": 2.0 * moment, "adamw-8bit": 2.0, "paged-adamw": 0.0}[optimizer]
    return moments + (4 if _copied(layout, master_weights) else 0)


def _copied(layout: Layout, master_weights: bool) -> bool:
    """Whether the optimizer has fp32 weights of its own: ZeRO keeps them also where the model's are in fp32."""
    return master_weights and (layout.precision != "fp32" or layout.zero_stage > 0)


def _checkpoint_bytes(layout: Layout, trainable: int, states: float) -> float:
    """What rank 0 copies for a checkpoint: its share of the optimizer, and before ZeRO-3 the trained weights whole.

    Equal to the files that DeepSpeed 0.19 writes (within 1 %, `tests/test_engine.py`).
    """
    weights = layout.weight_bytes if layout.zero_stage < 3 else 0
    return trainable * (weights + states / layout.shards(1))


def _weight_bytes(layout: Layout, shape: ModelShape, method: MethodCost) -> float:
    """All weights; of quantised ones, the linear modules of the layers have 4 bits."""
    if not method.is_quantised:
        return layout.weight_bytes * shape.parameters
    if modules := linear_modules(shape):
        whole = shape.parameters - sum(inputs * outputs for inputs, outputs in modules.values())
    else:  # of an unknown architecture: all but the embeddings and the output layer
        whole = min(shape.parameters, shape.embedding_parameters + (0 if shape.tied else shape.vocab * shape.hidden))
    return layout.weight_bytes * whole + NF4_BYTES * (shape.parameters - whole)


def _activation_bytes(layout: Layout, shape: ModelShape, method: MethodCost) -> float:
    """What the forward pass keeps for the backward pass."""
    besides = method.kept_per_layer + layout.micro_batch * method.kept_per_sample
    layer = layout.tokens * _layer_bytes_per_token(layout, shape, method) + layout.weight_bytes * besides
    if not method.passes_back:
        return layer  # the backbone keeps nothing; one layer's tensors are alive at a time
    layers = shape.layers * method.backward_share
    if layout.activation_checkpointing:
        return layers * layout.tokens * layout.weight_bytes * shape.hidden + layer
    return layers * layer


def _layer_bytes_per_token(layout: Layout, shape: ModelShape, method: MethodCost) -> float:
    """Bytes that one layer keeps per token: Korthikanti et al. (2022), with this model's own widths.

    Equal to what autograd saved for GPT-2, Llama and BERT in fp32 on a CPU (within 1 %, `tests/test_memory.py`).
    """
    e, h, i = layout.weight_bytes, shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = e * (h + q + 2 * kv + q)  # input, queries, keys and values, and the projection's input
    norms = 2 * h * (e + 4 if shape.rms_norm else e)
    mlp = e * (h + shape.mlp_tensors * i)
    kept: float = attention + norms + mlp
    # Frozen modules keep no input: the MLP's two, and attention's output; frozen RMS norms no scaled rows.
    if not method.keeps_inputs:
        kept -= e * (h + i + (0 if shape.rms_norm else h))
    if shape.rms_norm and not method.keeps_rows:
        kept -= e * 2 * h
    kept += e * method.kept_per_token
    if not shape.dropout:
        return kept
    mask = 1 if layout.device == "cuda" else e  # on a CPU a dropout mask is a tensor of floats
    # Attention matrices exist only where no fused kernel runs: PyTorch on a CPU falls back when dropout is on.
    scores = shape.heads * layout.sequence_length * (2 * e + mask) if layout.device == "cpu" else 0
    return kept + 2 * mask * h + scores


def _logit_bytes(layout: Layout, shape: ModelShape, predicted_share: float) -> float:
    """Logits of all tokens, and of the predicted ones their log-softmax and the gradients of both, in fp32."""
    per_entry = layout.weight_bytes + predicted_share * (4 + 4 + 4)
    return layout.tokens * shape.vocab * per_entry


def _gathered_bytes(layout: Layout, shape: ModelShape, method: MethodCost) -> float:
    """Weights that are whole for a moment: gathered ones, or one layer of quantised ones."""
    layer = (shape.parameters - shape.embedding_parameters) / shape.layers
    gathers = layout.zero_stage == 3 and (layout.workers > 1 or layout.offload == "all")
    if not gathers:
        return layout.weight_bytes * shape.hidden * shape.intermediate if method.is_quantised else 0.0
    largest = max(layer, shape.vocab * shape.hidden)
    live = min(shape.parameters, max(LIVE_ELEMENTS, largest))
    gradients = largest if method.trains_all else 0  # those of a layer are whole before they are reduced
    return layout.weight_bytes * (live + gradients)


def _bucket_bytes(layout: Layout, trainable: int) -> float:
    if layout.zero_stage == 0:
        return 0.0
    copies = 2 if layout.device == "cuda" else 1  # overlapped communication fills one bucket while it sends another
    return copies * layout.weight_bytes * min(trainable, BUCKET_ELEMENTS)
