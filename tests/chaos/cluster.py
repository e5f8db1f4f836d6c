"""A Ray cluster of several nodes: a head without cores, where drivers run, and nodes that can be lost one by one.

Nodes are raylets on this machine, or one on each namespace host. They start one after the other, because raylets that
start at once on one machine have crashed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import processes
from tests.chaos.hosts import Network
from tests.chaos.processes import HERE, Machine

HEAD = "head"
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_STARTED = "Ray runtime started"
_START_S = 180.0
"""How long a node may take to start: 3 to 6 s, and 27 s under a load of seven on two cores."""
_TRIES = 4
_STORE_BYTES = 100_000_000
"""Object store of a node: what travels is a small corpus (Ray's least is 75 MiB)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a cluster."""

    nodes: Mapping[str, int]
    """Cores of each node but the head, by name."""
    on_hosts: bool = False
    """Each node, the head too, is a namespace host of its own."""
    apart: bool = False
    """Each of those hosts but the head has a folder of runs of its own."""


class Cluster:
    """A running cluster; every loss can be made good by `repair`."""

    def __init__(self, layout: Layout, *, folder: Path, environment: Mapping[str, str]) -> None:
        """Starts nothing: `repair` does. `folder` takes logs and Ray's files and must have a short path."""
        self.layout = layout
        self.environment = environment
        """Of every node, and of a driver."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.network = Network(folder) if layout.on_hosts else None
        self._machines: dict[str, Machine] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._port = 6379 if layout.on_hosts else processes.free_port()
        self._sessions = 0

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is set to."""
        return f"{self.machine(HEAD).address}:{self._port}"

    def machine(self, name: str) -> Machine:
        """Where a node runs."""
        return self._machines[name] if self.network is not None else HERE

    def is_alive(self, name: str) -> bool:
        """Whether a node's `ray start` still runs."""
        return name in self._processes and self._processes[name].poll() is None

    def node_of(self, pid: int) -> str | None:
        """Name of the node that a process belongs to."""
        names = (HEAD, *self.layout.nodes)
        return next((name for name in names if any(p.pid == pid for p in processes.of(name))), None)

    def repair(self) -> None:
        """Starts what is not running; a new head means a new cluster. Raises TimeoutError when a node does not come."""
        if not self.is_alive(HEAD):
            for name in (*self.layout.nodes, HEAD):
                self.kill(name)
            self._sessions += 1
            self._start(HEAD, cpus=0)
        for name, cpus in self.layout.nodes.items():
            if not self.is_alive(name):
                self.kill(name)
                self._start(name, cpus=cpus)

    def kill(self, name: str) -> None:
        """SIGKILL to all of a node's processes; a host loses its power."""
        if self.network is not None and name in self._machines:
            self.network.kill(name)
            del self._machines[name]
        processes.kill(processes.of(name))
        processes.end(name)
        if name in self._processes:
            self._processes.pop(name).wait()

    def drain(self, name: str) -> None:
        """SIGTERM to a node's `ray start`: Ray takes it out of the cluster within half a minute."""
        for process in processes.of(name):
            if "ray.scripts.scripts" in " ".join(process.cmdline()):
                process.terminate()

    def kill_all(self) -> None:
        """Every node at once."""
        processes.kill([process for name in (HEAD, *self.layout.nodes) for process in processes.of(name)])
        for name in (HEAD, *self.layout.nodes):
            self.kill(name)

    def close(self) -> None:
        """Ends all of it, the network too."""
        self.kill_all()
        if self.network is not None:
            self.network.close()

    def _start(self, name: str, *, cpus: int) -> None:
        """Starts a node, again where its agents took longer than Ray waits (30 s, as they may on a loaded machine)."""
        for _ in range(_TRIES):
            if self.network is not None:
                self._machines[name] = self.network.start(name)
                if self.layout.apart and name != HEAD:
                    runs = Path(self.environment["ORCHESTRATOR_HOME"], "runs")
                    runs.mkdir(exist_ok=True)
                    subprocess.run([*self.machine(name).enter, "mount", "-t", "tmpfs", "tmpfs", runs], check=True)
            self._launch(name, cpus=cpus)
            if self._came_up(name):
                return
            self.kill(name)
        raise TimeoutError(f"node {name} did not start:\n{self._log(name).read_text()[-2000:]}")

    def _launch(self, name: str, *, cpus: int) -> None:
        machine = self.machine(name)
        temporary = self._folder if self.network is None else self.network.private
        role = (
            ["--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={temporary}"]
            if name == HEAD
            else [f"--address={self.address}"]
        )
        size = [f"--num-cpus={cpus}", f"--object-store-memory={_STORE_BYTES}"]
        self._log(name).unlink(missing_ok=True)
        self._processes[name] = processes.start(
            [*_RAY, "start", "--block", f"--node-ip-address={machine.address}", *role, *size],
            part=name,
            log=self._log(name),
            machine=machine,
            environment=self.environment,
        )

    def _came_up(self, name: str) -> bool:
        deadline = time.monotonic() + _START_S
        while _STARTED not in self._log(name).read_text(errors="replace"):
            if not self.is_alive(name) or time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}-{self._sessions}.log"
