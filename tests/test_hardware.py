from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.errors import ClusterError, SpecError
from orchestrator.planning import hardware
from orchestrator.planning.hardware import catalogue, find_device, local_cluster, requested_cluster

PURE_MODULES = (
    "architectures.families",
    *(f"planning.{name}" for name in ("hardware", "utilization", "communication", "throughput", "memory")),
    *(f"planning.{name}" for name in ("deepspeed_config", "placement", "fitting", "plan")),
)


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("A100", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("a100_40gb", "A100-40GB"),
        ("H100", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("H100-96GB-500W", "H100-96GB"),
        ("H800-80GB", "H800-80GB"),
        ("H800", "H800-80GB"),
        ("A800", "A800-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA RTX A6000", "A6000"),
        ("AMD Instinct MI250X", "MI250X"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("TPU v4", "TPUv4"),
        ("TPUv5e", "TPUv5e"),
        ("cpu", "cpu"),
    ],
)
def test_usual_spellings_find_their_device(spelling: str, name: str) -> None:
    assert find_device(spelling).name == name


@pytest.mark.parametrize(
    "name",
    [
        *("A100-SXM-80GB", "A100-SXM-40GB", "A100-80GB", "A100-40GB", "H100-SXM", "H100-PCIe", "H100-80GB", "H200-SXM"),
        *("H100-96GB-500W", "B200-SXM", "B300-SXM", "MI300X", "L40S", "L4", "A10G", "RTX4090", "RTX3090"),
        *("V100-SXM-32GB", "T4", "H800-SXM", "TPUv4", "TPUv3"),
    ],
)
def test_names_of_the_evidence_are_known(name: str) -> None:
    assert find_device(name).bf16_tflops > 0


def test_no_spelling_means_two_devices() -> None:
    spellings = [hardware._key(s) for d in catalogue().values() for s in {d.name, *d.aliases}]
    owners = {
        key: {d.name for d in catalogue().values() if key in map(hardware._key, (d.name, *d.aliases))}
        for key in spellings
    }
    assert all(len(names) == 1 for names in owners.values())


def test_unknown_device_lists_all_nearest_first_and_how_to_add_one() -> None:
    with pytest.raises(SpecError) as error:
        find_device("A1000")
    assert str(error.value.allowed).startswith("A100-")
    assert all(name in str(error.value.allowed) for name in catalogue())
    assert "configs/devices.yaml" in str(error.value.do)


def test_every_entry_has_ordered_fractions_below_one_and_positive_speeds() -> None:
    for device in catalogue().values():
        for fraction in filter(None, (device.achieved_fraction, device.benchmark_fraction)):
            assert 0 < fraction.low <= fraction.mid <= fraction.high < 1
        assert device.bf16_tflops > 0
        assert device.fp32_tflops > 0
        assert device.usd_per_hour is None or device.usd_per_hour > 0
        assert device.memory_gib > 0 or device.kind == "cpu"


def test_benchmarks_reach_more_of_the_peak_than_whole_runs() -> None:
    for device in catalogue().values():
        if device.benchmark_fraction is not None:
            assert device.benchmark_fraction.mid > device.achieved_fraction.mid


def test_links_within_a_node_are_no_slower_than_the_network() -> None:
    for device in catalogue().values():
        if device.kind == "cpu":
            assert device.node_gb_s is device.network_gb_s is None
        else:
            assert device.node_gb_s is not None
            assert device.network_gb_s is not None
            assert 0 < device.network_gb_s <= device.node_gb_s


def test_families_share_their_utilization_and_guesses_are_wider_than_evidence() -> None:
    assert find_device("A100").utilization == find_device("A100-40GB").utilization
    guess, evidence = find_device("L4").achieved_fraction, find_device("A100").achieved_fraction
    assert guess.high / guess.low > evidence.high / evidence.low


def test_fp32_is_slower_than_16_bits_on_every_gpu() -> None:
    assert all(d.peak_flops("fp32") < d.peak_flops("bf16") for d in catalogue().values() if d.kind != "cpu")


def test_requested_gpus_are_split_evenly_over_the_nodes() -> None:
    cluster = requested_cluster("h100", 64, 8)
    assert (len(cluster.nodes), cluster.gpus, cluster.cpus) == (8, 64, 512)
    assert cluster.nodes[0].memory_gib == 8 * 2 * 80
    assert requested_cluster("T4", 4).nodes[0].memory_gib == 4 * 48, "no less beside a small one"
    assert cluster.device_name == "H100-80GB"


@pytest.mark.parametrize(("gpus", "nodes"), [(0, 1), (7, 2), (2, 4), (4, 0), (-1, 1)])
def test_gpus_that_cannot_be_split_are_refused(gpus: int, nodes: int) -> None:
    with pytest.raises(SpecError, match="splits evenly"):
        requested_cluster("H100", gpus, nodes)


@pytest.mark.parametrize("name", ["cpu", "TPUv4"])
def test_only_gpus_can_be_requested(name: str) -> None:
    with pytest.raises(SpecError, match="plans are for GPUs"):
        requested_cluster(name, 8)


def test_local_cluster_has_the_cores_and_at_most_the_memory_of_this_machine() -> None:
    (node,) = local_cluster().nodes
    assert node.cpus == len(os.sched_getaffinity(0))
    assert 0 < node.memory_gib <= psutil.virtual_memory().total / 2**30


def test_local_cluster_respects_cpu_affinity() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from orchestrator.planning.hardware import local_cluster\n"
        "print(local_cluster().cpus)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_control_group_limit_is_the_memory_when_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(f"{2**30}\n")
    monkeypatch.setattr(hardware, "_CGROUP_MEMORY_LIMITS", (str(limit),))
    assert local_cluster().nodes[0].memory_gib == 1.0
    limit.write_text("max\n")
    assert local_cluster().nodes[0].memory_gib > 1.0


def test_gpus_of_nvidia_smi_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA A100-SXM4-40GB, 40960 MiB"
    fake_nvidia_smi(tmp_path, f"echo '{line}'; echo '{line}'", monkeypatch)
    cluster = local_cluster()
    assert (cluster.gpus, cluster.device_name) == (2, "A100-40GB")


def test_smallest_of_differing_gpus_names_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA H200, 143771 MiB'; echo 'NVIDIA L4, 23034 MiB'", monkeypatch)
    assert local_cluster().device_name == "L4"


def test_gpu_outside_the_catalogue_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA Quadro P400, 2048 MiB'", monkeypatch)
    assert local_cluster().device_name == "NVIDIA Quadro P400"


def test_nvidia_smi_without_a_driver_means_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9", monkeypatch)
    assert (local_cluster().gpus, local_cluster().device_name) == (0, "cpu")


@pytest.mark.parametrize(("script", "message"), [("exec sleep 5", "did not answer"), ("echo what", "cannot be read")])
def test_broken_nvidia_smi_is_a_cluster_error(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, script, monkeypatch)
    monkeypatch.setattr(hardware, "_NVIDIA_SMI_TIMEOUT_S", 0.3)
    with pytest.raises(ClusterError, match=message):
        local_cluster()


def test_broken_catalogue_entry_is_named() -> None:
    raw = {"achieved_fractions": {"gpu": {"fraction": 0.3, "spread": 0.4}}, "benchmark_fractions": {}}
    with pytest.raises(SpecError, match="entry X1 of the device catalogue"):
        hardware._device("X1", {"kind": "gpu", "aliases": [], "achieved": "gpu"}, raw)


def test_planning_loads_no_heavy_library() -> None:
    imports = ", ".join(f"orchestrator.{name}" for name in PURE_MODULES)
    script = (
        f"import sys, orchestrator.load_spec, {imports}\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'datasets', 'deepspeed', 'huggingface_hub', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ASK_UNDER_A_LIMIT = """
import resource, sys
from orchestrator.errors import ClusterError
from orchestrator.planning import hardware
limit = int(sys.argv[1]) * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    hardware.check_address_space()
    print("enough", hardware.local_cluster().nodes[0].memory_gib <= int(sys.argv[1]))
except ClusterError as error:
    print(error.got)
"""


@pytest.mark.parametrize(("gib", "answer"), [(8, "ulimit -v 8388608 (8.0 GiB)"), (16, "enough True")])
def test_a_limit_on_the_address_space_is_told_and_one_too_small_for_ray_refused(gib: int, answer: str) -> None:
    command = [sys.executable, "-c", ASK_UNDER_A_LIMIT, str(gib)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == answer


def test_a_cluster_beyond_all_use_is_refused_at_once() -> None:
    with pytest.raises(SpecError, match="no cluster is that large"):
        requested_cluster("H100", 10**12, 10**9)


def test_a_name_of_any_length_is_compared_at_once() -> None:
    with pytest.raises(SpecError, match="no such device"):
        find_device("h" * 10**6)
