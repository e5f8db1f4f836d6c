"""`cluster/node/tracking.sh`: the MLflow server that a cluster file asks for with MLFLOW_TRACKING_URI=head."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.tracking import store

CLUSTER = Path(__file__).parents[1] / "cluster"
HEAD = "127.77.0.5"
"""A head's address that nobody else on this machine uses."""
PASSWORD = "the password of ana"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A head's home folder, as the cluster file leaves it."""
    (tmp_path / "orchestrator").mkdir()
    for script in (*CLUSTER.glob("node/*.sh"), CLUSTER / "tracking-server.sh"):
        shutil.copy(script, tmp_path / "orchestrator")
    (tmp_path / "orchestrator.head").write_text(f"HEAD_IP={HEAD}\n")
    (tmp_path / "orchestrator.names").write_text(f"MLFLOW_TRACKING_URI=head\nVENV={sys.prefix}\n")
    return tmp_path


def start(node: Path) -> subprocess.CompletedProcess[str]:
    """What `ray up` calls on the head, once Ray runs."""
    command = ["bash", str(node / "orchestrator" / "tracking.sh")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(node)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)


@pytest.fixture
def ray_head() -> Iterator[socket.socket]:
    """What stands for Ray: its port answers."""
    with socket.create_server((HEAD, 6379)) as listener:
        yield listener


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HEAD, port)) == 0


def test_nothing_starts_where_the_file_names_another_server_or_none(node: Path) -> None:
    for uri in ("", "http://somewhere:5000"):
        (node / "orchestrator.names").write_text(f"MLFLOW_TRACKING_URI={uri}\nVENV={sys.prefix}\n")
        assert (start(node).returncode, answers(5000)) == (0, False)


def test_a_server_without_a_name_and_a_password_is_refused_with_the_way_out(node: Path) -> None:
    done = start(node)
    assert done.returncode == 1
    assert "export MLFLOW_TRACKING_USERNAME=..." in done.stderr
    assert "~/orchestrator.secrets" in done.stderr


def test_every_node_of_the_cluster_is_led_to_the_server_on_the_head(node: Path) -> None:
    script = f". {node}/orchestrator/env.sh; echo $MLFLOW_TRACKING_URI"
    environment = {"PATH": os.environ["PATH"], "HOME": str(node)}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"http://{HEAD}:5000\n"


@pytest.mark.slow
def test_the_server_asks_for_a_password_and_ends_with_ray(
    node: Path, ray_head: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "MLFLOW_TRACKING_USERNAME": "ana",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{node}/runs.db",  # a database elsewhere
        "HOST": HEAD,
    }
    (node / "orchestrator.secrets").write_text("".join(f"export {k}='{v}'\n" for k, v in secrets.items()))
    done = start(node)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ana")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    store.check_store(f"http://{HEAD}:5000")
    assert start(node).returncode == 0, "another `ray up` lets it run on"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another password")
    with pytest.raises(StorageError, match="401"):
        store.check_store(f"http://{HEAD}:5000")

    ray_head.close()
    deadline_s = time.monotonic() + 60
    while answers(5000):
        assert time.monotonic() < deadline_s, (node / "orchestrator-tracking.log").read_text()
        time.sleep(0.2)
    assert PASSWORD not in (node / "orchestrator-tracking.log").read_text()
