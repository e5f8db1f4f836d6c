from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.families import FAMILY_DEFAULTS, model_config, model_shape
from orchestrator.architectures.weight_names import HEAD_MODULES, KNOWN
from orchestrator.errors import ModelError
from orchestrator.methods import ia3, lora
from orchestrator.methods.registry import method_of, trainable_parameters
from orchestrator.spec import ModelSpec, RunSpec, Task
from orchestrator.tasks.registry import task_of

BERT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
LLAMA = {**FAMILY_DEFAULTS["llama"], "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000}
QWEN = {name: value for name, value in LLAMA.items() if name not in ("head_dim", "attention_bias", "mlp_bias")}
GPT2 = {**FAMILY_DEFAULTS["gpt2"], "n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 1000}
ROBERTA = {**BERT, "model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1}
DISTILBERT = {
    "model_type": "distilbert", "vocab_size": 1000, "dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 384
}  # fmt: skip


def spec(method: str = "full", task: Task = "causal-lm", **changes: Any) -> RunSpec:
    raw: dict[str, Any] = {
        "name": "t",
        "kind": "finetune",
        "model": {"base": "./base"},
        "method": method,
        "task": task,
        "data": {"train": "x", "label_column": "label" if task == "text-classification" else None},
        "training": {"steps": 1, "global_batch": 1, "learning_rate": 1e-3},
    }
    return RunSpec.model_validate({**raw, **changes})


def test_gpt2_small_has_its_published_number_of_parameters() -> None:
    shape = model_shape(FAMILY_DEFAULTS["gpt2"], task=task_of("causal-lm"))
    assert (shape.parameters, shape.exact, shape.context) == (124_439_808, True, 1024)


def test_untied_output_layer_adds_a_second_token_table() -> None:
    tied = model_shape(LLAMA, task=task_of("causal-lm"))
    untied = model_shape({**LLAMA, "tie_word_embeddings": False}, task=task_of("causal-lm"))
    assert untied.parameters - tied.parameters == 1000 * 768
    assert not untied.tied


def test_unknown_architecture_is_counted_and_marked_approximate() -> None:
    shape = model_shape({**LLAMA, "model_type": "olmo9"}, task=task_of("causal-lm"))
    exact = model_shape(LLAMA, task=task_of("causal-lm"))
    assert not shape.exact
    assert shape.parameters == pytest.approx(exact.parameters, rel=0.01)


def test_family_defaults_become_the_config_with_the_trained_tokenizers_vocabulary() -> None:
    config = model_config(ModelSpec(config="gpt2", overrides={"n_layer": 2}, vocab_size=500))
    assert (config["n_layer"], config["vocab_size"], config["n_embd"]) == (2, 500, 768)


def test_counted_vocabulary_wins_over_the_asked_one() -> None:
    assert model_config(ModelSpec(config="gpt2", vocab_size=500), vocab_size=400)["vocab_size"] == 400


def test_given_tokenizer_leaves_the_vocabulary_to_the_dataset() -> None:
    model = ModelSpec(config="llama", tokenizer="./tokenizer")
    assert model_config(model)["vocab_size"] == 32000
    assert model_config(model, vocab_size=777)["vocab_size"] == 777


@pytest.mark.parametrize(("overrides", "context"), [({}, 4096), ({"n_positions": 128}, 128)])
def test_context_grows_with_the_sequence_unless_the_user_set_it(overrides: dict[str, Any], context: int) -> None:
    assert model_config(ModelSpec(config="gpt2", overrides=overrides), sequence_length=4096)["n_positions"] == context


def test_short_sequences_do_not_shrink_the_context() -> None:
    assert model_config(ModelSpec(config="gpt2"), sequence_length=64)["n_positions"] == 1024


def test_making_a_config_does_not_change_the_familys_defaults() -> None:
    model_config(ModelSpec(config="gpt2", overrides={"n_layer": 2}))
    assert FAMILY_DEFAULTS["gpt2"]["n_layer"] == 12


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [({"n_layers": 2}, "n_layer"), ({"hidden_size": 64}, "n_embd"), ({"vocab_size": 9}, "model.vocab_size")],
)
def test_unknown_override_names_the_right_one(overrides: dict[str, Any], hint: str) -> None:
    with pytest.raises(ModelError) as error:
        model_config(ModelSpec(config="gpt2", overrides=overrides))
    assert hint in str(error.value.do)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("gpt2", {"n_embd": 100, "n_head": 12}), ("llama", {"num_attention_heads": 8, "num_key_value_heads": 3})],
)
def test_heads_that_do_not_divide_are_refused(family: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="split evenly"):
        model_config(ModelSpec(config=family, overrides=overrides))


