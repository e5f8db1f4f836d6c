from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.memory import GIB, Layout, peak_memory
from orchestrator.planning.model_shape import FAMILY_DEFAULTS, ModelShape, model_shape

GPU = Layout(
    workers=64,
    device="cuda",
    zero_stage=0,
    offload="none",
    precision="bf16",
    micro_batch=1,
    sequence_length=1024,
    activation_checkpointing=False,
)
CPU = replace(GPU, workers=1, device="cpu", precision="fp32")
SHAPE = model_shape(FAMILY_DEFAULTS["gpt2"], task="causal-lm")
LLAMA = model_shape(
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


def states_gb(layout: Layout, parameters: float) -> float:
    """Weights, gradients and optimizer states in GB, as the ZeRO paper counts them."""
    shape = replace(SHAPE, parameters=int(parameters))
    memory = peak_memory(layout, shape=shape, method="full", trainable=int(parameters))
    return (memory.weights_gib + memory.gradients_gib + memory.optimizer_gib) * GIB / 1e9


def peak(layout: Layout, shape: ModelShape = SHAPE) -> float:
    return peak_memory(layout, shape=shape, method="full", trainable=shape.parameters).peak_gib.mid


@pytest.mark.parametrize(("stage", "published_gb"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_papers_table(stage: int, published_gb: float) -> None:
    assert states_gb(replace(GPU, zero_stage=stage), 7.5e9) == pytest.approx(published_gb, rel=0.02)


def test_fp32_without_zero_keeps_16_bytes_a_weight() -> None:
    assert states_gb(CPU, 1e9) == pytest.approx(16, rel=0.001)


def test_fp32_under_zero_keeps_a_master_copy_besides() -> None:
    assert states_gb(replace(CPU, zero_stage=1), 1e9) == pytest.approx(20, rel=0.001)


@pytest.mark.parametrize(("micro_batch", "published_gb"), [(1, 21.3), (2, 29.07)])
def test_lora_of_llama_2_7b_is_within_the_interval_of_what_litgpt_measured(
    micro_batch: int, published_gb: float
) -> None:
    # One A100-40GB, Alpaca, longest sample 1304 tokens, rank 8 on query and value (litgpt's resource tables).
    layout = replace(GPU, workers=1, micro_batch=micro_batch, sequence_length=1304)
    estimate = peak_memory(layout, shape=LLAMA, method="lora", trainable=4_194_304).peak_gib
    assert estimate.low < published_gb * 1e9 / GIB < estimate.high


@pytest.mark.parametrize(
    ("change", "gib"),
    [
        # Peak resident memory of two AdamW steps of GPT-2 in fp32, one process with deepspeed loaded, one EPYC core.
        ({"layers": 4, "hidden": 512, "heads": 8, "micro_batch": 8, "sequence_length": 256}, 1.82),
        ({"layers": 6, "hidden": 768, "heads": 12, "micro_batch": 4, "sequence_length": 512}, 3.67),
    ],
)
def test_cpu_peak_is_within_the_interval_of_what_was_measured(change: dict[str, int], gib: float) -> None:
    sizes = {"n_layer": change["layers"], "n_embd": change["hidden"], "n_head": change["heads"], "vocab_size": 8192}
    shape = model_shape({**FAMILY_DEFAULTS["gpt2"], **sizes}, task="causal-lm")
    layout = replace(CPU, micro_batch=change["micro_batch"], sequence_length=change["sequence_length"])
    estimate = peak_memory(layout, shape=shape, method="full", trainable=shape.parameters).peak_gib
    assert estimate.low < gib < estimate.high


def test_each_stage_needs_no_more_than_the_one_before() -> None:
    peaks = [peak(replace(GPU, zero_stage=stage), LLAMA) for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)


def test_offload_moves_the_optimizer_and_then_the_weights_to_the_host() -> None:
    def memory(offload: Any) -> Any:
        return peak_memory(
            replace(GPU, zero_stage=3, offload=offload), shape=LLAMA, method="full", trainable=LLAMA.parameters
        )

    none, optimizer, everything = memory("none"), memory("optimizer"), memory("all")
    assert none.optimizer_gib > 0 == optimizer.optimizer_gib
    assert optimizer.weights_gib > 0 == everything.weights_gib
    assert none.host_gib == 0 < optimizer.host_gib < everything.host_gib


def test_checkpointing_keeps_less() -> None:
    sharded = replace(GPU, zero_stage=3)
    assert peak(replace(sharded, activation_checkpointing=True), LLAMA) < peak(sharded, LLAMA)


def test_frozen_backbone_keeps_less_than_adapters_and_these_less_than_full() -> None:
    kept = [
        peak_memory(GPU, shape=LLAMA, method=method, trainable=100).activations_gib
        for method in ("head", "lora", "full")
    ]  # fmt: skip
    assert kept[0] < kept[1] < kept[2]


def test_classification_has_no_logits_over_the_vocabulary() -> None:
    shape = model_shape(FAMILY_DEFAULTS["gpt2"], task="text-classification")
    assert peak_memory(GPU, shape=shape, method="full", trainable=shape.parameters).logits_gib == 0


@given(
    micro_batch=st.integers(1, 64),
    length=st.integers(16, 4096),
    stage=st.integers(0, 3),
    checkpointing=st.booleans(),
    workers=st.integers(1, 512),
)
def test_peak_grows_with_the_micro_batch(
    micro_batch: int, length: int, stage: int, checkpointing: bool, workers: int
) -> None:
    layout = replace(
        GPU,
        workers=workers,
        zero_stage=stage,
        micro_batch=micro_batch,
        sequence_length=length,
        activation_checkpointing=checkpointing,
    )
    assert peak(layout) <= peak(replace(layout, micro_batch=micro_batch + 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("length", [64, 256])
def test_activations_equal_what_autograd_saves(kind: str, method: Any, length: int) -> None:
    from tests.test_model_shape import BERT, GPT2
    from tests.test_model_shape import LLAMA as SMALL_LLAMA

    config = {"gpt2": GPT2, "llama": SMALL_LLAMA, "bert": BERT}[kind]
    task: Any = "text-classification" if kind == "bert" else "causal-lm"
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    saved = [_saved_bytes({**config, name: layers}, task, method, length) for layers in (1, 2)]
    layout = replace(CPU, micro_batch=4, sequence_length=length)
    shape = model_shape({**config, name: 1}, task=task)
    estimate = peak_memory(layout, shape=shape, method=method, trainable=1).activations_gib * GIB
    assert estimate == pytest.approx(saved[1] - saved[0], rel=0.01)


def _saved_bytes(config: dict[str, Any], task: str, method: str, length: int) -> int:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    rest = {key: value for key, value in config.items() if key != "model_type"}
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    model: Any = auto.from_config(AutoConfig.for_model(config["model_type"], **rest)).train()
    if method == "lora":
        targets = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
        # Rank 1: the estimate leaves out the adapters' own activations, which are as narrow as their rank.
        model = get_peft_model(model, LoraConfig(r=1, target_modules=targets[config["model_type"]]))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 1000, (4, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, labels=ids if task == "causal-lm" else torch.zeros(4, dtype=torch.long))
    assert output.loss is not None
    return sum(storage.nbytes() for storage in saved.values())
