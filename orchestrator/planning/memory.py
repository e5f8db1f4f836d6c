"""Peak memory of one device: weights, gradients, optimizer, activations, logits and buffers under ZeRO and offload.

Comes in: a `Layout` and the model's shape. Goes out: a `MemoryEstimate`. Called by `plan`, which tries layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.planning.model_shape import ModelShape
from orchestrator.planning.run_plan import Interval
from orchestrator.spec import Method

GIB = 2**30
BUCKET_ELEMENTS = 200_000_000
"""Most gradients (and weights) that DeepSpeed moves at a time; its default of 5e8 takes 1 GB even for a tiny model."""
INTERVAL = Interval(low=0.85, mid=1.0, high=1.30)
"""Width of the 90 % interval: a guess, until measured peaks replace it. Fragmentation makes it lopsided."""
_BASELINE_GIB = {
    "cpu": 0.6,  # measured: 0.5 for Python with torch, deepspeed and transformers; 0.1 for a Ray worker is a guess
    "cuda": 1.0,  # guess: CUDA context 0.5, cuBLAS workspaces and NCCL channels 0.5
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

    def shards(self, from_stage: int) -> int:
        """Over how many devices something is spread that ZeRO shards from a stage on."""
        return self.workers if self.zero_stage >= from_stage else 1


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Where the memory of one device goes at its peak, in GiB; on a CPU, of one worker process."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    """Adam's moments and the fp32 master weights."""
    activations_gib: float
    logits_gib: float
    step_gib: float
    """fp32 gradients and temporaries of the optimizer step; they never meet activations and logits."""
    buffers_gib: float
    """Communication buckets, gathered layers, and what the framework takes before any model."""
    host_gib: float
    """Host memory per worker for what is offloaded; no part of the peak."""

    @property
    def peak_gib(self) -> Interval:
        """The most memory in use at a time."""
        kept = self.weights_gib + self.gradients_gib + self.optimizer_gib + self.buffers_gib
        return INTERVAL.scaled(kept + max(self.activations_gib + self.logits_gib, self.step_gib))


def peak_memory(layout: Layout, *, shape: ModelShape, method: Method, trainable: int) -> MemoryEstimate:
    """Memory of one device while it trains `trainable` of the shape's weights by a method.

    Bytes per weight follow DeepSpeed 0.19's ZeRO optimizers: in 16 bits 2 for the weight, 2 for its gradient and 12
    for master and moments, and at the step 4 for the fp32 gradient; in fp32 4, 4 and 8, and 4 more for the master
    copy that stages 1 to 3 keep all the same.
    """
    width, shared = layout.weight_bytes, trainable / layout.shards(1)
    master = 12 if layout.precision != "fp32" or layout.zero_stage else 8
    offloaded = layout.offload != "none"
    weights = 0.0 if layout.offload == "all" else width * shape.parameters / layout.shards(3)
    host = 0.0
    if offloaded:  # 16 bytes a weight, 18 with the weights, half as much again: DeepSpeed's own estimators
        host = 1.5 * (16 * shared + (width * shape.parameters / layout.workers if layout.offload == "all" else 0))
    return MemoryEstimate(
        weights_gib=weights / GIB,
        gradients_gib=0.0 if offloaded else width * trainable / layout.shards(2) / GIB,
        optimizer_gib=0.0 if offloaded else master * shared / GIB,
        activations_gib=_activation_bytes(layout, shape, method) / GIB,
        logits_gib=_logit_bytes(layout, shape) / GIB if not shape.head_parameters else 0.0,
        step_gib=0.0 if offloaded else 8 * shared / GIB,  # 4 for the fp32 gradient, 4 for Adam's denominator
        buffers_gib=_BASELINE_GIB[layout.device] + _buffer_bytes(layout, shape, trainable) / GIB,
        host_gib=host / GIB,
    )


def _activation_bytes(layout: Layout, shape: ModelShape, method: Method) -> float:
    """What the forward pass keeps for the backward pass."""
    tokens = layout.micro_batch * layout.sequence_length
    layer = tokens * _layer_bytes_per_token(layout, shape, frozen=method == "lora")
    if method == "head":
        return layer  # the backbone keeps nothing; one layer's tensors are alive at a time
    if layout.activation_checkpointing:
        return shape.layers * tokens * layout.weight_bytes * shape.hidden + layer
    return shape.layers * layer


def _layer_bytes_per_token(layout: Layout, shape: ModelShape, *, frozen: bool) -> float:
    """Bytes that one layer keeps per token: Korthikanti et al. (2022), with this model's own widths.

    Equal to what autograd saved for GPT-2, Llama and BERT in fp32 on a CPU (within 1 %, `tests/test_memory.py`).
    """
    e, h, i = layout.weight_bytes, shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = e * (h + q + 2 * kv + q)  # input, queries, keys and values, and the projection's input
    norms = 2 * h * (e + 4 if shape.rms_norm else e)
    mlp = e * (h + shape.mlp_tensors * i)
    kept = attention + norms + mlp
    if frozen:  # frozen modules keep no input: the MLP's two, and attention's output or both norms' scaled rows
        kept -= e * (h + i + (2 * h if shape.rms_norm else h))
    if not shape.dropout:
        return kept
    mask = 1 if layout.device == "cuda" else e  # on a CPU a dropout mask is a tensor of floats
    # Attention matrices exist only where no fused kernel runs: PyTorch on a CPU falls back when dropout is on.
    scores = shape.heads * layout.sequence_length * (2 * e + mask) if layout.device == "cpu" else 0
    return kept + 2 * mask * h + scores


def _logit_bytes(layout: Layout, shape: ModelShape) -> float:
    """Logits, their log-softmax, and the gradients of both, the loss being computed in fp32."""
    per_entry = layout.weight_bytes + 4 + 4 + 4
    return layout.micro_batch * layout.sequence_length * shape.vocab * per_entry


def _buffer_bytes(layout: Layout, shape: ModelShape, trainable: int) -> float:
    if layout.zero_stage == 0:
        return 0.0
    copies = 2 if layout.device == "cuda" else 1  # overlapped communication fills one bucket while it sends another
    bucket = copies * layout.weight_bytes * min(trainable, BUCKET_ELEMENTS)
    if layout.zero_stage < 3:
        return bucket
    layer = (shape.parameters - shape.embedding_parameters) / shape.layers
    largest = max(layer, shape.vocab * shape.hidden)
    return bucket + 2 * layout.weight_bytes * largest  # gathered weights and their gradients, as DeepSpeed estimates
