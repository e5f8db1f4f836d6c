from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.families import model_shape
from orchestrator.errors import ModelError, SpecError
from orchestrator.method_names import MethodName
from orchestrator.methods import registry
from orchestrator.methods.lora import Lora
from orchestrator.methods.qlora import QLora
from orchestrator.methods.registry import METHODS, PRICED, method_of, trainable_parameters
from orchestrator.tasks.registry import task_of
from tests import specs

NAMES = typing.get_args(MethodName)

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIZES |= {"vocab_size": 1000, "max_position_embeddings": 64}


def trained(architecture: str, targets: list[str], *, task: Any = "causal-lm", **config: Any) -> int:
    base = {"kind": "finetune", "model": {"base": "base"}, "method": "lora", "task": task}
    columns = {"data__label_column": "label"} if task == "text-classification" else {}
    spec = specs.spec(specs.PRETRAIN, **base, **columns, lora__targets=targets)
    return trainable_parameters(spec, model_shape({"model_type": architecture, **SIZES, **config}, task=task_of(task)))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj", "model.embed_tokens"]])
@pytest.mark.parametrize("architecture", ["gemma3_text", "llama", "smollm3"])
def test_an_adapter_on_either_of_two_tied_layers_is_refused(architecture: str, targets: list[str]) -> None:
    with pytest.raises(ModelError, match="tied layers") as caught:
        trained(architecture, targets, tie_word_embeddings=True)
    assert caught.value.do is not None
    assert ("q_proj" in caught.value.do) == ("q_proj" in targets)


def test_untied_layers_and_a_classifiers_token_table_may_have_adapters() -> None:
    assert trained("unknown", ["embed_tokens", "lm_head"], tie_word_embeddings=False) > 0
    assert trained("unknown", ["embed_tokens"], task="text-classification", tie_word_embeddings=True) > 0
    assert trained("gemma3_text", ["q_proj"], tie_word_embeddings=True) > 0


# -- the registry ----------------------------------------------------------------------------------------------------


def test_every_name_of_a_spec_has_one_object_in_a_file_of_its_name() -> None:
    assert [method_of(name).name for name in NAMES] == list(NAMES)
    assert [method.name for method in METHODS] == list(NAMES)
    files = {path.stem for path in Path(registry.__file__).parent.glob("*.py")}
    assert files == {
        *(method.name for method in PRICED.values()),
        "__init__",
        "base",
        "peft_method",
        "registry",
        "untrained",
        "virtual_tokens",
    }


def test_every_method_is_priced_by_one_object_under_all_its_names() -> None:
    names = [
        name for method in {id(one): one for one in PRICED.values()}.values() for name in (method.name, *method.aliases)
    ]
    assert sorted(names) == sorted(PRICED)
    assert {method.name for method in METHODS} <= set(PRICED)


def test_the_advisor_writes_one_method_for_each_strategy() -> None:
    advised = [method.strategy for method in METHODS if method.is_advised]
    assert sorted(advised) == sorted(set(advised)) == sorted({method.strategy for method in METHODS} - {None})


def test_plots_tell_all_methods_apart_with_and_without_colour() -> None:
    assert len({method.colour for method in METHODS}) == len({method.marker for method in METHODS}) == len(METHODS)


def test_a_method_that_cannot_train_what_a_spec_asks_for_says_so() -> None:
    with pytest.raises(SpecError, match="the spec: method: lora adapts a base model: use kind: finetune"):
        specs.spec(specs.PRETRAIN, method="lora")
    with pytest.raises(SpecError, match="head trains a new classification head"):
        specs.spec(specs.PRETRAIN, kind="finetune", model={"base": "base"}, method="head")


# -- what a spec may ask of a method ---------------------------------------------------------------------------------


