from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.architectures.standard_shape import standard_shape
from orchestrator.errors import SpecError
from orchestrator.methods.registry import PRICED
from orchestrator.planning.estimate import Workload, estimate, precision_of, usable_gib
from orchestrator.planning.hardware import catalogue, find_device

SEVEN = Workload(parameters=7_000_000_000, tokens=1e10, device=find_device("A100-80GB"))
DEVICES = sorted(catalogue())


def with_memory(workload: Workload, gib: float) -> Workload:
    return replace(workload, device=replace(workload.device, memory_gib=gib))


def peak(**changes: Any) -> float:
    return estimate(replace(SEVEN, **changes)).peak_gib.mid


workloads = st.builds(
    Workload,
    parameters=st.integers(10**6, 10**12),
    tokens=st.floats(1, 1e14),
    device=st.sampled_from([find_device(name) for name in DEVICES]),
    gpus=st.sampled_from([1, 2, 8, 64, 1024]),
    method=st.sampled_from(sorted(PRICED)),
    sequence_length=st.sampled_from([1, 512, 8192]),
    micro_batch=st.integers(1, 16),
    activation_checkpointing=st.booleans(),
)


@given(workload=workloads)
def test_intervals_contain_their_middle(workload: Workload) -> None:
    found = estimate(workload)
    for interval in (found.gpu_hours, found.wall_hours, found.usd, found.peak_gib):
        assert interval is None or 0 < interval.low <= interval.mid <= interval.high


@given(workload=workloads, factor=st.floats(1.0, 1e4))
def test_time_grows_with_tokens(workload: Workload, factor: float) -> None:
    more = estimate(replace(workload, tokens=workload.tokens * factor))
    assert estimate(workload).wall_hours.mid <= more.wall_hours.mid


@given(workload=workloads, gib=st.floats(1, 1000), more=st.floats(0, 1000))
def test_more_memory_never_makes_a_workload_stop_fitting(workload: Workload, gib: float, more: float) -> None:
    less_fits = estimate(with_memory(workload, gib)).fits
    assert estimate(with_memory(workload, gib + more)).fits or not less_fits


@given(workload=workloads)
def test_longer_samples_never_need_less_memory(workload: Workload) -> None:
    fixed = replace(workload, zero_stage=0)
    assert estimate(fixed).peak_gib.mid <= estimate(replace(fixed, sequence_length=10_000)).peak_gib.mid


def test_adapters_need_less_than_full_training_and_quantised_weights_less_than_whole_ones() -> None:
    assert peak(method="qlora") < peak(method="lora") < peak(method="full")
    assert peak(method="head") < peak(method="lora")


def test_a_head_on_frozen_features_goes_by_three_names() -> None:
    assert peak(method="head") == peak(method="frozen") == peak(method="features")


def test_bf16_asked_for_is_all_in_bf16_and_otherwise_master_copies_are_kept() -> None:
    def bytes_per_weight(**changes: Any) -> float:
        memory = estimate(replace(SEVEN, **changes)).memory
        return (memory.weights_gib + memory.gradients_gib + memory.optimizer_gib) * 2**30 / SEVEN.parameters

    assert bytes_per_weight(precision="bf16") == pytest.approx(8)
    assert bytes_per_weight() == pytest.approx(16)
    assert peak(precision="bf16", master_weights=True) == peak(precision="fp16") == peak()


def test_virtual_tokens_lengthen_every_sample() -> None:
    prompt = estimate(replace(SEVEN, method="prompt", sequence_length=100)).memory
    longer = estimate(replace(SEVEN, method="ia3", sequence_length=200)).memory
    assert prompt.activations_gib == longer.activations_gib


def test_reasons_tell_what_the_other_way_to_keep_states_would_take() -> None:
    found = estimate(replace(SEVEN, precision="bf16"))
    said = " ".join(found.reasons)
    assert f"{peak():.3g} GiB (--master-weights)" in said


def test_smaller_optimizer_states_need_less() -> None:
    assert peak(optimizer="paged-adamw") < peak(optimizer="adamw-8bit") < peak()


def test_zero_stage_is_the_least_that_surely_fits() -> None:
    stages = {gpus: estimate(replace(SEVEN, gpus=gpus)).zero_stage for gpus in (1, 4, 64)}
    assert stages[1] == 0
    assert estimate(replace(SEVEN, gpus=64)).fits
    tight = replace(SEVEN, gpus=64, device=find_device("A10G"), activation_checkpointing=True)
    assert estimate(tight).zero_stage == 3 > stages[64] > 0


def test_offload_is_only_taken_when_asked_for() -> None:
    assert estimate(replace(SEVEN, device=find_device("A10G"))).offload == "none"
    found = estimate(replace(SEVEN, offload="all"))
    assert (found.offload, found.zero_stage) == ("all", 3)
    assert found.memory.host_gib > 0
    assert estimate(replace(SEVEN, offload="optimizer")).zero_stage == 2
    assert any(reason.startswith("host memory") for reason in found.reasons)


