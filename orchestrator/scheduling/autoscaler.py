"""The cluster's autoscaler: what it may start, what it is doing, and asking it for nodes.

A request is a placement group of the workers' bundles: unlike `request_resources`, of which a cluster keeps only the
newest, each driver has its own, it ends with its driver, and Ray holds what comes for whoever asked.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster_files.kubernetes_checks import autoscaling_config
from orchestrator.planning.growth import Limits, limits_of, named_machines

_HEAD = "node:__internal_head__"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where Kubernetes tells a pod its namespace."""
_PATIENCE_S = 20.0
"""For a process to start on the head and look (a few seconds where Ray has one waiting)."""
_ASK_S = 5.0
"""For the autoscaler's state, which comes from the head's memory."""
_HOLD_S = 3.0
"""For Ray to set free resources aside: it tries anew once a second where they came only now."""


def limits(gcs_address: str) -> Limits | None:
    """What the connected cluster's autoscaler may start; None without an autoscaler, or where its file is not found."""
    found = _file(gcs_address)
    return None if found is None else limits_of(found)


def machines_named(gcs_address: str) -> int:
    """Machines that the connected cluster's file names; 0 where it names none, or is not found."""
    found = _file(gcs_address)
    return 0 if found is None else named_machines(found)


@functools.cache
def _file(gcs_address: str) -> dict[str, Any] | None:
    """The connected cluster's file. It is looked for once: it does not change while a driver is connected.

    No interface of Ray says it (`get_cluster_config` is empty, Ray 2.60.0), but the file that the autoscaler was
    started with does, and under KubeRay the cluster's own resource. Both are within reach of the head, where the driver
    of a submitted job runs too.
    """
    found = cluster_file(gcs_address) or _kuberay_file()
    if found is None and (head := _head_elsewhere()) is not None:
        place = NodeAffinitySchedulingStrategy(head, soft=False)
        task = (
            ray.remote(num_cpus=0, max_retries=0)(cluster_file).options(scheduling_strategy=place).remote(gcs_address)
        )
        with suppress(ray.exceptions.RayError):
            found = ray.get(task, timeout=_PATIENCE_S)
    return found


def cluster_file(gcs_address: str) -> dict[str, Any] | None:
    """The cluster file that a cluster's autoscaler on this machine was started with; None where there is none."""
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if f"--gcs-address={gcs_address}" not in arguments:
            continue
        for argument in arguments:
            if argument.startswith("--autoscaling-config="):
                with suppress(OSError, yaml.YAMLError):
                    return dict(yaml.safe_load(Path(argument.split("=", 1)[1]).expanduser().read_text()))
    return None


def _kuberay_file() -> dict[str, Any] | None:
    """The same, made from the RayCluster of this pod; None outside of KubeRay, and where it may not be read."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    if name is None or not _NAMESPACE_FILE.is_file():
        return None
    with suppress(Exception):  # a training is then planned for the pods that are up
        from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

        client = KubernetesHttpApiClient(namespace=_NAMESPACE_FILE.read_text().strip())
        return autoscaling_config(client.get(f"rayclusters/{name}")["spec"])
    return None


def _head_elsewhere() -> str | None:
    """Ray's id of the head's node, unless this process is on it."""
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    here = ray.get_runtime_context().get_node_id()
    return heads[0] if heads and here not in heads else None


def types_of_nodes() -> dict[str, str]:
    """Node types by Ray's node id, of the nodes that the autoscaler has started; empty where it does not say."""
    status = _status()
    nodes = [] if status is None else [*status.active_nodes, *status.idle_nodes]
    return {node.node_id: node.ray_node_type_name for node in nodes if node.node_id and node.ray_node_type_name}


def doing() -> str | None:
    """What the autoscaler is doing about requests, in words; None where it says nothing."""
    status = _status()
    if status is None:
        return None
    launching: Counter[str] = Counter()
    for launch in status.pending_launches:
        launching[launch.ray_node_type_name] += launch.count
    starting = Counter(node.ray_node_type_name for node in status.pending_nodes)
    parts = [f"{count} {name} requested" for name, count in launching.items()]
    parts += [f"{count} {name} starting" for name, count in starting.items()]
    if status.failed_launches:
        last = max(status.failed_launches, key=lambda launch: launch.failed_ts_s or 0)
        parts.append(f"starting {last.ray_node_type_name} failed: {last.details or 'no reason given'}")
    return "; ".join(parts) or None


def _status() -> Any:
    """The autoscaler's state; None where it cannot be read: it says why a training waits, and decides nothing."""
    with suppress(Exception):
        return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=_ASK_S)
    return None


def selector_without(nodes: Collection[str]) -> dict[str, str]:
    """The label selector that keeps workers off some nodes, by Ray's ids."""
    return {"ray.io/node-id": f"!in({','.join(sorted(nodes))})"} if nodes else {}


def added_up(*holdings: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Resources by node id, added up."""
    total: dict[str, dict[str, float]] = {}
    for holding in holdings:
        for node, resources in holding.items():
            there = total.setdefault(node, {})
            for kind, amount in resources.items():
                there[kind] = there.get(kind, 0.0) + amount
    return total


class Request:
    """Resources asked for until they are there or given up."""

    def __init__(self) -> None:
        self._group: PlacementGroup | None = None
        self._bundles: tuple[dict[str, float], ...] = ()

    def ask(self, bundles: Sequence[Mapping[str, float]], *, without: Collection[str] = ()) -> None:
        """Asks for these, one for each worker, on nodes other than those; what was asked for before is let go."""
        wanted = tuple(dict(bundle) for bundle in bundles)
        if self._group is not None and wanted == self._bundles:
            return
        self.close()
        away = [selector_without(without)] * len(wanted)
        self._group = placement_group(list(wanted), strategy="PACK", bundle_label_selector=away)
        self._bundles = wanted

    def held(self) -> dict[str, dict[str, float]]:
        """What has come, by Ray's node id: nothing, or all of it."""
        if self._group is None:
            return {}
        row = placement_group_table(self._group)
        if row.get("state") != "CREATED":
            return {}
        return added_up(*({node: self._bundles[int(index)]} for index, node in row["bundles_to_node_id"].items()))

    def renew(self) -> None:
        """Has for a moment what was asked for and is free: to the autoscaler its nodes are idle only from then on.

        A node that stood idle for as long as it waited for the others is otherwise taken away at the first look after
        the request, seconds before the workers are there (seen on Ray 2.60.0, which looks every 5 s).
        """
        if self._group is not None:
            self._group.wait(_HOLD_S)
        self.close()

    def close(self) -> None:
        """Lets go of what was asked for, and of what has come."""
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._bundles = None, ()
