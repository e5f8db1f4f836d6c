"""A wish for GPUs -> a cluster file that has them: the shipped file of a provider with its sizes set.

The shipped files are the one place for everything else, so that a rendered file is as true as they are. Called by
`orchestrator cluster render`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster_files.machine_types import Cloud, Machines, choose_machines, gpus_of_a_node
from orchestrator.cluster_files.patching import patch
from orchestrator.cluster_files.shipped import SHIPPED, shipped_text
from orchestrator.cluster_files.skypilot_checks import SKYPILOT_NAMES
from orchestrator.errors import SpecError
from orchestrator.planning.growth import ACCELERATOR
from orchestrator.planning.hardware import CPUS_PER_REQUESTED_GPU, Device, find_device
from orchestrator.quantities import MOST_WORKERS

CPUS_LEFT = 4
"""Cores of a machine that a GPU pod leaves to Kubernetes: a guess."""
_QUEUED_JOB = "python -m jobs.pretrain --config configs/pretrain/demo.yaml"
_CLOUDS: dict[str, Cloud] = {"aws": "aws", "gcp": "gcp", "azure": "azure"}
_WORKERS = "available_node_types.gpu_workers"
_TYPE_PATHS: dict[Cloud, str] = {
    "aws": f"{_WORKERS}.node_config.InstanceType",
    "gcp": f"{_WORKERS}.node_config.machineType",
    "azure": f"{_WORKERS}.node_config.azure_arm_parameters.vmSize",
}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A file and what it is."""

    text: str
    summary: str
    """`2 x p5.48xlarge (8 H100-80GB)`."""


def render(provider: str, *, gpu: str, gpus: int) -> Rendered:
    """The provider's shipped file with so many of a GPU at most.

    Raises SpecError for an unknown provider or device, a number that is none, and a cloud without such machines.
    """
    if provider not in SHIPPED:
        raise SpecError(
            "no cluster file is shipped for this provider", got=f"--provider {provider}", allowed=", ".join(SHIPPED)
        )
    if not 1 <= gpus <= MOST_WORKERS:
        raise SpecError("this is no number of GPUs", got=f"--gpus {gpus}", allowed=f"1 to {MOST_WORKERS}")
    device = find_device(gpu)
    if device.kind != "gpu":
        raise SpecError("this device is no GPU", got=f"--gpu {gpu} ({device.kind})", allowed="a GPU of the catalogue")
    if provider in _CLOUDS:
        machines = choose_machines(_CLOUDS[provider], gpu=gpu, gpus=gpus)
        values, summary = (
            _cloud_values(machines),
            _named(machines.count, machines.type.name, machines.type.gpus, device),
        )
    else:
        each = min(gpus, gpus_of_a_node(device))
        count = math.ceil(gpus / each)
        values, summary = _own_values(provider, device, each, count), _named(count, "machine", each, device)
    return Rendered(text=_with_head(patch(shipped_text(provider), values), provider, summary), summary=summary)


def _named(count: int, machine: str, each: int, device: Device) -> str:
    return f"{count} x {machine} ({each} {device.name})"


def _cloud_values(machines: Machines) -> dict[str, Any]:
    kind = machines.type
    values: dict[str, Any] = {
        "max_workers": machines.count,
        "upscaling_speed": float(machines.count),
        f"{_WORKERS}.max_workers": machines.count,
        _TYPE_PATHS[kind.cloud]: kind.name,
    }
    if kind.cloud != "aws":  # whose provider looks it up
        values[f"{_WORKERS}.resources"] = {"CPU": kind.cpus, "GPU": kind.gpus, f"{ACCELERATOR}{kind.device}": 1}
    return values


def _own_values(provider: str, device: Device, each: int, count: int) -> dict[str, Any]:
    """Of providers that sell no machine types of their own: machines of `each` GPUs."""
    if provider == "on-premises":
        names = [f"EDIT_WORKER_ADDRESS_{number}" for number in range(1, count + 1)]
        return {"provider.worker_ips": names}
    if provider == "skypilot":
        name = SKYPILOT_NAMES.get(device.name, device.name)
        return {"num_nodes": count, "resources.accelerators": f"{name}:{each}"}
    cluster = "spec" if provider == "kubernetes" else "spec.rayClusterSpec"
    group = f"{cluster}.workerGroupSpecs.0"
    cpus = max(1, each * CPUS_PER_REQUESTED_GPU - CPUS_LEFT)
    amounts = {"cpu": str(cpus), "memory": f"{math.floor(each * device.host_gib)}Gi", "nvidia.com/gpu": each}
    container = f"{group}.template.spec.containers.0.resources"
    values: dict[str, Any] = {
        "metadata.annotations.orchestrator/gpu": device.name,
        f"{group}.rayStartParams.resources": json.dumps(json.dumps({f"{ACCELERATOR}{device.name}": 1})),
        f"{group}.maxReplicas": count,
        f"{container}.limits": amounts,
        f"{container}.requests": amounts,
    }
    if provider == "kubernetes-kueue":  # admitted whole
        values |= {f"{group}.replicas": count, f"{group}.minReplicas": count}
        values["spec.entrypoint"] = f"{_QUEUED_JOB} resources.workers={count * each}"
    return values


def _with_head(text: str, provider: str, summary: str) -> str:
    """The file named for what it has, and its commands with a name that does not hide the shipped file."""
    own = f"{provider}.local.yaml"
    return f"# {summary} at most. Save it as {own} in the project's folder.\n" + text.replace(
        f"cluster/{SHIPPED[provider]}", own
    )
