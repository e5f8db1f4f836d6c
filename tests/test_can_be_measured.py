"""Which models an evaluation refuses with the plan: those without the head of the task answer at random."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.families import model_config
from orchestrator.errors import ModelError
from orchestrator.planning.base_fit import classes_of
from orchestrator.planning.plan import make_plan
from orchestrator.planning.run_plan import RunPlan
from orchestrator.spec import RunSpec
from tests.bases import write_base
from tests.specs import spec
from tests.test_base_fit import POOLER, head
from tests.test_measured_rows import EVALUATE
from tests.test_plan import BERT, COUNTS, cpus

CLASSIFIER = {**BERT, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
LANGUAGE = {"task": "masked-lm", "data": {"validation": "texts", "sequence_length": 16}}


def measuring(base: Path, **changes: Any) -> RunSpec:
    return spec(EVALUATE, **{"model__base": str(base), "data__sequence_length": 16} | changes)


def planned(asked: RunSpec) -> RunPlan:
    counts = replace(COUNTS, train_samples=0, train_tokens=0, validation_samples=41, validation_tokens=410)
    counts = replace(counts, num_labels=2, label_names=("bad", "good"), columns=((16, 41),), longest=16)
    return make_plan(asked, cpus(), counts=counts)


def refused(asked: RunSpec) -> str:
    with pytest.raises(ModelError, match="would answer at random") as error:
        make_plan(asked, cpus())
    return str(error.value.got)


def test_a_classifier_is_measured_and_nothing_of_it_is_trained(tmp_path: Path) -> None:
    asked = measuring(write_base(tmp_path, CLASSIFIER, {**POOLER, **head(2)}))
    plan = planned(asked)
    assert (plan.trains, plan.steps, plan.trainable_parameters, plan.deepspeed) == (False, 0, 0, {})
    (said,) = [reason for reason in plan.reasons if reason.startswith("evaluate:")]
    assert "41 rows of 10 tokens on average are read once" in said
    assert classes_of(model_config(asked.model)) == ["bad", "good"]


@pytest.mark.parametrize(
    ("config", "weights", "why"),
    [
        ({"architectures": ["BertModel"]}, POOLER, "no head for classes of texts, saved as BertModel"),
        ({"architectures": ["BertForMaskedLM"]}, {**POOLER, **head(2)}, "no head for classes of texts"),
        ({}, head(2), "no pooler in its head"),
        ({}, {**POOLER, **head(3)}, "a head for 3 classes, of which its config.json names 2"),
    ],
)
def test_a_model_without_a_whole_head_for_its_classes_is_refused(
    config: dict[str, Any], weights: dict[str, tuple[int, ...]], why: str, tmp_path: Path
) -> None:
    assert why in refused(measuring(write_base(tmp_path, {**CLASSIFIER, **config}, weights)))


def test_a_language_model_without_its_head_is_refused_and_so_is_a_classifier_as_one(tmp_path: Path) -> None:
    bare = write_base(tmp_path / "bare", {**BERT, "architectures": ["BertModel"]}, POOLER)
    assert "no masked-LM head" in refused(measuring(bare, **LANGUAGE))
    classifier = write_base(tmp_path / "classifier", CLASSIFIER, {**POOLER, **head(2)})
    assert "a head for classes of texts" in refused(measuring(classifier, **LANGUAGE))


@pytest.mark.parametrize(
    ("settings", "files", "why"),
    [
        ({"peft_type": "LORA"}, (), "no config/config.json"),
        ({"peft_type": "LOHA"}, ("config/config.json",), "peft_type LOHA"),
        ({"peft_type": "LORA"}, ("config/config.json", "quantization_config.json"), "4-bit weights"),
    ],
)
def test_an_adapter_that_cannot_be_put_beside_its_base_is_refused(
    settings: dict[str, str], files: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    base, adapter = write_base(tmp_path / "base", BERT, POOLER), tmp_path / "adapter"
    (adapter / "config").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for name in files:
        (adapter / name).write_text(json.dumps(CLASSIFIER))
    with pytest.raises(ModelError, match="cannot be measured beside its base") as error:
        make_plan(measuring(base, model__adapter=str(adapter)), cpus())
    assert why in str(error.value.got)


def test_an_adapters_classes_are_those_beside_it(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", BERT, POOLER), tmp_path / "adapter"
    (adapter / "config").mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (adapter / "config" / "config.json").write_text(json.dumps(CLASSIFIER))
    asked = measuring(base, model__adapter=str(adapter))
    assert classes_of(model_config(asked.model)) == ["bad", "good"]
    assert planned(asked).trains is False
