"""`cluster/node/worker.sh` with a stand-in for `ray`, which notes how it is called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cluster" / "node" / "worker.sh"
RAY = """#!/bin/bash
echo "$@" >> ~/calls
[ "$1" = start ] || exit 0
[ "$3" != --address=nowhere ] || { echo "no head there"; exit 1; }
echo "Ray runtime started."
echo $$ > ~/raylet
exec sleep 60
"""


@dataclass(frozen=True)
class Worker:
    home: Path

    def start(self, address: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(SCRIPT), f"--address={address}", "--num-cpus=2"]
        environment = {"HOME": str(self.home), "PATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    @property
    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().splitlines()

    def end_raylet(self) -> None:
        os.kill(int((self.home / "raylet").read_text()), signal.SIGKILL)

    def wait_for(self, calls: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.calls) < calls:
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.02)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text(RAY)
    (tmp_path / "bin" / "ray").chmod(0o755)
    yield Worker(tmp_path)
    for file in tmp_path.glob("*.pid"):
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_what_a_raylet_leaves_is_stopped_when_it_ends(worker: Worker) -> None:
    assert worker.start("10.0.0.1:6379").returncode == 0
    assert worker.calls == ["start --block --address=10.0.0.1:6379 --num-cpus=2"]
    worker.end_raylet()
    worker.wait_for(calls=2)
    assert worker.calls[1] == "stop --grace-period 5"


def test_a_second_start_is_not_stopped_by_the_first(worker: Worker) -> None:
    worker.start("10.0.0.1:6379")
    first = int(next(worker.home.glob("*.pid")).read_text())
    assert worker.start("10.0.0.2:6379").returncode == 0
    deadline = time.monotonic() + 20
    while Path(f"/proc/{first}/cmdline").exists() and Path(f"/proc/{first}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # for a stop that would come from it
    assert [call.split()[0] for call in worker.calls] == ["start", "start"]


def test_a_start_that_fails_says_what_ray_said(worker: Worker) -> None:
    done = worker.start("nowhere")
    assert done.returncode == 1
    assert "no head there" in done.stderr
