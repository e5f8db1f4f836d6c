"""The checks of this machine that answer at once: versions, memory, disks, compiler, limits, ports.

Each is a small function that reads the machine and returns findings; none changes anything. Called by `report`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from orchestrator import locations
from orchestrator.errors import ClusterError
from orchestrator.planning.hardware import address_space_limit, check_address_space

Status = Literal["ok", "warn", "fail"]

SUPPORTED_PYTHON = ((3, 11), (3, 13))
"""First and last Python with wheels of every pinned package."""
CORE_PACKAGES = ("ray", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors", "peft", "mlflow")
"""Without any of these no run works."""
PORTS = {6379: "Ray's GCS (`ray start --head`)", 8265: "Ray's dashboard and job server", 5000: "an MLflow server"}
PORT_OPTIONS = {
    6379: "`ray start --head --port=6380`",
    8265: "`ray start --head --dashboard-port=8266`",
    5000: "`mlflow server --port 5001`",
}
MIN_FREE_GIB, GOOD_FREE_GIB = 1.0, 10.0
"""Guesses: a checkpoint of a 100M-parameter model with its Adam state is 1.6 GB, and `keep: 3` holds four."""
GOOD_SHM_GIB = 2.0
"""Object store of the shipped cluster files; a container's default of 64 MiB makes Ray fall back to the disk."""
GOOD_MEMORY_GIB = 4.0
"""Guess from one worker at about 1 GiB of imports, Ray at 1 GiB, and the demo's model."""
GOOD_OPEN_FILES = 4096
"""Guess: Ray warns below 1,024 and wants 65,536 on a head; a local run of a few workers stays under 2,000."""
MAX_SOCKET_PATH_BYTES = 107
"""Length of a Unix socket's path on Linux (sun_path, less its final zero byte)."""
SESSION_SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The longest socket of a Ray session, below its temporary folder; pids have up to seven digits."""
LOCK_GRACE_S = 60.0
"""A lock this young may belong to a build between two compiler processes."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check saw."""

    check: str
    """Short name of the check."""
    status: Status
    """`fail`: a run cannot work; `warn`: it may be slow, or fail under some specs."""
    detail: str
    """What was seen, with figures."""
    remedy: str | None = None
    """What to do about it; None when all is well."""


def ok(check: str, detail: str) -> Finding:
    """What a check found in order."""
    return Finding(check=check, status="ok", detail=detail)


def warn(check: str, detail: str, remedy: str) -> Finding:
    """What may be slow, or fail under some specs."""
    return Finding(check=check, status="warn", detail=detail, remedy=remedy)


def fail(check: str, detail: str, remedy: str) -> Finding:
    """What no run can work with."""
    return Finding(check=check, status="fail", detail=detail, remedy=remedy)


def all_findings(constraints: Path | None = None) -> list[Finding]:
    """Every check of this module, in the order in which to fix what they find; raises nothing."""
    findings = [check_python(), *check_packages(constraints or find_constraints()), check_cpu(), check_memory()]
    findings += [check_folder("home", locations.home()), check_folder("temp", Path(tempfile.gettempdir()))]
    findings += [check_shared_memory(), check_compiler(), *check_build_locks(extension_folders())]
    findings += [check_open_files(), address_space()]
    return [*findings, check_socket_path(ray_temp_folder()), *(check_port(port) for port in PORTS)]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Is this a Python that the pinned packages support?"""
    (first, last), seen = SUPPORTED_PYTHON, f"{platform.python_version()} at {sys.executable}"
    if first <= version <= last:
        return ok("python", seen)
    wanted = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return fail(
        "python",
        f"{version[0]}.{version[1]} is not supported",
        f"use Python {wanted}: `make clean-venv install PYTHON=python3.{last[1]}`",
    )


def find_constraints() -> Path | None:
    """The project's constraints.txt: beside the package in a checkout, else in the working directory."""
    candidates = (Path(__file__).parents[2] / "constraints.txt", Path("constraints.txt"))
    return next((path for path in candidates if path.is_file()), None)


