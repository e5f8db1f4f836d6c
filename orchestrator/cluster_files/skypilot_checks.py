"""Checks of a SkyPilot task: names of its fields, its GPUs by the device catalogue, and their price.

The fields are those of SkyPilot's documentation of its YAML, November 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.cluster_files.common_checks import unknown_fields
from orchestrator.cluster_files.findings import Price, Problem
from orchestrator.errors import SpecError
from orchestrator.planning.hardware import Device, find_device

_TASK = frozenset(
    [
        "name",
        "workdir",
        "num_nodes",
        "resources",
        "envs",
        "secrets",
        "file_mounts",
        "volumes",
        "setup",
        "run",
        "config",
        "service",
        "pool",
        "event_callback",
        "experimental",
        "inputs",
        "outputs",
    ]
)
_RESOURCES = frozenset(
    [
        "infra",
        "cloud",
        "region",
        "zone",
        "accelerators",
        "accelerator_args",
        "cpus",
        "memory",
        "instance_type",
        "use_spot",
        "disk_size",
        "disk_tier",
        "network_tier",
        "max_hourly_cost",
        "image_id",
        "ports",
        "labels",
        "any_of",
        "ordered",
        "job_recovery",
        "autostop",
        "local_disk",
        "priority",
        "_cluster_config_overrides",
    ]
)


SKYPILOT_NAMES = {
    "A100-40GB": "A100",
    "H100-80GB": "H100",
    "V100-16GB": "V100",
}
"""What SkyPilot calls a device, where it differs from the catalogue (`sky show-gpus`): its A100 has 40 GB."""


def task_problems(task: Mapping[str, Any]) -> Iterator[Problem]:
    """What SkyPilot would not know, and a GPU that no price and no plan is known of."""
    resources = task.get("resources")
    if not isinstance(resources, Mapping):
        yield Problem(at="resources", what="this is no mapping", got=str(resources), do="see cluster/skypilot.yaml")
        return
    what = "SkyPilot has no such field here"
    yield from unknown_fields(task, _TASK, what=what, at=lambda name: name)
    yield from unknown_fields(resources, _RESOURCES, what=what, at=lambda name: f"resources.{name}")
    if (name := _accelerator(task)[0]) and isinstance(_device(name), SpecError):
        yield Problem(
            at="resources.accelerators",
            what="this GPU is not in the device catalogue, so nothing can be planned or priced for it",
            got=name,
            do="correct it, or add it to configs/devices.yaml",
        )


def task_prices(task: Mapping[str, Any]) -> list[Price]:
    """What all nodes cost on demand, by their GPUs; nothing for a task without."""
    found = gpus_of(task)
    if found is None:
        return []
    device, count = found
    number, price = nodes(task), device.usd_per_hour
    return [
        Price(
            of="all nodes",
            machines=(f"{number} x {count} {device.name}",),
            usd_per_hour=None if price is None else round(number * count * price, 2),
            why_not=None if price is not None else f"the catalogue has no price of {device.name}",
        )
    ]


def nodes(task: Mapping[str, Any]) -> int:
    """How many nodes a task takes."""
    number = task.get("num_nodes")
    return number if isinstance(number, int) else 1


def gpus_of(task: Mapping[str, Any]) -> tuple[Device, int] | None:
    """(device, how many a node has); None without, or where it is not in the catalogue."""
    name, count = _accelerator(task)
    device = _device(name) if name else None
    return (device, count) if isinstance(device, Device) else None


def _accelerator(task: Mapping[str, Any]) -> tuple[str, int]:
    """(name, count of a node) of `H100:8`, or of the first of a mapping or list; an empty name where there is none."""
    resources = task.get("resources")
    wanted = (resources.get("accelerators") if isinstance(resources, Mapping) else None) or ""
    if isinstance(wanted, Mapping):
        first = ":".join(str(part) for part in next(iter(wanted.items())))
    else:
        first = wanted[0] if isinstance(wanted, list) else wanted
    name, _, count = str(first).partition(":")
    return name, int(count) if count.isdigit() else 1


def _device(name: str) -> Device | SpecError:
    ours = {theirs: own for own, theirs in SKYPILOT_NAMES.items()}
    try:
        return find_device(ours.get(name, name))
    except SpecError as error:
        return error
