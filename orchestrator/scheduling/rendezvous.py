"""Ray Train with what a run here needs of it: workers, and where they meet; the engine joins the process group itself.

Ray's own TorchConfig imports torch into the driver and the controller (2.5 s each); this does not.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """A DataParallelTrainer that starts no process for Ray Data, and on a private Ray none that outlives a driver.

    Each of Ray Train's helper actors is a Python process that imports Ray Train, 2.5 to 3 s of a core before the first
    step and beside the first steps: on a small machine that is what a user waits for.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded: tuple[type, ...] = (DatasetsCallback,)  # data comes from memory-mapped files
        if not os.environ.get("RAY_ADDRESS"):
            unneeded += (PlacementGroupCleanerCallback,)  # a Ray of our own ends with its driver, groups and all
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unneeded)]


@dataclass
class RendezvousConfig(BackendConfig):  # type: ignore[misc]
    """Selects `RendezvousBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend Ray Train instantiates in its controller."""
        return RendezvousBackend

    @property
    def framework(self) -> None:
        """No framework of Ray's list."""
        return None


class RendezvousBackend(Backend):  # type: ignore[misc]
    """Sets MASTER_ADDR, MASTER_PORT and the network interface on every worker before training starts."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Rank 0's address and a free port of its host go to all workers."""
        address, port = worker_group.execute_single(0, _address_and_port)
        worker_group.execute(_set_environment, address=address, port=port)


def _address_and_port() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _set_environment(*, address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    interface = _interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _interface_of(address: str) -> str | None:
    """The network interface that has an address; gloo otherwise guesses, and across hosts guesses wrong."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None
