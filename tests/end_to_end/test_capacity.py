"""Trainings on a cluster that scales and that others use too: nodes come when asked, and everyone gets a turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.provenance import USER
from tests import specs
from tests.autoscaling import IDLE_S, alive_nodes, scaling_cluster
from tests.chaos.processes import ROOT
from tests.end_to_end.commands import Place

pytestmark = pytest.mark.slow

ONE_CORE = {"one_core": {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "max_workers": 2}}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head without cores, to which an autoscaler adds two nodes of one core."""
    with scaling_cluster(ONE_CORE, max_workers=2) as address:
        yield address


def place(folder: Path, address: str, name: str, **changes: object) -> Place:
    folder.mkdir()
    made = Place(folder=folder, environment={"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"})
    values = {"name": name, "training__steps": 4, "resources__workers": 2, "deepspeed__zero_stage": 2}
    made.write(specs.PRETRAIN, **(values | changes))
    return made


def test_nodes_come_when_a_training_asks_and_go_when_nobody_uses_them(tmp_path: Path, address: str) -> None:
    assert alive_nodes(address) == 1, "the head alone"
    here = place(tmp_path / "a", address, "from-zero")
    done = here.run("run", str(here.spec), "--json")
    assert done.code == 0, done.err
    assert done.answer["status"] == "finished"
    waiting = [line for line in done.err.splitlines() if line.startswith("waiting for room, 1800 s at most: ")]
    assert any("2 workers of 1 CPU core" in line for line in waiting), done.err
    doing = [line.partition("; ")[2] for line in waiting if "one_core" in line]  # what the autoscaler does about it
    assert doing, done.err
    assert doing[0].startswith("2 one_core"), "both are asked for together, and none before, to encode text"
    assert "starting workers" in done.err
    deadline_s = time.monotonic() + IDLE_S + 30
    while alive_nodes(address) > 1 and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert alive_nodes(address) == 1


RENEWED = f"""
import sys, time, ray
from orchestrator.scheduling.autoscaler import Request
from tests.autoscaling import alive_nodes

ray.init(address=sys.argv[1], log_to_driver=False)
request = Request()
request.ask([{{"CPU": 1.0}}])
while not request.held():
    time.sleep(0.2)
request.close()
time.sleep({IDLE_S} - 1)
request.ask([{{"CPU": 1.0}}])
request.renew()
time.sleep({IDLE_S} - 2)
print(alive_nodes(sys.argv[1]))
"""


def test_a_node_that_stood_idle_is_not_taken_away_between_the_request_and_the_workers(address: str) -> None:
    command = [sys.executable, "-c", RENEWED, address]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "2\n", done.stderr


def test_what_no_node_type_could_give_is_refused_at_once(tmp_path: Path, address: str) -> None:
    here = place(tmp_path / "a", address, "too-large", resources__workers=3, training__global_batch=12)
    done = here.run("run", str(here.spec))
    assert done.code == 1
    assert "error: 3 workers do not fit on the cluster, which has room for 2" in done.err
    assert "its autoscaler may add no more nodes than that" in done.err
    assert "waiting" not in done.err


def test_a_search_says_that_it_waits_for_whom_and_starts_when_the_training_before_it_leaves(
    tmp_path: Path, address: str
) -> None:
    first = place(tmp_path / "a", address, "first", training__steps=100_000)
    search = {"space": {"training.seed": {"grid": [0, 1]}}, "scheduler": "none"}
    second = place(tmp_path / "b", address, "second", resources__workers=1, search=search)
    with first.start("run", str(first.spec), **{USER: "ana"}) as running:
        running.wait_for("starting workers")
        with second.start("run", str(second.spec), "--json", **{USER: "ben"}) as queued:
            queued.wait_for("waiting for room: place 1 in the queue; first (ana) has the workers")
            running.send(signal.SIGINT)
            assert "with a checkpoint" in running.finish().err
            done = queued.finish()
    assert done.code == 0, done.err
    assert done.answer["best"]["trial"]
