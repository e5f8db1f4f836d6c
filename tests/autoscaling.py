"""A Ray cluster that scales: a head without cores, and an autoscaler that starts nodes as processes of this machine.

Ray's own stand-in for a cloud does the starting, as an external provider: `ray.cluster_utils.AutoscalingCluster` needs
a file that the wheel lacks, and ends every Ray of the machine (2.60.0).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from tests.mlflow_runs import free_port
from tests.ray_head import RAY, end_head

IDLE_S = 6.0
"""After which a node that nobody uses is taken away."""


@contextmanager
def scaling_cluster(node_types: Mapping[str, Mapping[str, Any]], *, max_workers: int) -> Iterator[str]:
    """The address of a cluster that begins with its head alone; all of its processes end with it."""
    with tempfile.TemporaryDirectory(prefix="scaling-", dir="/tmp") as folder:
        port = free_port()
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump(_cluster_file(node_types, max_workers=max_workers, port=port)))
        options = {
            "--port": port,
            "--num-cpus": 0,
            "--temp-dir": folder,
            "--object-store-memory": 100_000_000,
            "--include-dashboard": "false",
            "--autoscaling-config": file,
        }
        with (Path(folder) / "head.log").open("w") as log:
            process = subprocess.Popen(
                [*RAY, "start", "--head", "--block", *(f"{key}={value}" for key, value in options.items())],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "RAY_FAKE_CLUSTER": "1",
                    "RAY_enable_autoscaler_v2": "1",
                    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                    "RAY_AUTH_MODE": "disabled",
                },
            )
        try:
            yield _address(Path(folder), port)
        finally:
            end_head(process)


def _address(folder: Path, port: int) -> str:
    """Of the head, once it answers; Ray takes the machine's own address, whatever it is given."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        text = (folder / "head.log").read_text()
        if "Ray runtime started" in text:
            host = text.split("--address='")[1].split(":")[0]
            return f"{host}:{port}"
        time.sleep(0.2)
    raise TimeoutError((folder / "head.log").read_text())


def _cluster_file(node_types: Mapping[str, Mapping[str, Any]], *, max_workers: int, port: int) -> dict[str, Any]:
    commands = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "scaling",
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "auth": {},
        "max_workers": max_workers,
        "upscaling_speed": float(max_workers),
        "idle_timeout_minutes": IDLE_S / 60,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **one} for name, one in node_types.items()},
        },
        **{f"{name}_commands": [] for name in commands},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "no_restart": False,
    }


def alive_nodes(address: str) -> int:
    """How many nodes a cluster has, its head included."""
    nodes = GcsClient(address=address).get_all_node_info(timeout=10)
    return sum(node.state == GcsNodeInfo.ALIVE for node in nodes.values())
