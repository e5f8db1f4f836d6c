"""One Ray session for a command: the cluster that RAY_ADDRESS names, or a private one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import ray
from ray import JobID, PlacementGroupID
from ray._private import worker as ray_worker
from ray._private.state import state as _state
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from orchestrator.doctor.ray_address import SUBMIT, check_drives, check_ray_address
from orchestrator.errors import ClusterError, one_line
from orchestrator.planning.growth import Limits, LiveNode, grown, live_node, shape_of
from orchestrator.planning.hardware import local_cluster
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.runs.job import WORKER_ENVIRONMENT
from orchestrator.scheduling import autoscaler

_DRIVER_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; asking for it silences a warning
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker or a finished run is seen within half a second
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process less: the driver itself looks for nodes that will go
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers find what a spec names by a relative path where the driver found it
}

_PRIVATE_ENVIRONMENT: Mapping[str, str] = {
    # Ray runs workers at niceness 15, so anything else on the machine, its own helpers too, takes their core away.
    "RAY_worker_niceness": "0",
}
"""Environment of a Ray that this process starts."""


@contextmanager
def ray_session() -> Iterator[ClusterShape]:
    """Connects, or starts Ray here, and gives the cluster's shape; a cluster it started ends with it.

    Raises ClusterError when the cluster named by RAY_ADDRESS does not answer, or not to us, or Ray cannot start here;
    SpecError when it names a dashboard.
    """
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="ray")
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield live_shape()
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _probe(address)
    try:
        _connect(address)
    except Exception as error:  # Ray raises just that when a node is slow to start
        raise ClusterError(
            f"the Ray cluster at {address} does not answer" if address else "Ray cannot start on this machine",
            got=one_line(error),
            do=f"check RAY_ADDRESS, or unset it to run on this machine; {SUBMIT}"
            if address
            else "run `orchestrator doctor`",
        ) from error
    try:
        yield live_shape()
    finally:
        ray.shutdown()


def expected_shape() -> ClusterShape | None:
    """The shape that `ray_session` will give, where that is known without connecting: its own Ray on this machine."""
    return None if ray.is_initialized() or os.environ.get("RAY_ADDRESS") else local_cluster()


def _connect(address: str | None) -> None:
    ray_worker._worker_logs_enabled = (
        False  # Ray prints what it knows of a death on standard output; we say it ourselves
    )
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    for name, value in {**WORKER_ENVIRONMENT, **_PRIVATE_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    # A token of its own for each private Ray: else Ray writes one into the home folder, and every cluster started there
    # later asks its clients for it (2.60.0).
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    shape = local_cluster()
    ray.init(
        address="local",
        num_cpus=shape.cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=_short_temporary_folder(),
    )


def _probe(address: str) -> None:
    """Raises ClusterError when no cluster answers there or lets us in, for which Ray itself would take minutes, and
    SpecError when it is no address to drive a training at."""
    check_drives(address)
    finding = check_ray_address(address)
    if finding is not None and finding.status == "fail":
        raise ClusterError(f"the Ray cluster at {address} cannot be used", got=finding.detail, do=finding.remedy)


def _short_temporary_folder() -> str | None:
    """Ray's Unix sockets allow 107 bytes, so a long $TMPDIR is passed over; None is Ray's own default."""
    return None if len(tempfile.gettempdir()) < 40 else "/tmp/ray"


@contextmanager
def placement_groups_given_back() -> Iterator[None]:
    """Removes the placement groups that this driver's job has at the end and had not at the start.

    Those of a Train controller that was killed, or that failed to start its workers, hold cores until the job ends.
    """
    before = _own_groups()
    try:
        yield
    finally:
        for group in _own_groups() - before:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _own_groups() -> set[str]:
    """Ids in hex; the job's own id is the end of each."""
    job = ray.get_runtime_context().get_job_id()
    groups = placement_group_table().items()
    return {name for name, group in groups if name.endswith(job) and group["state"] != "REMOVED"}


def live_shape() -> ClusterShape:
    """The connected cluster, from what Ray says its nodes have, with what its autoscaler could make of it."""
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    found = limits()
    if found is None:
        return shape_of(_live_nodes(alive))
    nodes = _live_nodes(alive, autoscaler.types_of_nodes())
    return replace(shape_of(nodes), may_become=grown(nodes, found))


def can_grow() -> bool:
    """Whether the cluster has an autoscaler that may start nodes."""
    found = limits()
    return found is not None and bool(found.types)


def machines_to_come() -> int:
    """Machines that the connected cluster's file names and that have not joined yet; none on a private Ray."""
    if not os.environ.get("RAY_ADDRESS"):
        return 0
    named = autoscaler.machines_named(ray.get_runtime_context().gcs_address)
    return max(0, named - len([node for node in ray.nodes() if node["Alive"]]))


def limits() -> Limits | None:
    """What the connected cluster's autoscaler may start; a private Ray has none."""
    return autoscaler.limits(ray.get_runtime_context().gcs_address) if os.environ.get("RAY_ADDRESS") else None


def free_shape(*, held: Mapping[str, Mapping[str, float]], without: Collection[str] = ()) -> ClusterShape:
    """What a training may have: what is free on the nodes that stay, beside what it holds itself.

    `held` is resources by node id; `without` names nodes that are not to be used.
    """
    leaving = {*without, *draining_nodes()}
    free = _state.available_resources_per_node()
    nodes = {}
    for node in ray.nodes():
        name, total = node["NodeID"], node["Resources"]
        if node["Alive"] and name not in leaving:
            own = held.get(name, {})
            nodes[name] = total | {
                kind: free.get(name, {}).get(kind, 0.0) + own.get(kind, 0.0) for kind in ("CPU", "GPU")
            }
    return shape_of(_live_nodes(nodes))


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that will be taken away soon: preempted, idle for the autoscaler, or drained by hand."""
    return frozenset(_state.get_draining_nodes())


def nodes_of_workers() -> dict[str, int]:
    """How many Ray Train workers of this driver's job are on each node, by node id."""
    job = JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    actors = _state.actor_table(None, job, "ALIVE").values()
    return Counter(actor["Address"]["NodeID"] for actor in actors if "RayTrainWorker" in actor["ActorClassName"])


def _live_nodes(
    nodes: Mapping[str, Mapping[str, float]], types: Mapping[str, str] | None = None
) -> tuple[LiveNode, ...]:
    return tuple(live_node(resources, type_name=(types or {}).get(node_id)) for node_id, resources in nodes.items())


def worker_runtime_environment() -> dict[str, dict[str, str]]:
    """What Ray must set in workers' environments where they do not inherit this process's (a remote cluster)."""
    if not os.environ.get("RAY_ADDRESS"):
        return {}
    return {"env_vars": {**WORKER_ENVIRONMENT}}