def check_packages(constraints: Path | None) -> Iterator[Finding]:
    """Are the core packages there, and is everything installed at the version that was tested?"""
    missing = [name for name in CORE_PACKAGES if _installed(name) is None]
    if missing:
        yield fail(
            "packages",
            f"not installed: {', '.join(missing)}",
            "`make install`, or `pip install -c constraints.txt -e .` in the project's folder",
        )
    if constraints is None:
        yield warn(
            "packages",
            "no constraints.txt here to compare versions with",
            "run `orchestrator doctor` in the project's folder",
        )
        return
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE))
    versions = {name: version for name in pins if (version := _installed(name)) is not None}
    other = [f"{name} {version} (tested: {pins[name]})" for name, version in versions.items() if version != pins[name]]
    if other:
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        yield warn("packages", shown, f"`pip install -c {constraints} -e .` puts the tested versions back")
    elif not missing:
        core = ", ".join(f"{name} {versions.get(name, _installed(name))}" for name in CORE_PACKAGES[:4])
        yield ok("packages", f"{len(versions)} as tested; {core}")


def _installed(name: str) -> str | None:
    """Version of an installed distribution without its local tag (`+cpu`), or None."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_cpu() -> Finding:
    """How many cores may this process use?"""
    physical = os.cpu_count() or 1
    # Not every system can tell which cores a container or scheduler left to us.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    load = os.getloadavg()[0]
    detail = f"{allowed} of {physical} cores, load {load:.1f}"
    if load > 1.5 * physical:
        return warn("cpu", detail, "other work shares these cores: expect slow steps")
    return ok("cpu", detail)


def check_memory(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> Finding:
    """Is there memory for Ray and one worker, under a container's limit too?"""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    if limit.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, int(limit))
    detail = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if available < GOOD_MEMORY_GIB * _GIB:
        return warn("memory", detail, f"less than {GOOD_MEMORY_GIB:g} GiB: close other programs, or use fewer workers")
    return ok("memory", detail)


def check_folder(name: str, folder: Path) -> Finding:
    """Can a file be written to a folder (or to where it would be made), and how much fits?"""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    move = "set ORCHESTRATOR_HOME" if name == "home" else "set TMPDIR"
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return fail(
            f"disk ({name})",
            f"{existing} cannot be written: {error.strerror or error}",
            f"{move} to a folder that can be",
        )
    free_gib = shutil.disk_usage(existing).free / _GIB
    detail = f"{free_gib:.1f} GiB free in {folder}"
    if free_gib >= GOOD_FREE_GIB:
        return ok(f"disk ({name})", detail)
    remedy = f"checkpoints may not fit: free some, or {move} to a larger disk"
    return (warn if free_gib >= MIN_FREE_GIB else fail)(f"disk ({name})", detail, remedy)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Is shared memory large enough for Ray's object store and NCCL?"""
    if not folder.is_dir():
        return ok("shared memory", f"no {folder}; Ray uses the temporary folder")
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free in {folder}"
    if usage.free < GOOD_SHM_GIB * _GIB:
        return warn(
            "shared memory",
            detail,
            "Ray's object store falls back to the disk: `docker run --shm-size=8g`, or a larger tmpfs",
        )
    return ok("shared memory", detail)


def check_compiler() -> Finding:
    """Can DeepSpeed build its operators on first use?"""
    names = tuple(name for name in (os.environ.get("CXX"), "c++", "g++") if name)
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc").is_file() or shutil.which("nvcc")
    missing = {
        "a C++ compiler": None if compiler else "`apt-get install g++`",
        "ninja": None if shutil.which("ninja") or importlib.util.find_spec("ninja") else "`pip install ninja`",
        "nvcc": None if nvcc or not shutil.which("nvidia-smi") else "install the CUDA toolkit and set CUDA_HOME",
    }
    remedies = {name: remedy for name, remedy in missing.items() if remedy}
    if not remedies:
        return ok("compiler", f"{compiler}, ninja{', nvcc' if nvcc else ''}")
    detail = f"{', '.join(remedies)} not found: DeepSpeed cannot build fused or offloaded optimizers"
    return warn("compiler", detail, "; ".join(remedies.values()))


