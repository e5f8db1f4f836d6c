from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.families import model_shape
from orchestrator.errors import ModelError, SpecError
from orchestrator.methods import registry
from orchestrator.methods.registry import METHODS, PRICED, method_of, trainable_parameters
from orchestrator.spec_methods import MethodName
from tests import specs

NAMES = typing.get_args(MethodName)

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIZES |= {"vocab_size": 1000, "max_position_embeddings": 64}


def trained(architecture: str, targets: list[str], *, task: Any = "causal-lm", **config: Any) -> int:
    base = {"kind": "finetune", "model": {"base": "base"}, "method": "lora", "task": task}
    columns = {"data__label_column": "label"} if task == "text-classification" else {}
    spec = specs.spec(specs.PRETRAIN, **base, **columns, lora__targets=targets)
    return trainable_parameters(spec, model_shape({"model_type": architecture, **SIZES, **config}, task=task))


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
    assert sorted(advised) == sorted(set(advised)) == sorted({method.strategy for method in METHODS})


def test_plots_tell_all_methods_apart_with_and_without_colour() -> None:
    assert len({method.colour for method in METHODS}) == len({method.marker for method in METHODS}) == len(METHODS)


def test_a_method_that_cannot_train_what_a_spec_asks_for_says_so() -> None:
    with pytest.raises(SpecError, match="the spec: method: lora adapts a base model: use kind: finetune"):
        specs.spec(specs.PRETRAIN, method="lora")
    with pytest.raises(SpecError, match="head trains a new classification head"):
        specs.spec(specs.PRETRAIN, kind="finetune", model={"base": "base"}, method="head")
