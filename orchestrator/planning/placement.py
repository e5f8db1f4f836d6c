"""Where the workers of a training go: their device, room for them on the cluster, its price, and the number format.

Comes in: a spec and a `ClusterShape`. Goes out: a `Site`. Called by `plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from orchestrator.errors import CapacityError, SpecError
from orchestrator.planning.hardware import Device, find_device
from orchestrator.planning.run_plan import ClusterShape, NodeShape

if TYPE_CHECKING:  # it takes 0.2 s to load, which `estimate` need not wait for
    from orchestrator.spec import RunSpec

USABLE_DEVICE_MEMORY = 0.92
"""Share of a GPU's nominal memory for training: a guess; drivers and allocators keep some, as on an 80 GB card."""
USABLE_HOST_MEMORY = 0.8
"""Share of a node's memory for its workers: a guess; the system and Ray's own processes take the rest."""

ChosenPrecision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where the workers go, and what each has there."""

    device: Device
    workers: int
    nodes: int
    """Machines that the workers are on when each is filled before the next one is used."""
    gpus_per_worker: int
    capacity_gib: float
    """Memory a worker may use on its device; on a CPU, its share of the node."""
    host_gib: float
    """A worker's share of its node's memory, for what is offloaded."""
    usd_per_device_hour: float | None
    """None where no price is known."""
    reason: str
    network_gb_s: float | None = None
    """GB/s from one device to other nodes: its share of `resources.network_gbit`, None where that is not given."""


def worker_counts(spec: RunSpec, cluster: ClusterShape) -> tuple[int, ...]:
    """The numbers of workers to try: the one that is set; all of a range that split the batch, with room or without;
    or for `auto` all that have room and split the batch."""
    asked, training = spec.resources.workers, spec.training
    if isinstance(asked, int):
        return (asked,)
    if isinstance(asked, tuple):
        return tuple(training.workers_between(*asked))
    room = room_for_workers(
        cluster, gpus_per_worker=_gpus_per_worker(spec, cluster), cpus_per_worker=spec.resources.cpus_per_worker
    )
    return tuple(training.workers_between(1, room)) or (1,)


def room_for_workers(cluster: ClusterShape, *, gpus_per_worker: int, cpus_per_worker: int) -> int:
    """How many workers a cluster has room for, each on one node."""
    return sum(_slots(node, gpus_per_worker, cpus_per_worker) for node in cluster.nodes)


def place_sizes(spec: RunSpec, cluster: ClusterShape, sizes: tuple[int, ...]) -> tuple[dict[int, Site], int]:
    """The site of each size and the room there is; sizes without room lie on more nodes like those there are.

    Raises what `place_workers` raises, CapacityError when there is no room for the smallest.
    """
    per_worker = _gpus_per_worker(spec, cluster)
    cpus = spec.resources.cpus_per_worker
    room = room_for_workers(cluster, gpus_per_worker=per_worker, cpus_per_worker=cpus)
    largest = place_workers(spec, cluster, max([size for size in sizes if size <= room], default=sizes[0]))
    on_a_node = max(_slots(node, per_worker, cpus) for node in cluster.nodes)
    sites = {size: replace(largest, workers=size, nodes=-(-size // on_a_node)) for size in sizes if size > room}
    return {size: place_workers(spec, cluster, size) for size in sizes if size <= room} | sites, room


def place_workers(spec: RunSpec, cluster: ClusterShape, workers: int) -> Site:
    """The device of every worker and what it has there.

    Raises CapacityError when the workers have no room, and SpecError when a budget in usd meets no price.
    """
    resources = spec.resources
    per_worker = _gpus_per_worker(spec, cluster)
    device = find_device(cluster.device_name if per_worker else "cpu")
    if per_worker and device.kind != "gpu":
        raise SpecError(
            "the cluster has GPUs, but nothing says of which kind",
            got=cluster.device_name,
            do='give its nodes, or its node types, a resource such as "accelerator_type:L4": 1',
        )
    slots = [(node, _slots(node, per_worker, resources.cpus_per_worker)) for node in cluster.nodes]
    check_room(spec, cluster, workers, room=sum(count for _, count in slots), gpus_per_worker=per_worker)
    # A node takes as many workers as it has room for before the next one is used, so it is judged full.
    shares = [USABLE_HOST_MEMORY * node.memory_gib / min(count, workers) for node, count in slots if count]
    price, why_price = _price(spec, device)
    what = device.name if per_worker else f"the CPU, cpus_per_worker: {resources.cpus_per_worker}"
    return Site(
        device=device,
        workers=workers,
        nodes=_nodes_filled(workers, [count for _, count in slots]),
        gpus_per_worker=per_worker,
        capacity_gib=USABLE_DEVICE_MEMORY * device.memory_gib if per_worker else min(shares),
        host_gib=min(shares),
        usd_per_device_hour=price,
        reason=(
            f"workers: {workers} on {what} (gpus_per_worker: {resources.gpus_per_worker}; the cluster has "
            f"{cluster.gpus} GPUs and {cluster.cpus} CPU cores); {why_price}"
        ),
        network_gb_s=_share_of_network(spec, min(workers, max(count for _, count in slots))),
    )


def _share_of_network(spec: RunSpec, on_a_node: int) -> float | None:
    gbit = spec.resources.network_gbit
    return None if gbit is None else gbit / 8 / on_a_node


def _gpus_per_worker(spec: RunSpec, cluster: ClusterShape) -> int:
    asked = spec.resources.gpus_per_worker
    if asked == 1 and not cluster.gpus:
        raise CapacityError(
            "the spec asks for a GPU per worker, and the cluster has none",
            got="resources.gpus_per_worker: 1",
            allowed=f"{cluster.cpus} CPU cores on {len(cluster.nodes)} nodes",
            do="set resources.gpus_per_worker=auto to train on CPU cores, or join nodes with GPUs",
        )
    return (1 if cluster.gpus else 0) if asked == "auto" else asked


def _nodes_filled(workers: int, room: list[int]) -> int:
    """Nodes that so many workers take, the largest filled first."""
    nodes = 0
    for count in sorted(room, reverse=True):
        if workers <= 0:
            break
        nodes, workers = nodes + 1, workers - count
    return max(1, nodes)


def _slots(node: NodeShape, gpus_per_worker: int, cpus_per_worker: int) -> int:
    """Workers that a node has room for."""
    by_cpus = node.cpus // cpus_per_worker
    return min(node.gpus // gpus_per_worker, by_cpus) if gpus_per_worker else by_cpus


def check_room(spec: RunSpec, cluster: ClusterShape, workers: int, *, room: int, gpus_per_worker: int) -> None:
    """Raises CapacityError when there is room for fewer workers."""
    resources = spec.resources
    if workers <= room:
        return
    fewer = spec.training.workers_between(1, room)[-1:]
    asked = resources.workers
    ways = [f"resources.workers={f'[{n},{asked[1]}]' if isinstance(asked, tuple) else n}" for n in fewer]
    if resources.cpus_per_worker > 1:
        ways.append("a smaller resources.cpus_per_worker")
    if gpus_per_worker and resources.gpus_per_worker == "auto":
        ways.append("resources.gpus_per_worker=0 to train on CPU cores")
    each = f"{gpus_per_worker} GPU and " if gpus_per_worker else ""
    raise CapacityError(
        f"{workers} workers do not fit on the cluster, which has room for {room}",
        got=f"{workers} workers of {each}{resources.cpus_per_worker} CPU cores",
        allowed=f"{cluster.gpus} GPUs and {cluster.cpus} CPU cores on {len(cluster.nodes)} nodes",
        do=f"set {', or '.join(ways)}" if ways else "join more nodes",
    )


def _price(spec: RunSpec, device: Device) -> tuple[float | None, str]:
    """USD per device hour; on a CPU a device is a worker with its cores."""
    given = spec.resources.usd_per_device_hour
    if given is not None:
        return given, f"{given:g} usd per device hour as set"
    if device.usd_per_hour is not None:
        cores = spec.resources.cpus_per_worker if device.kind == "cpu" else 1
        return cores * device.usd_per_hour, f"{cores * device.usd_per_hour:g} usd per device hour from the catalogue"
    budget = spec.parsed_budget
    if budget is not None and budget.unit == "usd":
        raise SpecError(
            f"a budget in usd needs a price, and the catalogue has none for the {device.name}",
            got=f"budget: {budget}",
            do="set resources.usd_per_device_hour, or a budget in gpu-hours",
        )
    return None, f"no price is known for the {device.name}: resources.usd_per_device_hour sets one"


def choose_precision(spec: RunSpec, device: Device) -> tuple[ChosenPrecision, str]:
    """The number format and why; raises SpecError when the device or DeepSpeed cannot train in the one asked for."""
    asked = spec.training.precision
    if asked == "auto":
        if device.kind == "cpu":
            return "fp32", "precision: fp32; most CPUs only emulate 16 bits"
        if device.has_bf16:
            return "bf16", f"precision: bf16, which the {device.name} has: the range of fp32, no loss scaling"
        return "fp16", f"precision: fp16, because the {device.name} has no bf16"
    if asked == "fp16" and device.kind == "cpu":
        raise SpecError(
            "DeepSpeed trains in fp16 only on GPUs",
            got="training.precision: fp16 on a CPU",
            allowed="fp32, bf16, auto",
            do="set training.precision=auto",
        )
    if asked == "bf16" and device.kind == "gpu" and not device.has_bf16:
        raise SpecError(
            f"the {device.name} has no bf16",
            got="training.precision: bf16",
            allowed="fp16, fp32, auto",
            do="set training.precision=auto, which takes fp16 there",
        )
    slow = ", which is emulated on CPUs without AVX512-BF16 or AMX" if asked == "bf16" and device.kind == "cpu" else ""
    return asked, f"precision: {asked}, as set{slow}"
