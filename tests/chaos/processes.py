"""Processes of the suite, found again by a mark in their environment, which all that they start inherits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_MARK = "ORCHESTRATOR_CHAOS_PART"
"""Environment variable that says which part of the suite a process belongs to: a node, the driver, the server."""
_SUITE = f"{os.getpid()} "
"""Tells this suite's parts from another's."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AUTH_MODE": "disabled",  # a token in the developer's home would otherwise turn authentication on
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at Ray's own 15 whatever else runs here starves the workers
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A dead or cut-off node is noticed within 3 s to 9 s instead of half a minute to a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
_GONE_S = 20.0
"""How long killed processes may take to disappear; a guess for a loaded machine."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where processes run: this machine, or a host made of namespaces."""

    address: str
    enter: tuple[str, ...] = ()
    """Command prefix that leads there."""


HERE = Machine(address="127.0.0.1")


def start(
    command: Sequence[str],
    *,
    part: str,
    log: Path,
    machine: Machine = HERE,
    environment: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a command on a machine as a part of the suite; standard error, and output without `out`, go to `log`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    with log.open("ab") as errors, (out or log).open("ab") as output:
        return subprocess.Popen(
            [*machine.enter, *command],
            cwd=ROOT,
            env={**clean, **_ENVIRONMENT, **(environment or {}), _MARK: _SUITE + part},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )


def of(part: str) -> list[psutil.Process]:
    """Living processes of a part, oldest first."""
    return sorted((p for p in psutil.process_iter() if _mark(p) == _SUITE + part), key=lambda p: p.create_time())


def workers() -> list[psutil.Process]:
    """Ray Train's workers and the processes of trials on all nodes, oldest first."""
    return sorted((p for p in psutil.process_iter() if _is_worker(p)), key=lambda p: p.create_time())


def kill(victims: Sequence[psutil.Process]) -> None:
    """SIGKILL to all of them, one right after the other; returns at once."""
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # an earlier one took it along
            continue


def end(part: str) -> None:
    """Kills a part, whatever it still starts, and waits until it is gone. Raises TimeoutError when it stays."""
    deadline = time.monotonic() + _GONE_S
    while left := of(part):
        kill(left)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{part} is still running: {[p.pid for p in left]}")
        time.sleep(0.05)


def title(process: psutil.Process) -> str:
    """The beginning of its command line; empty when it is gone."""
    try:
        return " ".join(process.cmdline()[:3])
    except psutil.Error:
        return ""


def _is_worker(process: psutil.Process) -> bool:
    return any(part in title(process) for part in ("RayTrainWorker", "ImplicitFunc")) and (
        _mark(process) or ""
    ).startswith(_SUITE)


def _mark(process: psutil.Process) -> str | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(_MARK)
    except psutil.Error:  # ended meanwhile, or somebody else's
        return None


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HERE.address, 0))
        return int(probe.getsockname()[1])