def test_config_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    assert model_config(ModelSpec(base=str(tmp_path))) == BERT
    assert model_config(ModelSpec(config=str(tmp_path / "config.json"), tokenizer="x")) == BERT


def test_overrides_apply_to_a_config_file_but_not_its_unknown_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    assert model_config(ModelSpec(config=str(tmp_path), overrides={"num_hidden_layers": 2}))["num_hidden_layers"] == 2
    with pytest.raises(ModelError, match="no setting n_layer"):
        model_config(ModelSpec(config=str(tmp_path), overrides={"n_layer": 2}))


def test_base_keeps_its_vocabulary_and_refuses_a_larger_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    assert model_config(ModelSpec(base=str(tmp_path)), vocab_size=30000)["vocab_size"] == 30522
    with pytest.raises(ModelError, match="more entries"):
        model_config(ModelSpec(base=str(tmp_path)), vocab_size=40000)


@pytest.mark.parametrize("location", ["./nowhere", "/nowhere/model", "package://orchestrator/nowhere"])
def test_missing_folder_is_named_and_no_hub_is_asked(location: str) -> None:
    with pytest.raises(ModelError, match="names no folder"):
        model_config(ModelSpec(base=location))


def test_missing_folder_below_an_existing_one_is_a_path_not_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="names no folder"):
        model_config(ModelSpec(base="models/mine"))


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": 3}'])
def test_file_that_is_no_model_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="not a Hugging Face configuration"):
        model_config(ModelSpec(base=str(tmp_path)))


def test_an_adapter_in_the_place_of_a_base_is_told_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter") as error:
        model_config(ModelSpec(base=str(tmp_path)))
    assert "export=merged" in str(error.value.do)


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        model_config(ModelSpec(base=str(tmp_path)))


def test_unreachable_hub_is_a_model_error_that_names_the_model() -> None:
    script = (
        "from orchestrator.architectures.families import model_config\n"
        "from orchestrator.spec import ModelSpec\n"
        "from orchestrator.errors import ModelError\n"
        "try: model_config(ModelSpec(base='no-such-owner/no-such-model'))\n"
        "except ModelError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert "no-such-owner/no-such-model" in done.stdout
    assert "hub" in done.stdout


def test_encoder_cannot_learn_language_modelling() -> None:
    with pytest.raises(ModelError, match="cannot learn to continue"):
        model_shape(BERT, task=task_of("causal-lm"))


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN | {"model_type": "qwen3"}])
def test_decoder_cannot_learn_to_fill_gaps(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="cannot fill a gap") as error:
        model_shape(config, task=task_of("masked-lm"))
    assert "causal-lm" in str(error.value.do)


def test_encoder_that_is_not_like_bert_is_counted_as_a_usual_one_that_sees_both_sides() -> None:
    shape = model_shape({**BERT, "model_type": "mpnet"}, task=task_of("masked-lm"))
    assert not shape.exact
    assert not shape.causal
    assert shape.parameters == pytest.approx(model_shape(BERT, task=task_of("masked-lm")).parameters, rel=0.03)
    with pytest.raises(ModelError, match="task: masked-lm"):
        model_shape({**BERT, "model_type": "mpnet"}, task=task_of("causal-lm"))


