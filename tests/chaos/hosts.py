"""Hosts without machines: namespaces joined by veth pairs to a bridge, all inside the suite's own network namespace.

A host has its own network, process, mount, host-name and IPC namespaces, its own /dev/shm, /etc/hosts and folder for
Ray's files; the rest of the disk is shared, as a cluster's shared folder is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos import processes
from tests.chaos.processes import Machine

INSIDE = "ORCHESTRATOR_CHAOS_INSIDE"
"""Set in the suite's environment once it runs in namespaces of its own."""
_SUITE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_HOST = (*_SUITE, "--uts", "--ipc")
_BRIDGE = "chaos0"
_NETWORK = "10.77.0."
NETWORK = f"{_NETWORK}0/24"
"""Addresses of the bridge (1) and the hosts; nothing outside the suite's namespace sees them."""
SUITE = Machine(address=f"{_NETWORK}1")
"""Where the suite itself runs, as hosts see it."""
_UP_S = 20.0
"""How long a host may take to come up; 0.1 s when the machine is idle."""


def available() -> bool:
    """Whether this user may make namespaces with devices and mounts in them (root may)."""
    probe = "ip link set lo up && ip link add probe0 type veth peer name probe1 && mount -t tmpfs tmpfs /mnt"
    try:
        return subprocess.run([*_SUITE, "sh", "-c", probe], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def inside() -> bool:
    """Whether the suite runs in namespaces of its own already."""
    return INSIDE in os.environ


def enter(module: str, arguments: Sequence[str]) -> None:
    """Replaces this process by the same module in namespaces of its own; the kernel ends all in them with it.

    Its ports, mounts and processes then meet nobody else's, and none outlives it, however it ends.
    """
    script = 'ip link set lo up && "$@"'  # the shell stays as the first process and reaps orphans
    command = [*_SUITE, "sh", "-c", f"{script}; exit $?", "chaos", sys.executable, "-m", module, *arguments]
    os.environ[INSIDE] = "1"
    os.execvp(command[0], command)


class Network:
    """Hosts on one bridge. Needs the suite's own namespaces."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.private = folder / "private"
        """A path that is another folder on every host."""
        self.private.mkdir(exist_ok=True)
        self._numbers: dict[str, int] = {}
        _run("ip", "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{_NETWORK}1/24", "dev", _BRIDGE)
        _run("ip", "link", "set", _BRIDGE, "up")

    def start(self, name: str, *, number: int | None = None) -> Machine:
        """A new host, or one of that name again after `kill`; it keeps its address, which ends in `number` if given."""
        number = self._numbers.setdefault(name, number or len(self._numbers) + 2)
        address, device = f"{_NETWORK}{number}", self._device(name)
        names, disk = self._folder / f"{name}.hosts", self.disk(name)
        disk.mkdir(exist_ok=True)
        names.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        setup = (
            f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount --bind {names} /etc/hosts && "
            f"mount --bind {disk} {self.private} && "
            "ip link set lo up && while :; do sleep 600 & wait $!; done"
        )
        first = processes.start([*_HOST, "sh", "-c", setup], part=_part(name), log=self._folder / f"{name}.log")
        pid = self._first_process(name, first.pid)
        # The same card after a restart, or its neighbours would send to the old one until they forget it.
        card = ("name", "eth0", "address", f"02:00:00:00:00:{number:02x}", "netns", str(pid))
        _run("ip", "link", "add", device, "type", "veth", "peer", *card)
        _run("ip", "link", "set", device, "master", _BRIDGE, "up")
        into = ("nsenter", "--target", str(pid), "--all")
        _run(*into, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
        _run(*into, "ip", "link", "set", "eth0", "up")
        _run(*into, "ip", "route", "add", "default", "via", f"{_NETWORK}1")  # by it libraries find their own address
        return Machine(address=address, enter=into)

    def disk(self, name: str) -> Path:
        """What a host has at `private`, as the suite sees it."""
        return self._folder / f"{name}.disk"

    def kill(self, name: str) -> None:
        """Power off: the cable first, so that no connection is closed by a last word."""
        _run("ip", "link", "del", self._device(name))
        processes.end(_part(name))

    def close(self) -> None:
        """Takes the bridge down."""
        _run("ip", "link", "del", _BRIDGE)

    def cut(self, name: str) -> None:
        """Takes the host's cable out; raises RuntimeError when the host is down."""
        _run("ip", "link", "set", self._device(name), "down")

    def heal(self, name: str) -> None:
        """Puts it back."""
        _run("ip", "link", "set", self._device(name), "up")

    def shape(self, name: str, gbit: float | None) -> None:
        """Lets a host receive so many Gbit/s at most; None lifts it."""
        device = self._device(name)
        if gbit is None:
            subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
        else:
            # A burst is what passes at full speed: enough for a tick of the kernel's clock at 1 Gbit/s.
            limits = ("rate", f"{1000 * gbit:g}mbit", "burst", "256kb", "latency", "50ms")
            _run("tc", "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def received(self, name: str) -> int:
        """Bytes that have gone to a host since it started."""
        shown = subprocess.run(
            ["ip", "-json", "-stats", "link", "show", self._device(name)], capture_output=True, text=True, check=True
        )
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])

    def _device(self, name: str) -> str:
        return f"veth{self._numbers[name]}"

    def _first_process(self, name: str, unshare_pid: int) -> int:
        """Process id of the host's init, once its set-up is done."""
        deadline = time.monotonic() + _UP_S
        while time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):  # the set-up's own commands come and go
                for process in psutil.Process(unshare_pid).children():
                    if any(child.name() == "sleep" for child in process.children()):
                        return process.pid
            time.sleep(0.02)
        raise TimeoutError(f"host {name} did not come up: {(self._folder / f'{name}.log').read_text()}")


def _part(name: str) -> str:
    return f"host {name}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
