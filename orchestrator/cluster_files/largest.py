"""A cluster file -> the clusters that it can grow into, to plan for before any node is up. No cloud is asked.

What a machine type has is this project's own list (`machine_types`), where the file leaves it to Ray to look up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.cluster_files import kubernetes_checks, skypilot_checks
from orchestrator.cluster_files.launcher_checks import machine_type_of
from orchestrator.cluster_files.machine_types import MachineType, find_machine_type
from orchestrator.errors import SpecError, one_line
from orchestrator.planning.growth import ACCELERATOR, grown, limits_of
from orchestrator.planning.hardware import requested_cluster
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.yaml_file import read_yaml

_GIB = 1 << 30


def largest_clusters(path: Path) -> tuple[ClusterShape, ...]:
    """Each as large as the file allows, one for each kind of GPU that it has, the cheapest first; the head left out.

    Raises SpecError for a file that cannot be read, or does not say what its machines have.
    """
    if not path.is_file():
        raise SpecError("there is no such cluster file", got=path, do="give the path of one; cluster/ holds some")
    content = read_yaml(path)
    kind, provider = content.get("kind"), content.get("provider")
    if "run" in content and "resources" in content:
        return (_sky(content, path),)
    if kind in ("RayCluster", "RayJob"):
        limits = limits_of(_kubernetes(content, path))
    elif isinstance(provider, Mapping) and isinstance(content.get("available_node_types"), Mapping):
        limits = limits_of(_with_resources(content, str(provider.get("type")), path))
    else:
        raise _unsaid(path, "it has no available_node_types")
    return grown((), limits)


def _with_resources(content: Mapping[str, Any], cloud: str, path: Path) -> dict[str, Any]:
    """The file with the resources that Ray fills in from the cloud's list; what the file says goes before it."""
    types: dict[str, Any] = {}
    for name, each in content["available_node_types"].items():
        given = dict(each.get("resources") or {})
        machine = machine_type_of(cloud, each.get("node_config") or {})
        known = find_machine_type(cloud, machine or "")
        if known is None and name != content.get("head_node_type") and not given:
            raise _unsaid(path, f"the machine type {machine} of {name} is not in this project's table")
        types[name] = {**each, "resources": ({} if known is None else _resources(known)) | given}
    return {**content, "available_node_types": types}


def _resources(machine: MachineType) -> dict[str, float]:
    found: dict[str, float] = {"CPU": machine.cpus, "memory": machine.memory_gib * _GIB}
    return found | ({"GPU": machine.gpus, f"{ACCELERATOR}{machine.device}": 1} if machine.gpus else {})


def _kubernetes(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    spec = content.get("spec") or {}
    cluster = spec if content.get("kind") == "RayCluster" else spec.get("rayClusterSpec") or {}
    try:
        return kubernetes_checks.autoscaling_config(cluster)
    except Exception as error:  # what `cluster check` finds, with its place
        raise _unsaid(path, one_line(error) or type(error).__name__) from error


def _sky(content: Mapping[str, Any], path: Path) -> ClusterShape:
    gpus = skypilot_checks.gpus_of(content)
    if gpus is None:
        raise _unsaid(path, "its resources name no GPU of the catalogue")
    device, each = gpus
    return requested_cluster(device.name, each * skypilot_checks.nodes(content), skypilot_checks.nodes(content))


def _unsaid(path: Path, why: str) -> SpecError:
    return SpecError(
        "the cluster file does not say what its machines have",
        got=f"{path}: {why}",
        do="`orchestrator cluster check` says what is wrong with it; or plan with --gpu NAME --gpus N",
    )
