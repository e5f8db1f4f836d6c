"""Devices and machines: the catalogue of `configs/devices.yaml`, this machine, and a cluster asked for by name.

Read by `plan` and by the estimates; the scheduling side describes a live Ray cluster with the same `ClusterShape`.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import ClusterError, SpecError
from orchestrator.intervals import Interval
from orchestrator.planning.run_plan import ClusterShape, NodeShape
from orchestrator.planning.utilization import Utilization
from orchestrator.quantities import MOST_WORKERS
from orchestrator.yaml_file import read_yaml

CPUS_PER_REQUESTED_GPU = 8
"""CPU cores assumed beside each GPU of a cluster that is only asked for; usual cloud machines have 8 to 26."""
HOST_SHARE, LEAST_HOST_GIB = 2.0, 48.0
"""Host memory assumed beside a GPU, in multiples of the GPU's own, and at least, from lists of machine types: Google's
A2 and G2 have 2.0 to 2.1 times as much, AWS's P4d 3.6, its G4dn, G5 and G6 with four GPUs 48 GiB each."""
_LONGEST_NAME = 50
"""Characters of a device's name that are compared with those of the catalogue, whose longest has some 20."""
_NVIDIA_SMI_TIMEOUT_S = 10.0
"""It answers in under 2 s; a driver that hangs never does."""
LEAST_ADDRESS_SPACE = 16 * 2**30
"""Bytes. Ray 2.60 on two cores does not start with 8 GiB and trains with 16 (measured)."""
_CGROUP_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, as `configs/devices.yaml` describes it. A CPU's figures are per core."""

    name: str
    kind: Literal["gpu", "tpu", "cpu"]
    aliases: tuple[str, ...]
    bf16_tflops: float
    """Peak dense TFLOP/s in bf16, or fp16 where there is no bf16."""
    fp32_tflops: float
    """Peak TFLOP/s in fp32 without TF32."""
    has_bf16: bool
    memory_gib: float
    """Nominal memory; 0 for a CPU, whose node's memory counts."""
    bandwidth_tb_s: float | None
    node_gb_s: float | None
    """GB/s in one direction to the other devices of its node; None where no link limits it."""
    network_gb_s: float | None
    """GB/s in one direction to other nodes."""
    usd_per_hour: float | None
    """None where no price is known."""
    utilization: Utilization
    """How much of the peak trainings reach, by model size and scale."""
    source: str

    @property
    def host_gib(self) -> float:
        """Host memory assumed beside one such GPU."""
        return max(HOST_SHARE * self.memory_gib, LEAST_HOST_GIB)

    @property
    def achieved_fraction(self) -> Interval:
        """Model FLOP/s of whole published trainings of 10B parameters over the peak."""
        return self.utilization.interval(self.utilization.whole_run())

    @property
    def benchmark_fraction(self) -> Interval | None:
        """The same in benchmarks, without restarts and idle time; None where none are published."""
        return self.utilization.benchmark

    def peak_flops(self, precision: str) -> float:
        """Peak FLOP/s of one device (a CPU: one core) with weights in `fp32`, `bf16` or `fp16`."""
        return 1e12 * (self.fp32_tflops if precision == "fp32" else self.bf16_tflops)


def catalogue_path() -> Path:
    """The catalogue's file: `configs/devices.yaml` in a checkout, beside this module in an installed package."""
    beside = Path(__file__).with_name("devices.yaml")
    return beside if beside.is_file() else Path(__file__).parents[2] / "configs" / "devices.yaml"


@functools.cache
def catalogue() -> dict[str, Device]:
    """Every known device by name; raises SpecError when the file is missing or an entry is wrong."""
    raw = read_yaml(catalogue_path())
    return {name: _device(name, entry, raw) for name, entry in raw["devices"].items()}


def _device(name: str, entry: dict[str, Any], raw: dict[str, Any]) -> Device:
    try:
        family = entry["achieved"]
        benchmark = raw["benchmark_fractions"].get(family)
        fields = {key: value for key, value in entry.items() if key not in ("achieved", "aliases")}
        return Device(
            name=name,
            aliases=tuple(str(alias) for alias in entry["aliases"]),
            utilization=Utilization(
                **raw["achieved_fractions"][family], benchmark=None if benchmark is None else Interval(**benchmark)
            ),
            **fields,
        )
    except (KeyError, TypeError) as error:
        raise SpecError(
            f"the entry {name} of the device catalogue is wrong",
            got=f"{type(error).__name__}: {error}",
            do=f"compare it with the other entries of {catalogue_path()}",
        ) from error


def find_device(name: str) -> Device:
    """The device with a name or alias; case, punctuation and the maker's name do not count.

    Raises SpecError that lists all names, nearest first, when there is none.
    """
    known = _spellings()
    found = known.get(_key(name))
    if found is not None:
        return found
    near = difflib.get_close_matches(_key(name)[:_LONGEST_NAME], known, n=len(known), cutoff=0.0)
    names = list(dict.fromkeys(known[key].name for key in near))
    raise SpecError(
        "no such device in the catalogue",
        got=name,
        allowed=", ".join(names),
        do=f"use one of these, or add an entry to configs/devices.yaml (read from {catalogue_path()})",
    )