def test_bert_base_has_its_published_number_of_parameters() -> None:
    # That has a pooler (768^2 + 768), which a masked language model lacks; its head is the transform and a bias.
    shape = model_shape(FAMILY_DEFAULTS["bert"], task=task_of("masked-lm"))
    assert shape.parameters == 109_482_240 - (768**2 + 768) + (768**2 + 768 + 2 * 768) + 30522
    assert shape.head_parameters == 0


def test_new_encoder_has_room_for_its_sequences() -> None:
    roberta = ModelSpec(config="roberta")
    config = model_config(roberta, sequence_length=1024)
    assert config["max_position_embeddings"] == 1026
    assert model_shape(config, task=task_of("masked-lm")).context == 1024
    assert model_config(ModelSpec(config="bert"), sequence_length=1024)["max_position_embeddings"] == 1024


def test_lora_trains_the_adapters_and_what_lies_before_the_output_layer_of_an_encoder() -> None:
    shape = model_shape(BERT, task=task_of("masked-lm"))
    transform = 384 * 384 + 384 + 2 * 384
    attention = spec("lora", "masked-lm", lora={"targets": "attention"})
    assert trainable_parameters(attention, shape) == 6 * 2 * 8 * 768 + transform
    assert trainable_parameters(spec("lora", "masked-lm"), shape) == 6 * (4 * 8 * 768 + 2 * 8 * 1920) + transform


def test_missing_size_is_named() -> None:
    with pytest.raises(ModelError, match="num_hidden_layers"):
        model_shape({k: v for k, v in BERT.items() if k != "num_hidden_layers"}, task=task_of("text-classification"))


def test_roberta_loses_two_positions_to_its_padding() -> None:
    assert model_shape(ROBERTA, task=task_of("text-classification")).context == 512


def test_full_and_scratch_train_every_weight() -> None:
    shape = model_shape(GPT2, task=task_of("causal-lm"))
    assert trainable_parameters(spec("full"), shape) == trainable_parameters(spec("scratch"), shape) == shape.parameters


def test_head_trains_berts_pooler_and_classifier() -> None:
    shape = model_shape(BERT, task=task_of("text-classification"), num_labels=3)
    assert trainable_parameters(spec("head", "text-classification"), shape) == (384 * 384 + 384) + (384 * 3 + 3)


def test_lora_on_minilm_trains_adapters_pooler_and_classifier() -> None:
    shape = model_shape(BERT, task=task_of("text-classification"), num_labels=2)
    adapters, head = 6 * (4 * 8 * 768 + 2 * 8 * (384 + 1536)), (384 * 384 + 384) + (384 * 2 + 2)
    assert trainable_parameters(spec("lora", "text-classification"), shape) == adapters + head


def test_lora_target_that_no_module_has_is_refused_with_the_names_there_are() -> None:
    shape = model_shape(GPT2, task=task_of("causal-lm"))
    with pytest.raises(ModelError) as error:
        trainable_parameters(spec("lora", lora={"targets": ["c_atn"]}), shape)
    assert error.value.do == "did you mean c_attn?"


def test_an_unknown_architecture_has_the_linear_modules_of_a_standard_one_and_no_known_attention() -> None:
    shape, llama = (
        model_shape({**LLAMA, "model_type": kind}, task=task_of("causal-lm")) for kind in ("olmo9", "llama")
    )
    assert trainable_parameters(spec("lora"), shape) == trainable_parameters(spec("lora"), llama)
    assert trainable_parameters(spec("lora", lora={"targets": ["q_proj"]}), shape) > 0
    for method, changes in (("lora", {"lora": {"targets": "attention"}}), ("ia3", {})):
        with pytest.raises(ModelError, match="not known"):
            trainable_parameters(spec(method, **changes), shape)