def refusal(method: str, **changes: Any) -> str | None:
    base: dict[str, Any] = {"kind": "finetune", "model": {"base": "base"}, "method": method}
    try:
        specs.spec(specs.PRETRAIN, **base, **changes)
    except SpecError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        ("full", {"export": "adapter"}, "export: adapter is for adapters"),
        ("last_layers", {"export": "both"}, "export: both is for adapters"),
        ("prefix", {"export": "merged"}, "adds what no weight can hold: use adapter"),
        ("lora", {"layerwise__decay": 0.5}, "layerwise is for methods that train the base's layers"),
        ("scratch", {"layerwise__unfreeze_fraction": 0.5}, "new weights have learnt nothing"),
        ("lora", {"lora": {"dora": True}, "deepspeed__zero_stage": 3}, "use zero_stage 2 or less"),
        ("lora", {"lora": {"dora": True}, "deepspeed__offload": "all"}, "deepspeed.offload: all splits weights"),
        ("qlora", {"lora": {"dora": True}}, "those of method: qlora have 4 bits: remove it"),
        ("qlora", {"deepspeed__zero_stage": 3}, "use zero_stage 2 or less"),
        ("prefix", {"training__activation_checkpointing": True}, "would lose its prefix"),
        ("prefix", {"task": "masked-lm"}, "prefix is for task: causal-lm"),
        ("prompt_tuning", {"task": "masked-lm"}, "use lora or ia3"),
        ("lora", {"lora": {"targets": "everything"}}, "all-linear, attention, or a list of names"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_way_out(method: str, changes: dict[str, Any], why: str) -> None:
    assert why in (refusal(method, **changes) or "")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"export": "both", "lora": {"dora": True}, "deepspeed__zero_stage": 2}),
        ("ia3", {"export": "adapter", "deepspeed__zero_stage": 3}),
        ("qlora", {"export": "both", "lora": {"rslora": True}, "deepspeed__zero_stage": 2}),
        ("full", {"layerwise": {"decay": 0.9, "unfreeze_fraction": 0.2}, "export": "merged"}),
        ("last_layers", {"layerwise__decay": 0.9}),
        ("prompt_tuning", {"export": "adapter", "training__activation_checkpointing": True}),
    ],
)
def test_what_a_method_can_do_is_not(method: str, changes: dict[str, Any]) -> None:
    assert refusal(method, **changes) is None


def test_a_method_whose_package_is_missing_is_refused_with_the_command_that_brings_it() -> None:
    class Missing(Lora):
        requires = "a_package_that_nobody_has"

    with pytest.raises(SpecError, match="needs the package a_package_that_nobody_has") as error:
        Missing().check_installed()
    assert 'pip install "orchestrator[lora]"' in str(error.value.do)
    for method in METHODS:
        method.check_installed()


def test_a_quantised_base_leaves_its_adapter_alone_unless_asked_for_a_merged_model() -> None:
    left = {}
    for export in ("auto", "adapter", "merged", "both"):
        base = {"kind": "finetune", "model": {"base": "base"}, "method": "qlora", "export": export}
        asked = specs.spec(specs.PRETRAIN, **base)
        left[export] = (QLora().saves_adapter(asked), QLora().saves_merged(asked))
    assert left == {"auto": (True, False), "adapter": (True, False), "merged": (False, True), "both": (True, True)}


def test_dora_is_planned_below_the_stage_that_splits_weights_and_prefixes_without_recomputation(tmp_path: Path) -> None:
    from orchestrator.planning.fitting import layout_options
    from orchestrator.planning.placement import choose_precision, place_workers
    from orchestrator.planning.run_plan import ClusterShape, NodeShape

    cluster = ClusterShape(nodes=(NodeShape(cpus=64, gpus=8, memory_gib=512.0),), device_name="A100-80GB")

    def layouts(method: str, **changes: Any) -> list[Any]:
        base = {"kind": "finetune", "model": {"base": "base"}, "method": method, "resources__workers": 4}
        asked = specs.spec(specs.PRETRAIN, **base, **changes)
        site = place_workers(asked, cluster, 4)
        return layout_options(asked, site, choose_precision(asked, site.device)[0])

    assert {one.zero_stage for one in layouts("lora")} == {0, 1, 2, 3}
    assert {one.zero_stage for one in layouts("lora", lora={"dora": True})} == {0, 1, 2}
    assert {one.activation_checkpointing for one in layouts("lora")} == {False, True}
    assert {one.activation_checkpointing for one in layouts("prefix")} == {False}


def test_virtual_tokens_take_places_of_the_context() -> None:
    shape = model_shape(
        {"model_type": "gpt2", **SIZES, "n_positions": 64, "n_layer": 2, "n_embd": 64, "n_head": 4},
        task=task_of("causal-lm"),
    )
    base = {"kind": "finetune", "model": {"base": "base"}}
    for method, tokens in (("prefix", 50), ("prompt_tuning", 100), ("lora", 0)):
        asked = specs.spec(specs.PRETRAIN, **base, method=method)
        assert method_of(method).positions(asked) == tokens  # type: ignore[arg-type]
    asked = specs.spec(specs.PRETRAIN, **base, method="prompt_tuning", prompt_tuning={"tokens": 7})
    assert method_of("prompt_tuning").cost_of(asked, shape).virtual_tokens == 7
