from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.hardware import catalogue, find_device
from orchestrator.planning.utilization import ONE_NODE_GOODPUT, Utilization, without_tensor_cores

A100 = find_device("A100").utilization
H100 = find_device("H100").utilization
EVERY = [device.utilization for device in catalogue().values()]


def test_fraction_is_stated_at_10b_parameters_and_1t_tokens() -> None:
    assert H100.whole_run(1e10, 1e12) == H100.whole_run() == H100.fraction


def test_larger_models_and_longer_trainings_reach_more() -> None:
    assert H100.whole_run(1e9) < H100.whole_run(1e10) < H100.whole_run(1e11)
    assert A100.whole_run(1e10, 3e11) < A100.whole_run(1e10, 1e12) < A100.whole_run(1e10, 2e12)


def test_nothing_grows_beyond_what_was_published() -> None:
    assert H100.whole_run(1e13) == H100.whole_run(H100.largest)
    assert H100.whole_run(1e5) == H100.whole_run(H100.smallest)
    assert A100.whole_run(1e10, 1e14) == A100.whole_run(1e10, 2e12)


def test_one_node_is_near_the_benchmark_and_a_cluster_is_not() -> None:
    def achieved(devices: int, device_hours: float) -> float:
        return H100.achieved(parameters=1e10, tokens=1e12, devices=devices, device_hours=device_hours)

    assert achieved(8, 100) == pytest.approx(ONE_NODE_GOODPUT * H100.benchmark_at(1e10))  # type: ignore[operator]
    assert achieved(1024, 100) == achieved(8, 1e6) == H100.whole_run(1e10)
    assert achieved(8, 100) > achieved(16, 100) > achieved(32, 100)


def test_devices_without_benchmarks_have_one_speed() -> None:
    l4 = find_device("L4").utilization
    assert l4.benchmark_at(1e10) is None
    assert l4.achieved(parameters=1e9, tokens=1e9, devices=1, device_hours=1) == l4.whole_run(1e9, 1e9)


@given(
    facts=st.sampled_from(EVERY),
    parameters=st.floats(1e5, 1e13),
    device_hours=st.floats(1e-3, 1e8),
    devices=st.integers(1, 20_000),
)
def test_more_devices_are_never_slower_together(
    facts: Utilization, parameters: float, device_hours: float, devices: int
) -> None:
    few, more = (
        n * facts.achieved(parameters=parameters, tokens=1e12, devices=n, device_hours=device_hours)
        for n in (devices, devices + 1)
    )
    assert few < more


@given(facts=st.sampled_from(EVERY), mid=st.floats(0.01, 0.85))
def test_intervals_hold_their_middle(facts: Utilization, mid: float) -> None:
    interval = facts.interval(mid)
    assert 0 < interval.low < interval.mid == mid < interval.high < 1


def test_fewer_published_runs_make_wider_intervals() -> None:
    many, few = (replace(A100, runs=runs).interval(0.2) for runs in (25, 5))
    assert few.low < many.low
    assert few.high > many.high


@pytest.mark.parametrize(("runs", "quantile"), [(7, 2.015), (12, 1.812), (32, 1.697)])
def test_widths_follow_students_t(runs: int, quantile: float) -> None:  # 5, 10 and 30 degrees of freedom
    interval = replace(A100, runs=runs, spread=0.1).interval(0.1)
    expected = 0.1 * quantile * math.sqrt(1 + 1 / runs)
    assert math.log(interval.high / interval.mid) == pytest.approx(expected, rel=0.01)


def test_without_tensor_cores_more_of_a_lower_peak_is_reached() -> None:
    slow = without_tensor_cores(0.36, 312 / 19.5)
    assert slow == pytest.approx(0.74, abs=0.01)
    assert slow * 19.5 < 0.36 * 312


@given(fraction=st.floats(0.01, 0.85), ratio=st.floats(1.5, 32))
def test_fp32_is_slower_than_16_bits_and_below_its_peak(fraction: float, ratio: float) -> None:
    slow = without_tensor_cores(fraction, ratio)
    assert 0 < slow < 1
    assert slow / ratio < fraction