TINY = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TINY |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TINY, "num_key_value_heads": 2}
DEBERTA = {**TINY, "model_type": "deberta-v2", "relative_attention": True, "pos_att_type": "p2c|c2p"}
DEBERTA_V3 = {**DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DEBERTA_V3 |= {"position_biased_input": False, "type_vocab_size": 0}
ALBERT = {**TINY, "model_type": "albert", "embedding_size": 16}
ELECTRA = {**TINY, "model_type": "electra", "embedding_size": 16}
MODERNBERT = {**TINY, "model_type": "modernbert", "cls_token_id": 1, "sep_token_id": 2}
NEOX = {**TINY, "model_type": "gpt_neox"}
OPT = {**TINY, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}

CASES: list[tuple[dict[str, Any], Task]] = [
    *((config, "masked-lm") for config in (DEBERTA, DEBERTA_V3, ALBERT, ELECTRA, MODERNBERT)),
    *((config, "text-classification") for config in (DEBERTA, DEBERTA_V3, ALBERT, ELECTRA, MODERNBERT)),
    ({**DEBERTA, "conv_kernel_size": 3, "embedding_size": 16, "type_vocab_size": 2}, "masked-lm"),
    ({**ALBERT, "num_hidden_groups": 3, "inner_group_num": 2}, "text-classification"),
    ({**ELECTRA, "embedding_size": 32}, "text-classification"),
    ({**MODERNBERT, "norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}, "masked-lm"),
    *(({**ROBERTA, "model_type": kind}, "masked-lm") for kind in ("camembert", "xlm-roberta")),
    *(({**ROBERTA, "model_type": kind}, "text-classification") for kind in ("camembert", "xlm-roberta")),
    *(({**GROUPED, "model_type": kind}, "causal-lm") for kind in ("gemma", "gemma2", "gemma3_text", "phi3", "smollm3")),
    ({**GROUPED, "model_type": "gemma3_text", "head_dim": 8}, "text-classification"),
    ({**GROUPED, "model_type": "phi3"}, "text-classification"),
    (NEOX, "causal-lm"),
    ({**NEOX, "attention_bias": False, "tie_word_embeddings": True}, "causal-lm"),
    (NEOX, "text-classification"),
    (OPT, "causal-lm"),
    (OPT, "text-classification"),
    ({**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "enable_bias": False}, "causal-lm"),
    (GPT2, "causal-lm"),
    (GPT2, "text-classification"),
    ({**GPT2, "tie_word_embeddings": False, "n_inner": 200}, "causal-lm"),
    (LLAMA, "causal-lm"),
    (LLAMA, "text-classification"),
    ({**LLAMA, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 32}, "causal-lm"),
    ({**LLAMA, "model_type": "mistral"}, "causal-lm"),
    ({**QWEN, "model_type": "qwen2"}, "causal-lm"),
    ({**QWEN, "model_type": "qwen3"}, "causal-lm"),
    (BERT, "text-classification"),
    (ROBERTA, "text-classification"),
    (DISTILBERT, "text-classification"),
    (BERT, "masked-lm"),
    ({**BERT, "tie_word_embeddings": False}, "masked-lm"),
    (ROBERTA, "masked-lm"),
    ({**ROBERTA, "tie_word_embeddings": False}, "masked-lm"),
    (DISTILBERT, "masked-lm"),
    ({**DISTILBERT, "tie_word_embeddings": False}, "masked-lm"),
]


def _meta_model(config: dict[str, Any], task: Task) -> Any:
    import torch
    from transformers import AutoConfig

    from orchestrator.worker.models import auto_class

    rest = {key: value for key, value in config.items() if key != "model_type"}
    built = AutoConfig.for_model(config["model_type"], **rest, num_labels=3)
    with torch.device("meta"):
        return auto_class(task).from_config(built)


def test_every_known_architecture_is_compared_with_the_real_one() -> None:
    assert {str(config["model_type"]) for config, _ in CASES} == KNOWN
    assert set(lora.ATTENTION) == set(ia3.TARGETS) == KNOWN <= set(HEAD_MODULES)


def test_layers_that_share_their_weights_are_computed_each() -> None:
    shared = model_shape(ALBERT, task=task_of("text-classification"))
    apart = model_shape({**ALBERT, "num_hidden_groups": 3}, task=task_of("text-classification"))
    assert shared.parameters + shared.used_again == apart.parameters
    assert apart.used_again == 0


def _first_name(name: str, tied: bool) -> str:
    """CamemBERT's modules stand in another order, so that a tied table goes by its second name."""
    return "roberta.embeddings.word_embeddings.weight" if tied and name == "lm_head.decoder.weight" else name


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}},
    "lora of attention": {"lora": {"targets": "attention"}},
    "lora by dora": {"lora": {"dora": True}},
    "qlora": {"lora": {"rank": 4}},
    "ia3": {},
    "prefix": {"prefix": {"tokens": 5}},
    "prompt_tuning": {"prompt_tuning": {"tokens": 5}},
}
"""Methods with adapters, and settings that change what they take."""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("config", "task"), CASES)
def test_count_equals_that_of_the_real_model(config: dict[str, Any], task: Task) -> None:
    model = _meta_model(config, task)
    shape = model_shape(config, task=task_of(task), num_labels=3)
    assert shape.exact
    assert shape.weights == {_first_name(name, shape.tied): tuple(p.shape) for name, p in model.named_parameters()}
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    if task == "text-classification":
        heads = HEAD_MODULES[shape.model_type]
        in_head = [p for name, p in model.named_parameters() if set(name.split(".")) & set(heads)]
        assert shape.head_parameters == sum(p.numel() for p in in_head)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("config", "task"), CASES)
