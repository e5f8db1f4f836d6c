from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.methods.registry import PRICED
from orchestrator.planning.communication import (
    GLOO_EFFICIENCY,
    Step,
    collective_seconds,
    nodes_of,
    offload_seconds,
    sent_bytes,
    slowdown,
)
from orchestrator.planning.hardware import find_device

FULL = PRICED["full"].cost
A100 = find_device("A100")
STEP = Step(
    parameters=174.6e9,
    trainable=174.6e9,
    workers=768,
    nodes=96,
    zero_stage=3,
    offload="none",
    tokens_per_device=4096,
    accumulation=1,
    method=FULL,
)


@pytest.mark.parametrize(
    ("parameters", "workers", "tokens_per_device", "tflops"),
    [
        (174.6e9, 384, 8192, 144),  # Narayanan 2021, table 2: ZeRO-3 without model parallelism, recomputation included
        (174.6e9, 768, 4096, 88),
        (529.6e9, 640, 8192, 138),
        (529.6e9, 2240, 2048, 48),
    ],
)
def test_published_speeds_of_zero_3_are_reproduced(
    parameters: float, workers: int, tokens_per_device: float, tflops: float
) -> None:
    step = replace(
        STEP, parameters=parameters, workers=workers, nodes=workers // 8, tokens_per_device=tokens_per_device
    )
    alone = 155e12 * 3 / 4  # of model FLOPs: tensor and pipeline parallelism reach 153 to 171 in the same table
    slower, _ = slowdown(step, A100, flops_per_second=alone)
    assert 155 / slower == pytest.approx(tflops, rel=0.15)


def test_usual_mixtures_of_parallelism_add_nothing() -> None:
    assert slowdown(replace(STEP, zero_stage=None), A100, flops_per_second=1e14) == (1.0, ())


def test_one_device_talks_to_nobody() -> None:
    assert collective_seconds(replace(STEP, workers=1, nodes=1), A100) == 0.0


def test_links_within_a_node_are_faster_than_the_network() -> None:
    near, far = (collective_seconds(replace(STEP, workers=8, nodes=n), A100) for n in (1, 2))
    assert far / near == pytest.approx(12)


def test_zero_2_and_3_pay_for_every_micro_batch_and_others_once() -> None:
    def grows(stage: int) -> float:
        step = replace(STEP, parameters=7e9, trainable=7e9, zero_stage=stage)
        return collective_seconds(replace(step, accumulation=4), A100) / collective_seconds(step, A100)

    assert (grows(3), grows(1), grows(0)) == (4, 1, 1)
    assert grows(2) == pytest.approx((4 * 2 + 1) / (2 + 1))  # the gathering of the weights comes once


CPU = find_device("cpu")
SMALL = replace(STEP, parameters=2e6, trainable=2e6, workers=2, nodes=2, zero_stage=2, element_bytes=4, accumulation=2)


@pytest.mark.parametrize(("stage", "accumulation", "copies"), [(0, 2, 2), (1, 2, 3), (2, 1, 3), (2, 2, 5), (3, 2, 8)])
def test_what_two_hosts_send_is_what_was_counted_at_their_cards(stage: int, accumulation: int, copies: int) -> None:
    """In copies of the weights, of which a rank of two sends half. Of 1.97M weights 7.9, 11.8, 11.8, 19.7 and 31.5 MB;
    counted 8.9, 11.3, 11.3, 19.7 and 29.2, start and control messages among them, and small weights kept whole by
    ZeRO-3."""
    step = replace(SMALL, zero_stage=stage, accumulation=accumulation)
    assert sent_bytes(step, CPU) == pytest.approx(copies * 4 * 2e6 / 2)


def test_a_cpu_sends_after_it_has_computed_and_a_gpu_meanwhile() -> None:
    step = replace(SMALL, network_gb_s=0.0125)
    sending = collective_seconds(step, CPU)
    assert sending == pytest.approx(20e6 / (12.5e6 * GLOO_EFFICIENCY))
    computing = 6 * 2e6 * 4096 / 1e10
    slower, reasons = slowdown(step, CPU, flops_per_second=1e10)
    assert slower == pytest.approx((computing + sending) / computing)
    assert "of computation" in reasons[0]
    on_gpu, _ = slowdown(step, A100, flops_per_second=1e10)
    assert on_gpu == 1.0


def test_a_network_of_unknown_speed_is_said_not_guessed() -> None:
    slower, (reason,) = slowdown(SMALL, CPU, flops_per_second=1e10)
    assert slower == 1.0
    assert "resources.network_gbit" in reason


def test_a_network_that_was_measured_counts_instead_of_the_catalogues() -> None:
    known = collective_seconds(STEP, A100)
    assert A100.network_gb_s is not None
    assert collective_seconds(replace(STEP, network_gb_s=A100.network_gb_s / 4), A100) == pytest.approx(4 * known)


def test_frozen_and_quantised_weights_are_cheaper_to_gather() -> None:
    full, lora, qlora = (
        collective_seconds(replace(STEP, method=PRICED[m].cost), A100) for m in ("full", "lora", "qlora")
    )
    assert full > lora > qlora


def test_the_reason_names_the_network_and_the_way_out() -> None:
    slower, reasons = slowdown(STEP, A100, flops_per_second=1e14)
    assert slower > 1
    assert "network of the A100-80GB" in reasons[0]
    assert "more tokens" in reasons[0]


def test_offload_costs_time_and_offloading_all_costs_more() -> None:
    step = replace(STEP, parameters=7e9, trainable=7e9, workers=8, nodes=1)
    none, optimizer, everything = (offload_seconds(replace(step, offload=o)) for o in ("none", "optimizer", "all"))
    assert none == 0 < optimizer < everything
    slower, reasons = slowdown(replace(step, offload="optimizer"), A100, flops_per_second=1e14)
    assert slower > 1
    assert "rule of thumb" in reasons[-1]


def test_nodes_hold_eight_devices() -> None:
    assert [nodes_of(n) for n in (1, 8, 9, 64)] == [1, 1, 2, 8]


@given(
    stage=st.sampled_from([None, 0, 1, 2, 3]),
    offload=st.sampled_from(["none", "optimizer", "all"]),
    method=st.sampled_from(["full", "lora", "qlora", "head"]),
    parameters=st.floats(1e6, 1e12),
    workers=st.integers(1, 5000),
    tokens=st.floats(64, 1e7),
)
def test_a_step_never_takes_less_than_its_computation(
    stage: int | None, offload: str, method: str, parameters: float, workers: int, tokens: float
) -> None:
    step = Step(
        parameters=parameters,
        trainable=parameters,
        workers=workers,
        nodes=nodes_of(workers),
        zero_stage=stage,
        offload=offload,
        tokens_per_device=tokens,
        accumulation=1,
        method=PRICED[method].cost,
    )
    slower, _ = slowdown(step, A100, flops_per_second=1e14)
    more_tokens, _ = slowdown(replace(step, tokens_per_device=2 * tokens), A100, flops_per_second=1e14)
    assert slower >= more_tokens >= 1
