from __future__ import annotations

from typing import Any

import pytest

from orchestrator.architectures.families import model_shape
from orchestrator.errors import ModelError
from orchestrator.planning.trainable import trainable_parameters
from tests import specs

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