def test_the_count_of_the_last_layers_equals_that_of_the_real_model(
    config: dict[str, Any], task: Task, layers: int
) -> None:
    asked, shape = (
        spec("last_layers", task, last_layers={"layers": layers}),
        model_shape(config, task=task_of(task), num_labels=3),
    )
    if shape.used_again:
        with pytest.raises(ModelError, match="share their weights"):
            trainable_parameters(asked, shape)
        return
    model = method_of("last_layers").adapt(_meta_model(config, task), asked)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable_parameters(asked, shape) == sum(p.numel() for p in trained.values())
    numbers = {int(found[1]) for name in trained if (found := re.search(r"\.(\d+)\.", name))}
    assert numbers == set(range(shape.layers - layers, shape.layers))
    tables = ("wte", "wpe", "embed_tokens", "embed_in", "tok_embeddings", "word_embeddings", "position_embeddings")
    assert not any(table in name for name in trained for table in tables)
    assert not model.get_input_embeddings().weight.requires_grad


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", [name for name in ADAPTERS if name != "qlora"])  # its base has to be real
@pytest.mark.parametrize(("config", "task"), CASES)
def test_the_count_of_adapters_equals_that_of_peft(config: dict[str, Any], task: Task, variant: str) -> None:
    asked = spec(variant.split()[0], task, **ADAPTERS[variant])
    if method_of(asked.method).problem(asked):
        return
    model = method_of(asked.method).adapt(_meta_model(config, task), asked)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_parameters(asked, model_shape(config, task=task_of(task), num_labels=3)) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_layer": "x"},
        {"n_layer": True},
        {"n_layer": 2.5},
        {"n_layer": 0},
        {"n_layer": 10**6},
        {"n_embd": 10**12, "n_head": 1},
        {"n_positions": "x"},
        {"n_inner": "x"},
        {"activation_function": 3},
        {"tie_word_embeddings": "no"},
        {"resid_pdrop": 5},
        {"layer_norm_epsilon": "x"},
    ],
)
def test_an_override_of_another_kind_or_beyond_use_is_refused_by_name(overrides: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        model_shape(model_config(ModelSpec(config="gpt2", overrides=overrides)), task=task_of("causal-lm"))
    assert str(next(iter(overrides))) in str(caught.value) or "activation function" in str(caught.value)


@pytest.mark.parametrize(
    "sizes", [{"num_key_value_heads": "x"}, {"head_dim": -1}, {"vocab_size": "x"}, {"hidden_act": 3}]
)
def test_a_configuration_that_holds_no_sizes_is_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        model_shape({**FAMILY_DEFAULTS["llama"], **sizes}, task=task_of("causal-lm"))
