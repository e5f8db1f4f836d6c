"""Time that devices spend on each other and on the host: collectives under ZeRO, and what offload moves over PCIe.

Comes in: an optimizer step, as it is spread over devices of the catalogue. Goes out: how much longer it takes than its
computation. Called by `throughput`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.methods.base import MethodCost
from orchestrator.planning.hardware import Device

COLLECTIVE_EFFICIENCY = 0.68
"""Share of a link's bandwidth that collectives get: 17 of the 25 GB/s of an A100's network card reproduce the 144, 88,
138 and 48 TFLOP/s of ZeRO-3 on 384 to 2240 GPUs within 10 % (Narayanan 2021, arXiv 2104.04473, table 2)."""
GLOO_EFFICIENCY = 0.9
"""The same between CPUs: 0.88 of a link shaped to 100 Mbit/s (measured: 19.7 MB took 1.79 s), headers of Ethernet, IP
and TCP among the rest; at 1 Gbit/s it made no difference that could be told from the steps' own."""
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
    element_bytes: int = 2
    """Of a weight and of its gradient as they are sent: 4 in fp32."""
    network_gb_s: float | None = None
    """GB/s in one direction from a device to other nodes, where the user has said so; None is the catalogue's."""

    @property
    def flops_per_weight(self) -> float:
        """Of a token: 6 in full training, 4 with a frozen base, 2 below a trained head."""
        return self.method.flops_per_weight

    @property
    def bytes_per_weight(self) -> float:
        """That ZeRO-3 moves for a micro-batch: an element to gather a weight for each pass, one for its gradient."""
        return self.method.bytes_per_weight * self.element_bytes / 2


def nodes_of(devices: int) -> int:
    """Machines of 8 that hold so many devices."""
    return -(-devices // DEVICES_PER_NODE)


def slowdown(step: Step, device: Device, *, flops_per_second: float) -> tuple[float, tuple[str, ...]]:
    """How many times the computation's time a step takes, and a sentence for each thing that costs time.

    A GPU's collectives run while it computes, so the slower of the two counts. On a CPU, which has no second stream,
    one comes after the other. Offload comes on top of either.
    """
    computing = step.flops_per_weight * step.parameters * step.tokens_per_device / flops_per_second
    sending, copying = collective_seconds(step, device), offload_seconds(step)
    reasons: list[str] = []
    if device.kind == "cpu":
        reasons += _between_cpus(step, sending, computing)
    elif sending > computing:
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
    together = computing + sending if device.kind == "cpu" else max(computing, sending)
    return (together + copying) / computing, tuple(reasons)


def collective_seconds(step: Step, device: Device) -> float:
    """Seconds in which each device sends and receives weights and gradients in one optimizer step; 0 over a link of
    which no speed is known."""
    bandwidth = _bandwidth(step, device)
    if step.zero_stage is None or step.workers == 1 or bandwidth is None:
        return 0.0
    efficiency = GLOO_EFFICIENCY if device.kind == "cpu" else COLLECTIVE_EFFICIENCY
    return sent_bytes(step, device) / (efficiency * bandwidth * 1e9)


def sent_bytes(step: Step, device: Device) -> float:
    """Bytes that each device sends, and receives, in one optimizer step, as DeepSpeed 0.19.8 does it (its source;
    counted at the network cards of two hosts by `make bench`).

    ZeRO-3 gathers the weights for the forward and again for the backward pass and scatters the gradients, for every
    micro-batch; between CPUs gloo sums all gradients for that, which sends them twice. Stages 0 to 2 all-reduce the
    gradients, which sends each twice: stage 2 those of every micro-batch, the others their sum. Stages 1 and 2 gather
    the weights after the step. Counted are as many weights as fit into a device: of a larger model each holds a part.
    """
    if step.zero_stage is None:
        return 0.0
    if step.zero_stage == 3:
        sums_all = step.element_bytes * step.trainable if device.kind == "cpu" else 0.0
        sent = step.accumulation * (step.bytes_per_weight * step.parameters + sums_all)
    else:
        reduced = 2 * (step.accumulation if step.zero_stage == 2 else 1)
        gathered = 1 if step.zero_stage else 0
        sent = (reduced + gathered) * step.element_bytes * _held(step, device)
    return sent * (1 - 1 / step.workers)


def _held(step: Step, device: Device) -> float:
    """Trained weights that a device holds whole."""
    if device.kind == "cpu" or step.zero_stage is None:
        return step.trainable
    return min(step.trainable, device.memory_gib * 2**30 / _STATES_BYTES[step.zero_stage])


def _bandwidth(step: Step, device: Device) -> float | None:
    """GB/s of the slowest link between the workers, for one device; None where no speed is known."""
    return device.node_gb_s if step.nodes == 1 else step.network_gb_s or device.network_gb_s


def _between_cpus(step: Step, sending: float, computing: float) -> Iterator[str]:
    if step.nodes == 1 or step.workers == 1:
        return
    if sending == 0:
        yield (
            f"communication: what {step.nodes} nodes send each other is not counted, since nothing says how fast their "
            "network is; resources.network_gbit does"
        )
    else:
        yield (
            f"communication: ZeRO-{step.zero_stage} sends for {sending:.2g} s a step, beside {computing:.2g} s of "
            "computation; more tokens a step would make it count for less"
        )


def offload_seconds(step: Step) -> float:
    """Seconds that offload adds to an optimizer step; a rule of thumb that hides none of it behind computation.

    `optimizer`: gradients go down and new weights come up, 2 bytes each, and the host's cores do Adam's step; `all`:
    weights also come up for both passes of every micro-batch.
    """
    if step.offload == "none":
        return 0.0
    moved = 4 * step.trainable + (4 * step.parameters * step.accumulation if step.offload == "all" else 0)
    return moved / step.workers / (PCIE_GB_S * 1e9) + step.trainable / step.nodes * HOST_ADAM_SECONDS_PER_WEIGHT
