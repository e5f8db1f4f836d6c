"""What is installed on the nodes of a shared cluster, asked while the data is prepared, and compared before workers
start. On a private Ray all processes are of one installation, and nothing is asked.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import ClusterError
from orchestrator.scheduling.decisions.alike import Installed, differences

PACKAGES = ("orchestrator", "torch", "deepspeed", "transformers")
"""What a worker cannot do without, or computes other figures with. Ray itself compares its own version and Python's."""
_PATIENCE_S = 15.0
"""For a process to start on each node and look (1 to 3 s). A silent node is let be: its workers will say more."""


class Installations:
    """The nodes' answers."""

    def __init__(self) -> None:
        """Asks all nodes that may get workers; answers come while the caller goes on."""
        nodes = [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & node["Resources"].keys()]
        self._asked = {_ask(node["NodeID"]): _named(node) for node in nodes}
        self._is_checked = False

    def refuse_others(self) -> None:
        """Raises ClusterError where a node has other packages than this process."""
        if self._is_checked:
            return
        self._is_checked = True
        found: dict[str, Installed] = {}
        try:
            ready, late = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=_PATIENCE_S)
            for answer in late:
                ray.cancel(answer, force=True)
            found = {self._asked[answer]: ray.get(answer) for answer in ready}
        except RayError:  # a node that goes is no reason to refuse the others
            return
        if (odd := differences(_look()(PACKAGES), found)) is not None:
            raise ClusterError(
                "nodes of the cluster have other packages than the driver",
                got=odd,
                do="install the same on all: `make wheel`, then `ray up` again, or one image for all",
            )


@functools.cache
def _of_cluster(gcs_address: str) -> Installations:
    return Installations()


def ask_nodes_what_they_have() -> Installations | None:
    """Asks once for each driver; None on a private Ray."""
    return _of_cluster(ray.get_runtime_context().gcs_address) if os.environ.get("RAY_ADDRESS") else None


def _ask(node_id: str) -> ray.ObjectRef:
    task = ray.remote(num_cpus=0, max_retries=0)(_look())
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(PACKAGES)


def _named(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _look() -> Callable[[tuple[str, ...]], dict[str, str | None]]:
    """A function that is sent whole: a node without this package must be able to say so."""

    def look(packages: tuple[str, ...]) -> dict[str, str | None]:
        found: dict[str, str | None] = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
        for name in packages:
            try:
                found[name] = metadata.version(name).partition("+")[0]  # a head without a GPU has torch's CPU build
            except metadata.PackageNotFoundError:
                found[name] = None
        return found

    return look