def extension_folders() -> tuple[Path, ...]:
    """Where torch builds extensions: `$TORCH_EXTENSIONS_DIR`, else the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(chosen),) if chosen else (cache / "torch_extensions",)


def check_build_locks(folders: Sequence[Path]) -> Iterator[Finding]:
    """Did a killed build leave a lock? The next run that needs the operator would wait on it for ever."""
    patterns = ("*/lock", "*/*/lock")
    locks = {lock: _age_s(lock) for folder in folders for pattern in patterns for lock in sorted(folder.glob(pattern))}
    if not locks:
        yield ok("build locks", f"none in {', '.join(map(str, folders))}")
        return
    building = _working_folders()
    for lock, age_s in locks.items():
        if lock.parent.resolve() in building or age_s < LOCK_GRACE_S:
            yield ok("build locks", f"{lock.parent.name} is being built now ({age_s:.0f} s)")
        else:
            yield fail(
                "build locks",
                f"{lock} is {age_s / 60:.0f} min old and nothing builds there",
                f"a killed build left it and the next one hangs: `rm {lock}`",
            )


def _age_s(path: Path) -> float:
    """Seconds since a file was written; 0 when it is gone by now."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _working_folders() -> set[Path]:
    """Working directories of all processes that may be read; ninja works in the folder that it builds."""
    return {Path(cwd) for process in psutil.process_iter(["cwd"]) if (cwd := process.info["cwd"])}


def check_open_files() -> Finding:
    """May a process open enough files for Ray's connections?"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= GOOD_OPEN_FILES:
        return ok("open files", f"limit {'none' if soft < 0 else soft}")
    return warn(
        "open files",
        f"limit {soft} (may be raised to {'any' if hard < 0 else hard})",
        "`ulimit -n 65536` before starting; for good in /etc/security/limits.conf",
    )


def address_space() -> Finding:
    """May a process have as much address space as Ray's take?"""
    try:
        check_address_space()
    except ClusterError as error:
        return fail("address space", f"limit {error.got}", error.do or "")
    limit = address_space_limit()
    return ok("address space", "limit none" if limit is None else f"limit {limit / 2**30:.0f} GiB")


def ray_temp_folder() -> Path:
    """Where Ray puts its sessions unless told otherwise, by its own rule."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def check_socket_path(temp: Path) -> Finding:
    """Do the sockets of a Ray session fit into a Unix socket's path?"""
    length = len(os.fsencode(temp.absolute() / SESSION_SOCKET))
    detail = f"Ray's sockets below {temp} have paths of {length} bytes, {MAX_SOCKET_PATH_BYTES} allowed"
    if length <= MAX_SOCKET_PATH_BYTES:
        return ok("socket paths", detail)
    remedy = "`export RAY_TMPDIR=/tmp` before `ray start` (`orchestrator run` passes over a long TMPDIR by itself)"
    return warn("socket paths", detail, remedy)


def check_port(port: int) -> Finding:
    """Is a well-known port free? Only clusters and servers that people start need it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Otherwise connections that a closed server left behind would count as use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return warn(
                f"port {port}",
                f"in use by {_listener(port) or error.strerror}",
                f"`orchestrator run` does not need it; for {PORTS.get(port, 'a server')} "
                f"use {PORT_OPTIONS.get(port, 'another port')}",
            )
    return ok(f"port {port}", f"free for {PORTS.get(port, 'a server')}")


def _listener(port: int) -> str | None:
    """Name and pid of the process that listens on a TCP port, when the system tells."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            # The first two conditions are psutil's way of saying "not bound" and "not ours to know".
            if not connection.laddr or not connection.pid or connection.status != psutil.CONN_LISTEN:
                continue
            if connection.laddr.port == port:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        return "a process of another user"
    return None
