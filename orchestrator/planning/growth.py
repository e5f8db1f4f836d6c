"""What an autoscaler could make of a cluster: its node types, read from a cluster file, added to the nodes there are.
Pure.

Comes in: the nodes that are up, with the types they were started as, and the cluster file's `available_node_types`.
Goes out: a `ClusterShape` for each kind of device that the cluster could have. Called by `scheduling`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import SpecError
from orchestrator.planning.hardware import catalogue_name, find_device
from orchestrator.planning.run_plan import ClusterShape, NodeShape

_GIB_PER_CPU = 4.0
"""Memory of a node whose type does not say: what general-purpose instances have per core (m7i, n2, D-series: 4 GiB)."""
_MOST_NODES = 1024
"""Nodes of one type that are planned with at most: a type without a limit has no last node."""
ACCELERATOR = "accelerator_type:"
"""Begins the resource by which Ray names the kind of a node's GPUs."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """One of the kinds of nodes that an autoscaler may start."""

    name: str
    shape: NodeShape
    accelerator: str | None
    """Ray's name of its GPUs; None where it has none, or does not say which."""
    at_most: int
    """How many there may be at a time, those that are up included."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an autoscaler may start."""

    types: tuple[NodeType, ...]
    at_most: int
    """Nodes of all types together, the head left out."""


@dataclass(frozen=True, kw_only=True)
class LiveNode:
    """A node that is up."""

    shape: NodeShape
    accelerator: str | None
    type_name: str | None
    """The node type that it was started as; None for one that no autoscaler started."""


def limits_of(cluster_file: Mapping[str, Any]) -> Limits:
    """What a cluster file lets the autoscaler start, with resources as Ray has filled them in.

    The head's own type is none of it, as are those switched off by `max_workers: 0`.
    """
    most = min(int(cluster_file.get("max_workers", _MOST_NODES)), _MOST_NODES)
    types = []
    for name, node_type in cluster_file.get("available_node_types", {}).items():
        resources = node_type.get("resources", {})
        at_most = min(most, int(node_type.get("max_workers", most)))
        if name == cluster_file.get("head_node_type") or at_most < 1:
            continue
        types.append(
            NodeType(name=name, shape=node_shape(resources), accelerator=accelerator_of(resources), at_most=at_most)
        )
    return Limits(types=tuple(types), at_most=most)


def named_machines(cluster_file: Mapping[str, Any]) -> int:
    """Machines that a cluster file names, the head counted; 0 where a cloud starts them."""
    provider = cluster_file.get("provider")
    if not isinstance(provider, Mapping) or provider.get("type") != "local":
        return 0
    return 1 + len(provider.get("worker_ips") or ())


def node_shape(resources: Mapping[str, float]) -> NodeShape:
    """A node of so much of Ray's `CPU`, `GPU` and `memory` (bytes)."""
    cpus = int(resources.get("CPU", 0))
    memory = resources.get("memory")
    return NodeShape(
        cpus=cpus,
        gpus=int(resources.get("GPU", 0)),
        memory_gib=_GIB_PER_CPU * cpus if memory is None else memory / 2**30,
    )


def accelerator_of(resources: Mapping[str, float]) -> str | None:
    """The name of a node's GPUs, from the resource that Ray or a cluster file gives it; None without.

    Of several the longest, which says most: Ray finds `A100` where a cluster file has `A100-40GB`.
    """
    names = sorted(name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR))
    return max(names, key=len, default=None)


def live_node(resources: Mapping[str, float], *, type_name: str | None = None) -> LiveNode:
    """A node from what Ray says it has."""
    return LiveNode(shape=node_shape(resources), accelerator=accelerator_of(resources), type_name=type_name)


def shape_of(nodes: Sequence[LiveNode]) -> ClusterShape:
    """The nodes as a cluster; where their GPUs differ, named after the first in the alphabet."""
    names = sorted(node.accelerator for node in nodes if node.shape.gpus and node.accelerator)
    return ClusterShape(nodes=tuple(node.shape for node in nodes), device_name=names[0] if names else "cpu")


def grown(nodes: Sequence[LiveNode], limits: Limits) -> tuple[ClusterShape, ...]:
    """What a cluster could become: a shape for each kind of GPU, the cheapest device first, or where none is named one
    of all its nodes. Empty where nothing can be added.

    Of several types that fit, the one with the most devices is added first. Each shape is a cluster that can be had;
    not all of them can at the same time.
    """
    types, at_most = limits.types, limits.at_most
    by_name = {node_type.name for node_type in types}
    standing = [node for node in nodes if node.type_name not in by_name]  # the head, and what was joined by hand
    kinds = sorted({one.accelerator for one in types if one.shape.gpus and one.accelerator}, key=_price)
    shapes = []
    for kind in kinds:
        fixed = [node for node in standing if not node.shape.gpus or node.accelerator == kind]
        some = [one for one in types if one.accelerator == kind or not one.shape.gpus]
        added = _added(sorted(some, key=lambda one: -one.shape.gpus), at_most)
        shapes.append(ClusterShape(nodes=tuple(node.shape for node in fixed) + added, device_name=kind))
    if kinds or not types:
        return tuple(shapes)
    cores = _added(sorted(types, key=lambda one: -one.shape.cpus), at_most)
    name = shape_of(standing).device_name
    return (ClusterShape(nodes=tuple(node.shape for node in standing) + cores, device_name=name),)


def pinned(limits: Limits | None, device_name: str) -> dict[str, float]:
    """What a worker's request holds besides cores and GPUs, so that nodes of the planned device come: a sliver of the
    resource that names it. Nothing where only one kind of GPU could come, or none of that device.

    A thousandth is what Ray itself asks for by `accelerator_type` (ray.air.config, 2.60.0).
    """
    named = [] if limits is None else [one.accelerator for one in limits.types if one.shape.gpus and one.accelerator]
    fitting = sorted({name for name in named if catalogue_name(name) == device_name})
    return {f"{ACCELERATOR}{fitting[0]}": 0.001} if fitting and len({*named}) > 1 else {}


def _added(types: Sequence[NodeType], at_most: int) -> tuple[NodeShape, ...]:
    """As many of each as may be, in their order, until there are `at_most`."""
    shapes: list[NodeShape] = []
    for node_type in types:
        shapes += [node_type.shape] * min(node_type.at_most, at_most - len(shapes))
    return tuple(shapes)


def _price(accelerator: str) -> tuple[float, str]:
    """USD per hour as the catalogue has it; what it does not know comes last."""
    try:
        price = find_device(accelerator).usd_per_hour
    except SpecError:
        price = None
    return (float("inf") if price is None else price, accelerator)
