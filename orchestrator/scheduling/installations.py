"""What the nodes of a shared cluster have, asked while the data is prepared, and held against what a training takes
before workers start. On a private Ray all processes are of one installation, and nothing is asked.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import locations
from orchestrator.errors import ClusterError, StorageError
from orchestrator.planning.run_plan import RunPlan
from orchestrator.samples.prepare import PreparedData
from orchestrator.scheduling.decisions.alike import Needs, Node, differences, full_disks, without_compiler
from orchestrator.spec import RunSpec

PACKAGES = ("orchestrator", "torch", "deepspeed", "transformers")
"""What a worker cannot do without, or computes other figures with. Ray itself compares its own version and Python's."""
_PATIENCE_S = 15.0
"""For a process to start on each node and look (1 to 3 s). A silent node is let be: its workers will say more."""


class Installations:
    """The nodes' answers."""

    def __init__(self) -> None:
        """Asks all nodes that may get workers; answers come while the caller goes on. The driver's own, which this
        process can see itself, is not: a process of a submitted job takes seconds to start there."""
        nodes = [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & node["Resources"].keys()]
        here = ray.get_runtime_context().get_node_id()
        self._asked = {_ask(node["NodeID"]): _named(node) for node in nodes if node["NodeID"] != here}
        self._own = next((_named(node) for node in nodes if node["NodeID"] == here), None)
        self._found: dict[str, Node] | None = None

    def refuse_unfit(self, needs: Needs) -> None:
        """Raises ClusterError where a node has other packages than this process, or lacks a compiler that is needed,
        and StorageError where a disk of one has too little room."""
        own = Node(**_look()(PACKAGES, str(locations.home())))
        if self._found is None:
            self._found = self._answers() | ({} if self._own is None else {self._own: own})
        installed = {name: node.installed for name, node in self._found.items()}
        if (odd := differences(own.installed, installed)) is not None:
            raise ClusterError(
                "nodes of the cluster have other packages than the driver",
                got=odd,
                do="install the same on all: `make wheel`, then `ray up` again, or one image for all",
            )
        if (full := full_disks(needs, self._found)) is not None:
            raise StorageError(
                "nodes of the cluster have no room for this training on their disks",
                got=full,
                do="free some there, or set ORCHESTRATOR_HOME, and --temp-dir of `ray start`, to larger disks",
            )
        if (bare := without_compiler(needs, self._found)) is not None:
            raise ClusterError(
                "DeepSpeed builds its optimizer for offloaded states on each node, and some cannot",
                got=bare,
                do="`apt-get install g++` there or in the image, or set deepspeed.offload=none",
            )

    def _answers(self) -> dict[str, Node]:
        if not self._asked:
            return {}
        try:
            ready, late = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=_PATIENCE_S)
            for answer in late:
                ray.cancel(answer, force=True)
            return {self._asked[answer]: Node(**ray.get(answer)) for answer in ready}
        except RayError:  # a node that goes is no reason to refuse the others
            return {}


def needs_of(spec: RunSpec, plan: RunPlan, data: PreparedData) -> Needs:
    """What a training takes on each node; a checkpoint passes through its disk on the way to a bucket."""
    return Needs(
        data={
            folder.name: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            for folder in data.folders
        },
        scratch=plan.checkpoint_bytes if spec.checkpoint.in_a_bucket else 0,
        compiles=plan.offload != "none",
    )


@functools.cache
def _of_cluster(gcs_address: str) -> Installations:
    return Installations()


def ask_nodes_what_they_have() -> Installations | None:
    """Asks once for each driver; None on a private Ray."""
    return _of_cluster(ray.get_runtime_context().gcs_address) if os.environ.get("RAY_ADDRESS") else None


def _ask(node_id: str) -> ray.ObjectRef:
    task = ray.remote(num_cpus=0, max_retries=0)(_look())
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return task.options(scheduling_strategy=where).remote(PACKAGES, str(locations.home()))


def _named(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _look() -> Callable[[tuple[str, ...], str], dict[str, Any]]:
    """A function that is sent whole, for the fields of `Node`: one without this package must be able to say so.

    Prepared data arrives at the path that it has on the driver's machine (`data_shipping`).
    """

    def free(folder: str) -> int:
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return shutil.disk_usage(folder).free

    def look(packages: tuple[str, ...], home: str) -> dict[str, Any]:
        found: dict[str, str | None] = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
        for name in packages:
            try:
                found[name] = metadata.version(name).partition("+")[0]  # a head without a GPU has torch's CPU build
            except metadata.PackageNotFoundError:
                found[name] = None
        data, temp = os.path.join(home, "cache", "data"), tempfile.gettempdir()
        compilers = (name for name in (os.environ.get("CXX"), "c++", "g++") if name)
        return {
            "installed": found,
            "home": home,
            "home_free": free(home),
            "temp": temp,
            "temp_free": free(temp),
            "prepared": tuple(os.listdir(data)) if os.path.isdir(data) else (),
            "has_compiler": any(shutil.which(name) for name in compilers),
        }

    return look
