from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.planning.deepspeed_config import deepspeed_config
from orchestrator.planning.memory import Layout
from orchestrator.spec import TrainingSpec

TRAINING = TrainingSpec.model_validate(
    {"steps": 10, "global_batch": 32, "learning_rate": 3e-4, "weight_decay": 0.1, "adam_beta2": 0.95}
)
CPU = Layout(
    workers=1,
    device="cpu",
    zero_stage=2,
    offload="none",
    precision="fp32",
    micro_batch=8,
    sequence_length=128,
    activation_checkpointing=False,
)
GPU = replace(CPU, device="cuda", precision="bf16", workers=2)


def config(layout: Layout, accumulation: int = 4, **raw: Any) -> dict[str, Any]:
    return deepspeed_config(layout, training=TRAINING, accumulation=accumulation, trainable=10**6, raw=raw)


def test_batch_is_workers_times_micro_batch_times_accumulation() -> None:
    made = config(GPU)
    assert made["train_batch_size"] == 64
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_accumulation_steps"] == 4


def test_optimizer_is_the_specs_adamw_and_there_is_no_scheduler() -> None:
    made = config(CPU)
    params = made["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["weight_decay"]) == (3e-4, [0.9, 0.95], 0.1)
    assert made["gradient_clipping"] == 1.0
    assert "scheduler" not in made


@pytest.mark.parametrize(("precision", "block"), [("fp32", None), ("bf16", "bf16"), ("fp16", "fp16")])
def test_only_the_chosen_precision_is_enabled(precision: Any, block: str | None) -> None:
    made = config(replace(GPU, precision=precision))
    assert {name for name in ("bf16", "fp16") if name in made} == ({block} if block else set())


def test_communication_overlaps_only_on_gpus() -> None:
    assert config(GPU)["zero_optimization"]["overlap_comm"] is True
    assert config(CPU)["zero_optimization"]["overlap_comm"] is False


def test_buckets_are_no_larger_than_the_model() -> None:
    assert config(CPU)["zero_optimization"]["reduce_bucket_size"] == 10**6


def test_stage_3_gathers_weights_so_that_the_model_can_be_exported() -> None:
    zero = config(replace(GPU, zero_stage=3))["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    ("offload", "blocks"),
    [("none", set()), ("optimizer", {"offload_optimizer"}), ("all", {"offload_optimizer", "offload_param"})],
)
def test_offload_moves_what_it_says(offload: Any, blocks: set[str]) -> None:
    made = config(replace(GPU, zero_stage=3, offload=offload))
    assert {key for key in made["zero_optimization"] if key.startswith("offload")} == blocks


def test_offloaded_optimizer_is_deepspeeds_own_and_any_other_pytorchs() -> None:
    assert "torch_adam" not in config(replace(GPU, offload="optimizer"))["optimizer"]["params"]
    assert config(GPU)["optimizer"]["params"]["torch_adam"] is True


def test_raw_keys_are_merged_block_by_block_and_win() -> None:
    made = config(
        GPU, zero_optimization={"overlap_comm": False, "round_robin_gradients": True}, prescale_gradients=True
    )
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["zero_optimization"]["round_robin_gradients"] is True
    assert made["zero_optimization"]["stage"] == 2
    assert made["prescale_gradients"] is True


def test_config_is_plain_json() -> None:
    assert json.loads(json.dumps(config(GPU))) == config(GPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("stage", "offload"),
    [*((n, "none") for n in range(4)), *((n, "optimizer") for n in (1, 2, 3)), (3, "all")],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_accepts_every_layout(stage: int, offload: Any, precision: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    made = config(replace(GPU, workers=1, zero_stage=stage, offload=offload, precision=precision))
    read = DeepSpeedConfig(made)
    assert read.zero_config.stage == stage
    assert read.zero_config.overlap_comm is (stage > 0)
    assert (read.zero_config.offload_param is not None) == (offload == "all")
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.float16_config.enabled == (precision == "fp16")
    assert read.zero_allow_untested_optimizer


@pytest.mark.parametrize(
    ("precision", "stage", "accumulation", "asked"),
    [("bf16", 2, 4, True), ("bf16", 3, 4, True), ("bf16", 2, 1, False), ("bf16", 1, 4, False), ("fp32", 2, 4, False)],
)
def test_gradients_of_bf16_micro_batches_are_summed_in_fp32(
    precision: Any, stage: int, accumulation: int, asked: bool
) -> None:
    """Where DeepSpeed does it on request, and there is a sum; without sharded gradients the engine sees to it."""
    made = config(replace(GPU, precision=precision, zero_stage=stage), accumulation)
    assert made.get("data_types") == ({"grad_accum_dtype": "fp32"} if asked else None)
