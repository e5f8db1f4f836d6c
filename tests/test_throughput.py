from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.hardware import find_device
from orchestrator.planning.model_shape import FAMILY_DEFAULTS, model_shape
from orchestrator.planning.throughput import flops_per_token, run_cost

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
    task="causal-lm",
)
GPT2 = model_shape(FAMILY_DEFAULTS["gpt2"], task="causal-lm")


def test_full_training_takes_6_flops_a_weight_and_causal_attention() -> None:
    weights = LLAMA_7B.parameters - 32000 * 4096
    expected = 6 * weights + 6 * 32 * 4096 * 2048
    assert flops_per_token(LLAMA_7B, method="full", trainable=1, sequence_length=2048) == expected


def test_tied_output_layer_counts_as_multiplied() -> None:
    untied = model_shape({**FAMILY_DEFAULTS["gpt2"], "tie_word_embeddings": False}, task="causal-lm")
    tied_flops, untied_flops = (
        flops_per_token(s, method="full", trainable=1, sequence_length=1024) for s in (GPT2, untied)
    )
    assert tied_flops == untied_flops


def test_attention_to_both_sides_costs_twice_the_causal() -> None:
    causal, both = (
        flops_per_token(replace(GPT2, causal=c), method="full", trainable=1, sequence_length=1024)
        - flops_per_token(replace(GPT2, causal=c), method="full", trainable=1, sequence_length=0)
        for c in (True, False)
    )
    assert both == 2 * causal


def test_adapters_save_a_third_and_a_head_two_thirds() -> None:
    shape = model_shape(FAMILY_DEFAULTS["gpt2"], task="text-classification")
    full, lora, head = (
        flops_per_token(shape, method=m, trainable=shape.head_parameters, sequence_length=64)
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
        6 * parameters * 4e6,
        steps=round(tokens / 4e6),
        workers=1024,
        device=find_device(device),
        precision="bf16",
        usd_per_device_hour=None,
    )
    assert cost.gpu_hours.low < published_gpu_hours < cost.gpu_hours.high


def test_measured_cpu_step_lies_in_the_interval() -> None:
    # 4.96 s a step: GPT-2 of 4 x 512, vocabulary 8192, 8 x 256 tokens, fp32, one EPYC core.
    shape = model_shape(
        {**FAMILY_DEFAULTS["gpt2"], "n_layer": 4, "n_embd": 512, "n_head": 8, "vocab_size": 8192}, task="causal-lm"
    )
    flops = 8 * 256 * flops_per_token(shape, method="full", trainable=shape.parameters, sequence_length=256)
    cost = run_cost(flops, steps=1000, workers=1, device=find_device("cpu"), precision="fp32", usd_per_device_hour=None)
    assert cost.wall_hours.low < 4.96 * 1000 / 3600 < cost.wall_hours.high


def test_money_is_device_hours_times_the_price_and_unknown_without_one() -> None:
    common = {"steps": 10**6, "workers": 8, "device": find_device("H100"), "precision": "bf16"}
    priced = run_cost(1e15, usd_per_device_hour=2.0, **common)  # type: ignore[arg-type]
    assert priced.usd is not None
    assert priced.usd.mid == pytest.approx(2.0 * priced.gpu_hours.mid) == pytest.approx(16.0 * priced.wall_hours.mid)
    assert run_cost(1e15, usd_per_device_hour=None, **common).usd is None  # type: ignore[arg-type]


def test_recomputation_takes_a_third_more_time() -> None:
    plain, recomputed = (
        run_cost(
            1e18,
            steps=10**6,
            workers=1,
            device=find_device("A100"),
            precision="bf16",
            usd_per_device_hour=None,
            activation_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    )
    assert recomputed.wall_hours.mid == pytest.approx(4 / 3 * plain.wall_hours.mid, rel=0.001)


def test_cores_of_a_cpu_worker_share_its_work() -> None:
    one, four = (
        run_cost(
            1e12,
            steps=10**5,
            workers=2,
            device=find_device("cpu"),
            precision="fp32",
            cpus_per_worker=cores,
            usd_per_device_hour=0.05 * cores,
        )
        for cores in (1, 4)
    )
    assert four.wall_hours.mid == pytest.approx(one.wall_hours.mid / 4, rel=0.001)


@given(steps=st.integers(1, 10**7), workers=st.integers(1, 4096))
def test_hours_grow_with_steps_and_shrink_with_workers(steps: int, workers: int) -> None:
    def wall(steps: int, workers: int) -> float:
        cost = run_cost(
            1e15,
            steps=steps,
            workers=workers,
            device=find_device("H100"),
            precision="bf16",
            usd_per_device_hour=None,
        )
        assert cost.wall_hours.low < cost.wall_hours.mid < cost.wall_hours.high
        return cost.wall_hours.mid

    assert wall(steps, workers) < wall(steps + 1, workers)
    assert wall(steps, workers + 1) < wall(steps, workers)
