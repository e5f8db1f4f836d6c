"""Nodes with other packages than the driver are named before workers start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError
from orchestrator.scheduling import installations
from orchestrator.scheduling.decisions.alike import differences

OWN = {"python": "3.11", "torch": "2.13.0", "deepspeed": "0.19.8"}


def test_nodes_like_the_driver_are_no_matter() -> None:
    assert differences(OWN, {"a": dict(OWN), "b": dict(OWN)}) is None
    assert differences({**OWN, "orchestrator": None}, {"a": {**OWN, "orchestrator": None}}) is None


def test_what_differs_is_told_for_each_node() -> None:
    odd = differences(OWN, {"b": {**OWN, "torch": None}, "a": {**OWN, "deepspeed": "0.18.0"}, "c": dict(OWN)})
    assert odd == "a: deepspeed 0.18.0, the driver 0.19.8; b: no torch"


def test_of_many_nodes_some_are_named() -> None:
    odd = differences(OWN, {f"node{n}": {} for n in range(6)})
    assert odd is not None
    assert odd.startswith("node0: no python, no torch, no deepspeed; node1:")
    assert odd.endswith("; and 2 nodes more")


def test_a_node_looks_without_this_project(tmp_path: Path) -> None:
    """The function travels whole, and finds what is installed beside the interpreter that runs it."""
    from ray import cloudpickle

    (tmp_path / "torch-9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 9.9+cu130\n"
    )
    (tmp_path / "look").write_bytes(cloudpickle.dumps(installations._look()))
    code = (
        "import builtins, json, pickle, sys; sys.modules['orchestrator'] = None; from ray import cloudpickle; "
        "print(json.dumps(pickle.load(open(sys.argv[1], 'rb'))(('torch', 'no-such-package'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "look")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["torch"] == "9.9"
    assert found["no-such-package"] is None
    assert found["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.slow
def test_a_cluster_of_one_installation_is_let_be_and_another_one_is_refused(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installations.Installations().refuse_others()
    asked = installations.Installations()
    monkeypatch.setattr(installations, "_look", lambda: lambda packages: {"python": "3.99"})
    with pytest.raises(ClusterError, match="other packages than the driver") as refused:
        asked.refuse_others()
    assert "the driver 3.99" in str(refused.value.got)
    asked.refuse_others()  # asked and told once
