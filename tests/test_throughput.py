from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.architectures.families import FAMILY_DEFAULTS, model_shape
from orchestrator.methods.registry import PRICED
from orchestrator.planning.communication import _STATES_BYTES
from orchestrator.planning.hardware import Device, catalogue, find_device
from orchestrator.planning.throughput import PricedRun, RunCost, flops_per_token, run_cost, usual_batch_tokens
from orchestrator.tasks.registry import task_of

FULL = PRICED["full"].cost
LORA = PRICED["lora"].cost
QLORA = PRICED["qlora"].cost
LLAMA_7B = model_shape(
    {
        **FAMILY_DEFAULTS["llama"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    task=task_of("causal-lm"),
)
EVERY_GPU = [device for device in catalogue().values() if device.kind == "gpu"]


def cost_of(parameters: float, tokens: float, *, gpu: str = "A100", workers: int = 1024, **settings: Any) -> RunCost:
    arguments: dict[str, Any] = {"precision": "bf16", "usd_per_device_hour": None, "parameters": parameters, **settings}
    return run_cost(
        PricedRun(
            flops_per_step=6 * parameters * tokens, steps=1, workers=workers, device=find_device(gpu), **arguments
        )
    )


GPT2 = model_shape(FAMILY_DEFAULTS["gpt2"], task=task_of("causal-lm"))


def test_masked_language_model_costs_its_output_layer_and_transform_at_every_position() -> None:
    shape = model_shape(FAMILY_DEFAULTS["bert"], task=task_of("masked-lm"))
    per_layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    transform, output = 768 * 768 + 3 * 768, 30522 * 768 + 30522
    weights = 12 * per_layer + 2 * 768 + transform + output
    attention = 12 * 12 * 768 * 512  # every token sees every other
    flops = flops_per_token(shape, method=FULL, trainable=shape.parameters, sequence_length=512)
    assert flops == pytest.approx(6 * weights + attention)


def test_full_training_takes_6_flops_a_weight_and_causal_attention() -> None:
    weights = LLAMA_7B.parameters - 32000 * 4096
    expected = 6 * weights + 6 * 32 * 4096 * 2048
    assert flops_per_token(LLAMA_7B, method=FULL, trainable=1, sequence_length=2048) == expected


def test_tied_output_layer_counts_as_multiplied() -> None:
    untied = model_shape({**FAMILY_DEFAULTS["gpt2"], "tie_word_embeddings": False}, task=task_of("causal-lm"))
    tied_flops, untied_flops = (
        flops_per_token(s, method=FULL, trainable=1, sequence_length=1024) for s in (GPT2, untied)
    )
    assert tied_flops == untied_flops


def test_attention_to_both_sides_costs_twice_the_causal() -> None:
    causal, both = (
        flops_per_token(replace(GPT2, causal=c), method=FULL, trainable=1, sequence_length=1024)
        - flops_per_token(replace(GPT2, causal=c), method=FULL, trainable=1, sequence_length=0)
        for c in (True, False)
    )
    assert both == 2 * causal


def test_adapters_save_a_third_and_a_head_two_thirds() -> None:
    shape = model_shape(FAMILY_DEFAULTS["gpt2"], task=task_of("text-classification"))
    full, lora, head = (
        flops_per_token(shape, method=PRICED[m].cost, trainable=shape.head_parameters, sequence_length=64)
        for m in ("full", "lora", "head")
    )  # fmt: skip
    assert lora / full == pytest.approx(2 / 3, rel=0.02)
    assert head / full == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("device", "parameters", "tokens", "published_gpu_hours"),
    [
        ("A100-80GB", 6738417664, 2.0e12, 184_320),  # Llama-2-7B, model card
        ("A100-80GB", 65.2e9, 1.4e12, 1_022_362),  # LLaMA-65B, arXiv 2302.13971
        ("A100-80GB", 68.98e9, 2.0e12, 1_720_320),  # Llama-2-70B, model card
        ("H100-80GB", 8.03e9, 15e12, 1_300_000),  # Llama-3-8B, model card
    ],
)
def test_published_trainings_lie_in_the_interval(
    device: str, parameters: float, tokens: float, published_gpu_hours: float
) -> None:
    cost = run_cost(
        PricedRun(
            flops_per_step=6 * parameters * 4e6,
            steps=round(tokens / 4e6),
            workers=1024,
            device=find_device(device),
            precision="bf16",
            usd_per_device_hour=None,
        )
    )
    assert cost.gpu_hours.low < published_gpu_hours < cost.gpu_hours.high


def test_measured_cpu_step_lies_in_the_interval() -> None:
    # 4.96 s a step: GPT-2 of 4 x 512, vocabulary 8192, 8 x 256 tokens, fp32, one EPYC core.
    shape = model_shape(
        {**FAMILY_DEFAULTS["gpt2"], "n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 8192},
        task=task_of("causal-lm"),
    )
    flops = 8 * 256 * flops_per_token(shape, method=FULL, trainable=shape.parameters, sequence_length=256)
    cost = run_cost(
        PricedRun(
            flops_per_step=flops,
            steps=1000,
            workers=1,
            device=find_device("cpu"),
            precision="fp32",
            usd_per_device_hour=None,
        )
    )
    assert cost.wall_hours.low < 4.96 * 1000 / 3600 < cost.wall_hours.high


def test_money_is_device_hours_times_the_price_and_unknown_without_one() -> None:
    common = {"steps": 10**6, "workers": 8, "device": find_device("H100"), "precision": "bf16"}
    priced = run_cost(PricedRun(flops_per_step=1e15, usd_per_device_hour=2.0, **common))  # type: ignore[arg-type]
    assert priced.usd is not None
    assert priced.usd.mid == pytest.approx(2.0 * priced.gpu_hours.mid) == pytest.approx(16.0 * priced.wall_hours.mid)
    assert run_cost(PricedRun(flops_per_step=1e15, usd_per_device_hour=None, **common)).usd is None  # type: ignore[arg-type]


def test_recomputation_takes_a_third_more_time() -> None:
    plain, recomputed = (
        run_cost(
            PricedRun(
                flops_per_step=1e18,
                steps=10**6,
                workers=1,
                device=find_device("A100"),
                precision="bf16",
                usd_per_device_hour=None,
                activation_checkpointing=checkpointing,
            )
        )
        for checkpointing in (False, True)
    )
    assert recomputed.wall_hours.mid == pytest.approx(4 / 3 * plain.wall_hours.mid, rel=0.001)


def test_cores_of_a_cpu_worker_share_its_work() -> None:
    one, four = (
        run_cost(
            PricedRun(
                flops_per_step=1e12,
                steps=10**5,
                workers=2,
                device=find_device("cpu"),
                precision="fp32",
                cpus_per_worker=cores,
                usd_per_device_hour=0.05 * cores,
            )
        )
        for cores in (1, 4)
    )
    assert four.wall_hours.mid == pytest.approx(one.wall_hours.mid / 4, rel=0.001)


@given(steps=st.integers(1, 10**7), workers=st.integers(1, 4096))
def test_hours_grow_with_steps_and_shrink_with_workers(steps: int, workers: int) -> None:
    def wall(steps: int, workers: int) -> float:
        cost = run_cost(
            PricedRun(
                flops_per_step=1e15,
                steps=steps,
                workers=workers,
                device=find_device("H100"),
                precision="bf16",
                usd_per_device_hour=None,
            )
        )
        assert cost.wall_hours.low < cost.wall_hours.mid < cost.wall_hours.high
        return cost.wall_hours.mid

    assert wall(steps, workers) < wall(steps + 1, workers)
    assert wall(steps, workers + 1) < wall(steps, workers)


@given(
    device=st.sampled_from(EVERY_GPU),
    parameters=st.floats(1e6, 1e12),
    tokens=st.floats(1e6, 1e14),
    workers=st.integers(1, 4096),
    stage=st.sampled_from([None, 0, 1, 2, 3]),
    factor=st.floats(1.01, 10),
)
def test_time_grows_with_tokens_and_parameters(
    device: Device, parameters: float, tokens: float, workers: int, stage: int | None, factor: float
) -> None:
    def hours(parameters: float, tokens: float) -> float:
        cost = cost_of(parameters, tokens, gpu=device.name, workers=workers, zero_stage=stage)
        assert cost.wall_hours.low < cost.wall_hours.mid < cost.wall_hours.high
        assert cost.achieved_fraction.low < cost.achieved_fraction.mid < cost.achieved_fraction.high < 1
        return cost.wall_hours.mid

    assert hours(parameters, tokens) < hours(parameters, factor * tokens)
    # Of models that a device holds whole: what it sends of a larger one is capped, and its usual batches are larger.
    if stage in (None, 3) or factor * parameters * _STATES_BYTES[stage] <= device.memory_gib * 2**30:
        assert hours(parameters, tokens) <= hours(factor * parameters, tokens) * (1 + 1e-9)


@given(
    device=st.sampled_from(EVERY_GPU),
    parameters=st.floats(1e6, 1e11),
    tokens=st.floats(1e6, 1e13),
    workers=st.integers(1, 2000),
    stage=st.sampled_from([None, 0, 1, 2]),
)
def test_more_gpus_never_take_longer_where_the_batch_is_large(
    device: Device, parameters: float, tokens: float, workers: int, stage: int | None
) -> None:
    few, more = (
        cost_of(parameters, tokens, gpu=device.name, workers=n, zero_stage=stage, tokens_per_device_step=2e6)
        for n in (workers, workers + 1)
    )
    assert more.wall_hours.mid < few.wall_hours.mid


def test_zero_3_at_scale_waits_for_the_network_and_says_so() -> None:
    mixed, sharded = (cost_of(175e9, 3e11, workers=1536, zero_stage=stage) for stage in (None, 3))
    assert sharded.gpu_hours.mid > 2 * mixed.gpu_hours.mid
    assert any("communication: ZeRO-3" in reason for reason in sharded.reasons)
    assert not any("communication" in reason for reason in mixed.reasons)


def test_more_tokens_a_step_hide_the_network() -> None:
    small, large = (cost_of(175e9, 3e11, workers=1536, zero_stage=3, tokens_per_device_step=n) for n in (2048, 32768))
    assert large.gpu_hours.mid < 0.5 * small.gpu_hours.mid


def test_micro_batches_gather_the_weights_again() -> None:
    one, many = (
        cost_of(30e9, 1e12, workers=512, zero_stage=3, tokens_per_device_step=16384, accumulation=n) for n in (1, 16)
    )
    assert many.gpu_hours.mid > 1.5 * one.gpu_hours.mid


def test_goodput_is_apart_from_benchmarks_and_better_on_one_node() -> None:
    cluster, node = cost_of(7e9, 1e12), cost_of(7e9, 1e9, workers=8)
    assert cluster.benchmark_fraction == node.benchmark_fraction
    assert cluster.goodput is not None
    assert node.goodput is not None
    assert cluster.goodput < node.goodput <= 0.91
    assert cluster.achieved_fraction.mid == pytest.approx(cluster.goodput * cluster.benchmark_fraction)  # type: ignore[operator]
    assert "goodput" in cluster.reasons[0]


def test_devices_without_benchmarks_have_no_goodput() -> None:
    cost = cost_of(1e9, 1e9, gpu="L4", workers=1)
    assert cost.goodput is cost.benchmark_fraction is None


def test_small_models_reach_less_of_an_h100() -> None:
    small, large = (cost_of(n, 1e13, gpu="H100").achieved_fraction.mid for n in (8e9, 400e9))
    assert small < 0.6 * large


def test_fp32_takes_several_times_as_long_and_says_why() -> None:
    half, single = (cost_of(7e9, 1e12, precision=p) for p in ("bf16", "fp32"))
    assert 4 < single.gpu_hours.mid / half.gpu_hours.mid < 16
    assert any("tensor cores" in reason for reason in single.reasons)


def test_dequantisation_and_offload_take_longer() -> None:
    plain = cost_of(7e9, 1e9, workers=1, method=LORA).gpu_hours.mid
    assert cost_of(7e9, 1e9, workers=1, method=QLORA).gpu_hours.mid == pytest.approx(1.4 * plain, rel=0.02)
    moved = cost_of(7e9, 1e12, workers=8, zero_stage=2, offload="optimizer")
    assert moved.gpu_hours.mid > cost_of(7e9, 1e12, workers=8, zero_stage=2).gpu_hours.mid
    assert any("offload: optimizer" in reason for reason in moved.reasons)


@pytest.mark.parametrize("method", ["qlora", "prefix", "prompt", "ia3", "adapter"])
def test_methods_with_a_frozen_base_count_as_lora(method: str) -> None:
    lora, other = (
        flops_per_token(LLAMA_7B, method=PRICED[m].cost, trainable=10**6, sequence_length=1024)
        for m in ("lora", method)
    )
    assert lora == other


def test_usual_batches_grow_from_half_a_million_to_four_million_tokens() -> None:
    assert usual_batch_tokens(1e8) == 0.5e6
    assert usual_batch_tokens(1e9) < usual_batch_tokens(7e9) < usual_batch_tokens(175e9) == 4.19e6


def test_a_short_run_takes_no_less_than_its_start() -> None:
    cost = cost_of(1e6, 1e3, workers=1)
    assert cost.wall_hours.low * 3600 >= 18
