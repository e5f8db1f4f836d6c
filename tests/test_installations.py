"""Nodes that a training could not begin on are named before workers start, each with what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError, StorageError
from orchestrator.scheduling import installations
from orchestrator.scheduling.decisions.alike import Needs, Node, differences, full_disks, without_compiler

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


GB = 1_000_000_000
NODE = Node(
    installed=OWN,
    home="/home/me/.orchestrator",
    home_free=10 * GB,
    temp="/tmp",
    temp_free=10 * GB,
    prepared=(),
    has_compiler=False,
)
NOTHING = Needs(data={}, scratch=0, compiles=False)


def test_a_disk_with_room_for_the_data_and_for_checkpoints_on_their_way_is_no_matter() -> None:
    needs = Needs(data={"a": 4 * GB}, scratch=5 * GB, compiles=False)
    assert full_disks(needs, {"n": NODE}) is None
    told = full_disks(replace(needs, scratch=6 * GB), {"n": NODE})
    assert told == "n: 10.0 GB free in /home/me/.orchestrator, 10.2 GB needed"


def test_data_that_a_node_has_already_takes_no_more_room() -> None:
    needs = Needs(data={"a": 4 * GB, "b": GB}, scratch=0, compiles=False)
    tight = replace(NODE, home_free=2 * GB)
    assert full_disks(needs, {"n": tight}) is not None
    assert full_disks(needs, {"n": replace(tight, prepared=("a",))}) is None


def test_only_the_node_whose_disk_is_full_is_named() -> None:
    full = replace(NODE, temp_free=3_000_000)
    assert full_disks(NOTHING, {"one": NODE, "two": full}) == "two: 3 MB free in /tmp, 200 MB needed"


def test_a_compiler_is_asked_for_where_deepspeed_builds_with_it() -> None:
    compiling = replace(NOTHING, compiles=True)
    assert without_compiler(NOTHING, {"n": NODE}) is None
    assert without_compiler(compiling, {"n": NODE, "m": replace(NODE, has_compiler=True)}) == "n: no C++ compiler"


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
        "print(json.dumps(pickle.load(open(sys.argv[1], 'rb'))(('torch', 'no-such-package'), sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "look"), str(tmp_path / "home")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    node = Node(**json.loads(done.stdout))
    assert node.home_free > 0, "of the disk that its home would be on"
    assert (node.home, node.prepared) == (str(tmp_path / "home"), [])
    found = node.installed
    assert found["torch"] == "9.9"
    assert found["no-such-package"] is None
    assert found["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.slow
def test_a_cluster_of_one_installation_is_let_be_and_another_one_is_refused(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = installations.Installations()
    asked.refuse_unfit(NOTHING)
    with pytest.raises(StorageError, match="no room for this training") as full:
        asked.refuse_unfit(replace(NOTHING, scratch=10**18))
    assert "1000000000.2 GB needed" in str(full.value.got)
    own = {**asdict(NODE), "installed": {"python": "3.99"}}
    monkeypatch.setattr(installations, "_look", lambda: lambda packages, home: own)
    with pytest.raises(ClusterError, match="other packages than the driver") as refused:
        asked.refuse_unfit(NOTHING)
    assert "the driver 3.99" in str(refused.value.got)