@functools.cache
def _spellings() -> dict[str, Device]:
    """Every device by the keys of its name and aliases."""
    return {_key(spelling): d for d in catalogue().values() for spelling in (*d.aliases, d.name)}


def _key(name: str) -> str:
    words = re.sub(r"\b(nvidia|tesla|geforce)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


def requested_cluster(gpu: str, gpus: int, nodes: int = 1) -> ClusterShape:
    """A cluster of `gpus` GPUs split evenly over `nodes`, with 8 CPU cores and `Device.host_gib` per GPU.

    Raises SpecError when the device is unknown or not a GPU, or the GPUs cannot be split evenly.
    """
    device = find_device(gpu)
    if device.kind != "gpu":
        raise SpecError(
            "plans are for GPUs, or for this machine's CPU cores",
            got=f"--gpu {gpu}, a {device.kind.upper()}",
            allowed=", ".join(d.name for d in catalogue().values() if d.kind == "gpu"),
            do="leave --gpu and --gpus out to plan for this machine",
        )
    if gpus > MOST_WORKERS:
        raise SpecError("no cluster is that large", got=f"--gpus {gpus}", allowed=f"up to {MOST_WORKERS:,}")
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise SpecError(
            "GPUs must be a positive number that splits evenly over the nodes",
            got=f"--gpus {gpus} --nodes {nodes}",
            do=f"for example --gpus {max(1, nodes) * max(1, gpus // max(1, nodes))} --nodes {max(1, nodes)}",
        )
    each = gpus // nodes
    node = NodeShape(cpus=CPUS_PER_REQUESTED_GPU * each, gpus=each, memory_gib=device.host_gib * each)
    return ClusterShape(nodes=(node,) * nodes, device_name=device.name)


def local_cluster() -> ClusterShape:
    """This machine as a cluster of one node: the cores and memory this process may use, and the GPUs of nvidia-smi.

    Where GPUs differ, the one with the least memory names the device, since every worker must fit on its own.
    Raises ClusterError when nvidia-smi hangs or its answer cannot be read.
    """
    gpus = _nvidia_gpus()
    node = NodeShape(cpus=_usable_cores(), gpus=len(gpus), memory_gib=_usable_memory_gib())
    smallest = min(gpus, key=lambda gpu: gpu[1])[0] if gpus else "cpu"
    return ClusterShape(nodes=(node,), device_name=catalogue_name(smallest))


def catalogue_name(name: str) -> str:
    """The catalogue's name, or the name as it is: planning refuses it later, other uses need not."""
    try:
        return find_device(name).name
    except SpecError:
        return name


def _nvidia_gpus() -> list[tuple[str, int]]:
    """(name, memory in MiB) of each GPU; empty without nvidia-smi or without a driver behind it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"nvidia-smi did not answer within {_NVIDIA_SMI_TIMEOUT_S:g} s, so the GPUs cannot be counted",
            do="restart the driver, or take nvidia-smi out of PATH to plan for the CPU",
        ) from error
    if done.returncode != 0:  # installed in an image that runs on a machine without GPUs
        return []
    try:
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if line.strip()]
        return [(name.strip(), int(memory.split()[0])) for name, memory in rows]
    except (ValueError, IndexError) as error:
        raise ClusterError("the answer of nvidia-smi cannot be read", got=done.stdout.strip()[:200]) from error


def _usable_cores() -> int:
    """CPU cores that this process may run on: containers and `taskset` give fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def address_space_limit() -> int | None:
    """Bytes of address space that a process may have (`ulimit -v`); None without a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def check_address_space() -> None:
    """Raises ClusterError where a limit keeps Ray's processes from starting, for which Ray itself waits a minute."""
    limit = address_space_limit()
    if limit is not None and limit < LEAST_ADDRESS_SPACE:
        raise ClusterError(
            "the limit on a process's address space is too small for Ray",
            got=f"ulimit -v {limit // 1024} ({limit / 2**30:.1f} GiB)",
            allowed=f"{LEAST_ADDRESS_SPACE / 2**30:.0f} GiB or more, most of which is never used",
            do="raise it: ulimit -v unlimited; a control group (container) limits the memory that is really used",
        )


def _usable_memory_gib() -> float:
    """Memory of the machine, or the control group's limit where that is less."""
    import psutil  # 20 ms, which only this machine's own shape needs

    limits = [psutil.virtual_memory().total]
    if (address_space := address_space_limit()) is not None:
        limits.append(address_space)
    for file in map(Path, _CGROUP_MEMORY_LIMITS):
        text = file.read_text().strip() if file.is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits) / 2**30
