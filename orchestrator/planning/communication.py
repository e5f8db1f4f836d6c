"""Time that devices spend on each other and on the host: collectives under ZeRO, and what offload moves over PCIe.

Comes in: an optimizer step, as it is spread over devices of the catalogue. Goes out: how much longer it takes than its
computation. Called by `throughput`.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.methods.base import MethodCost
from orchestrator.planning.hardware import Device

COLLECTIVE_EFFICIENCY = 0.68
"""Share of a link's bandwidth that collectives get: 17 of the 25 GB/s of an A100's network card reproduce the 144, 88,
138 and 48 TFLOP/s of ZeRO-3 on 384 to 2240 GPUs within 10 % (Narayanan 2021, arXiv 2104.04473, table 2)."""
PCIE_GB_S = 25.0
"""One direction of PCIe 4.0 x16: 32 GB/s nominal; pinned copies get about 25 (rule of thumb)."""
HOST_ADAM_SECONDS_PER_WEIGHT = 0.25e-9
"""Adam's step on all cores of a host: about 0.25 s for 1B weights (Ren 2021, ZeRO-Offload, table 4; from memory)."""
DEVICES_PER_NODE = 8
"""Devices of a usual machine, where the number of nodes is not given."""

_STATES_BYTES = {0: 16, 1: 4, 2: 4}  # per weight that a device must hold whole, by ZeRO stage (Rajbhandari 2020)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step and how it is spread."""

    parameters: float
    trainable: float
    workers: int
    nodes: int
    zero_stage: int | None
    """None where data, tensor and pipeline parallelism are mixed as in published trainings: nothing is added then."""
    offload: str
    """`none`, `optimizer` or `all`."""
    tokens_per_device: float
    accumulation: int
    """Micro-batches that the tokens come in."""
    method: MethodCost

    @property
    def flops_per_weight(self) -> float:
        """Of a token: 6 in full training, 4 with a frozen base, 2 below a trained head."""
        return self.method.flops_per_weight

    @property
    def bytes_per_weight(self) -> float:
        """That ZeRO-3 moves for a micro-batch: 2 to gather weights for each pass, and 2 to scatter gradients."""
        return self.method.bytes_per_weight


def nodes_of(devices: int) -> int:
    """Machines of 8 that hold so many devices."""
    return -(-devices // DEVICES_PER_NODE)


def slowdown(step: Step, device: Device, *, flops_per_second: float) -> tuple[float, tuple[str, ...]]:
    """How many times the computation's time a step takes, and a sentence for each thing that costs time.

    Collectives run while the device computes, so the slower of the two counts; offload comes on top.
    """
    computing = step.flops_per_weight * step.parameters * step.tokens_per_device / flops_per_second
    sending, copying = collective_seconds(step, device), offload_seconds(step)
    reasons = []
    if sending > computing:
        link = f"the {'links within the node' if step.nodes == 1 else 'network'} of the {device.name}"
        reasons.append(
            f"communication: ZeRO-{step.zero_stage} with {step.tokens_per_device:,.0f} tokens a device and step waits "
            f"for {link}, {sending / computing:.2g} x the computation; more tokens a step would hide it"
        )
    if copying > 0:
        reasons.append(
            f"offload: {step.offload} adds {100 * copying / max(computing, sending):.0f} % for copies over PCIe and "
            "the host's optimizer step (a rule of thumb)"
        )
    return (max(computing, sending) + copying) / computing, tuple(reasons)


def collective_seconds(step: Step, device: Device) -> float:
    """Seconds in which each device sends and receives weights and gradients in one optimizer step.

    ZeRO-3 gathers the weights for the forward and again for the backward pass and scatters the gradients, for every
    micro-batch. Stages 0 to 2 reduce gradients and gather weights once, 2 bytes each, of as many weights as fit into a
    device: of a larger model each holds only a part.
    """
    bandwidth = device.node_gb_s if step.nodes == 1 else device.network_gb_s
    if step.zero_stage is None or step.workers == 1 or bandwidth is None:
        return 0.0
    if step.zero_stage == 3:
        sent = step.accumulation * step.bytes_per_weight * step.parameters
    else:
        sent = 4 * min(step.trainable, device.memory_gib * 2**30 / _STATES_BYTES[step.zero_stage])
    return sent * (1 - 1 / step.workers) / (COLLECTIVE_EFFICIENCY * bandwidth * 1e9)


def offload_seconds(step: Step) -> float:
    """Seconds that offload adds to an optimizer step; a rule of thumb that hides none of it behind computation.

    `optimizer`: gradients go down and new weights come up, 2 bytes each, and the host's cores do Adam's step; `all`:
    weights also come up for both passes of every micro-batch.
    """
    if step.offload == "none":
        return 0.0
    moved = 4 * step.trainable + (4 * step.parameters * step.accumulation if step.offload == "all" else 0)
    return moved / step.workers / (PCIE_GB_S * 1e9) + step.trainable / step.nodes * HOST_ADAM_SECONDS_PER_WEIGHT