def test_what_is_offloaded_names_the_host_memory_and_is_no_remedy_where_no_host_has_it() -> None:
    large = replace(SEVEN, parameters=65_000_000_000, device=find_device("L40S"), offload="all")
    large = replace(large, activation_checkpointing=True)
    found = estimate(large)
    assert found.fits, "the device; what its host has nobody said"
    assert found.memory.host_gib > 1000 > large.device.host_gib
    assert any("usual machines have about 96 beside each L40S" in reason for reason in found.reasons)
    assert "--offload" not in estimate(replace(large, offload=None)).reasons[-1]
    assert (
        estimate(replace(large, method="qlora")).memory.host_gib
        < estimate(replace(large, method="lora")).memory.host_gib
    )


def test_what_does_not_fit_comes_with_the_smallest_change_that_does() -> None:
    found = estimate(replace(SEVEN, method="lora", micro_batch=4))
    assert not found.fits
    assert found.reasons[-1].startswith("smallest change that surely fits: --activation-checkpointing (")
    assert estimate(replace(SEVEN, method="lora", micro_batch=4, activation_checkpointing=True)).fits


def test_a_workload_that_nothing_helps_says_so() -> None:
    found = estimate(replace(SEVEN, parameters=10**15, device=find_device("T4")))
    assert "no single change surely fits" in found.reasons[-1]


def test_given_sizes_are_told_from_assumed_ones_and_narrow_the_interval() -> None:
    assumed, known = estimate(SEVEN), estimate(replace(SEVEN, shape=standard_shape(SEVEN.parameters)))
    assert "assumed" in assumed.reasons[0]
    assert "as given" in known.reasons[0]
    assert known.peak_gib.mid == assumed.peak_gib.mid
    assert known.peak_gib.high < assumed.peak_gib.high


def test_sharded_weights_come_with_a_warning_about_loaders() -> None:
    found = estimate(replace(SEVEN, gpus=64, zero_stage=3, method="lora", activation_checkpointing=True))
    assert any(reason.startswith("loading") for reason in found.reasons)


def test_no_price_is_no_cost() -> None:
    unpriced = replace(SEVEN.device, usd_per_hour=None)
    assert estimate(replace(SEVEN, device=unpriced)).usd is None
    assert estimate(SEVEN).usd is not None


def test_precision_is_the_best_of_the_device() -> None:
    best = {name: precision_of(replace(SEVEN, device=find_device(name))) for name in ("H100", "V100", "cpu")}
    assert best == {"H100": "bf16", "V100": "fp16", "cpu": "fp32"}


def test_a_cpu_is_judged_by_the_memory_beside_a_core() -> None:
    cpu = find_device("cpu")
    small = Workload(parameters=2_000_000, tokens=1e6, device=cpu, sequence_length=128)
    assert estimate(small).fits
    assert not estimate(replace(small, parameters=7_000_000_000)).fits
    assert usable_gib(cpu) > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parameters": 0}, "--params"),
        ({"tokens": 0.0}, "--tokens"),
        ({"tokens": float("nan")}, "--tokens"),
        ({"gpus": -1}, "--gpus"),
        ({"gpus": 6, "nodes": 4}, "--nodes"),
        ({"nodes": 0}, "--nodes"),
        ({"sequence_length": 0}, "--seq"),
        ({"micro_batch": 0}, "--micro-batch"),
        ({"lora_rank": 0}, "--lora-rank"),
        ({"method": "dora"}, "--method"),
        ({"optimizer": "lion"}, "--optimizer"),
        ({"precision": "int8"}, "--precision"),
        ({"zero_stage": 4}, "--zero-stage"),
        ({"offload": "disk"}, "disk"),
        ({"offload": "all", "zero_stage": 2}, "--zero-stage"),
        ({"offload": "optimizer", "zero_stage": 0}, "--zero-stage"),
        ({"device": find_device("cpu"), "offload": "optimizer"}, "--offload"),
        ({"device": find_device("cpu"), "precision": "fp16"}, "--precision"),
        ({"device": find_device("V100"), "precision": "bf16"}, "--precision"),
    ],
)
def test_nonsense_is_refused_by_the_option_that_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError) as error:
        estimate(replace(SEVEN, **changes))
    assert named in str(error.value)


def test_an_estimate_is_quick() -> None:
    estimate(SEVEN)
    start = time.perf_counter()
    for _ in range(20):
        estimate(SEVEN)
    assert (time.perf_counter() - start) / 20 < 0.02, "1 ms on an idle machine; the bound leaves room for a busy one"


def test_the_command_loads_no_heavy_library() -> None:
    code = (
        "import sys, orchestrator.planning.estimate, orchestrator.planning.views; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
