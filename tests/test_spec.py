from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator import spec as spec_module
from orchestrator.errors import SpecError
from orchestrator.spec_file import apply_override
from tests.specs import CLASSIFY, PRETRAIN, spec


def blocks() -> list[type[BaseModel]]:
    return [
        value
        for value in vars(spec_module).values()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.model_fields
    ]


@pytest.mark.parametrize("block", blocks())
def test_every_field_has_a_sentence(block: type[BaseModel]) -> None:
    for name, field in block.model_fields.items():
        assert field.description, f"{block.__name__}.{name} has no sentence under it"
        assert field.description.rstrip().endswith("."), f"{block.__name__}.{name}"


@pytest.mark.parametrize(
    ("base", "changes", "says"),
    [
        (PRETRAIN, {"training__tokens": "2M"}, "exactly one of training.tokens"),
        (PRETRAIN, {"training__steps": None}, "exactly one of training.tokens"),
        (PRETRAIN, {"model__base": "x"}, "exactly one of model.config"),
        (PRETRAIN, {"model": {"base": "x", "overrides": {"n_layer": 2}}}, "overrides"),
        (PRETRAIN, {"task": "text-classification"}, "kind: finetune"),
        (PRETRAIN, {"method": "lora"}, "kind: finetune"),
        (PRETRAIN, {"kind": "finetune"}, "model.base"),
        (PRETRAIN, {"data__label_column": "y"}, "text-classification"),
        (CLASSIFY, {"data__label_column": None}, "data.label_column"),
        (CLASSIFY, {"task": "causal-lm", "data__label_column": None, "method": "head"}, "full or lora"),
        (PRETRAIN, {"resources__workers": 3}, "cannot be split over 3 workers: use 6 or 9"),
        (PRETRAIN, {"training__micro_batch": 3}, "does not divide the 8 samples"),
        (PRETRAIN, {"budget": "5 bananas"}, "usd, gpu-hours, flops, hours"),
        (PRETRAIN, {"deepspeed": {"zero_stage": 2, "offload": "all"}}, "zero_stage: 3"),
        (PRETRAIN, {"deepspeed": {"zero_stage": 0, "offload": "optimizer"}}, "zero_stage: 1, 2 or 3"),
        (PRETRAIN, {"deepspeed": {"train_batch_size": 8}}, "training.global_batch"),
        (PRETRAIN, {"deepspeed": {"zero_stage": 2, "zero_optimization": {"stage": 3}}}, "keep one"),
        (PRETRAIN, {"search": {"space": {}}}, "eval_every_steps"),
        (PRETRAIN, {"checkpoint__storage": "s3://bucket/x"}, "folder that every node sees"),
        (PRETRAIN, {"name": "a b"}, "name"),
    ],
)
def test_impossible_combinations_are_refused_with_the_remedy(
    base: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        spec(base, **changes)
    assert says in str(caught.value)


def test_raw_deepspeed_keys_pass_through_and_their_stage_counts() -> None:
    block = spec(PRETRAIN, deepspeed={"zero_optimization": {"stage": 3}, "wall_clock_breakdown": True}).deepspeed
    assert block.zero_stage == 3
    assert block.raw == {"zero_optimization": {"stage": 3}, "wall_clock_breakdown": True}


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec(PRETRAIN).training.seed = 3  # type: ignore[misc]


def test_the_fingerprint_follows_what_shapes_the_result_and_nothing_else() -> None:
    base = spec(PRETRAIN).fingerprint()
    assert spec(PRETRAIN, resources__workers=2, name="other", budget="3hours", checkpoint__keep=1).fingerprint() == base
    assert spec(PRETRAIN, training__seed=1).fingerprint() != base


def test_a_spec_survives_its_own_dump() -> None:
    original = spec(CLASSIFY, deepspeed={"zero_stage": 1, "wall_clock_breakdown": True}, method="lora")
    assert spec_module.RunSpec.model_validate(original.model_dump(mode="json")) == original


def test_a_value_that_is_no_yaml_is_shown_with_its_key() -> None:
    with pytest.raises(SpecError) as caught:
        apply_override({}, "training.steps=[1")
    assert caught.value.got == "training.steps=[1"
    assert caught.value.do is not None
