from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator import spec as spec_module
from orchestrator.errors import SpecError
from orchestrator.load_spec import apply_override
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
        (CLASSIFY, {"task": "causal-lm", "data__label_column": None, "method": "head"}, "full or lora"),
        (CLASSIFY, {"task": "masked-lm", "data__label_column": None, "method": "head"}, "task: masked-lm use full"),
        (CLASSIFY, {"task": "masked-lm"}, "data.label_column is for task: text-classification"),
        (PRETRAIN, {"task": "masked-lm", "method": "lora"}, "kind: finetune"),
        (PRETRAIN, {"task": "masked-lm", "data__sequence_length": 2}, "at least 3"),
        (PRETRAIN, {"task": "masked-lm", "training__masking_rate": 0}, "training.masking_rate"),
        (PRETRAIN, {"training__masking_rate": 0.3}, "training.masking_rate is for task: masked-lm"),
        (CLASSIFY, {"training__masking_rate": 0.3}, "remove it, or set that task"),
        (PRETRAIN, {"resources__workers": 3}, "cannot be split over 3 workers: use 6 or 9"),
        (PRETRAIN, {"training__micro_batch": 3}, "does not divide the 8 samples"),
        (PRETRAIN, {"budget": "5 bananas"}, "usd, gpu-hours, flops, hours"),
        (PRETRAIN, {"checkpoint__keep": "best"}, "set training.eval_every_steps"),
        (PRETRAIN, {"checkpoint__keep": "last"}, "checkpoint.keep"),
        (PRETRAIN, {"deepspeed": {"zero_stage": 2, "offload": "all"}}, "zero_stage: 3"),
        (PRETRAIN, {"deepspeed": {"zero_stage": 0, "offload": "optimizer"}}, "zero_stage: 1, 2 or 3"),
        (PRETRAIN, {"deepspeed": {"train_batch_size": 8}}, "training.global_batch"),
        (PRETRAIN, {"deepspeed": {"zero_stage": 2, "zero_optimization": {"stage": 3}}}, "keep one"),
        (PRETRAIN, {"search": {"space": {}}}, "eval_every_steps"),
        (PRETRAIN, {"resources__workers": "many"}, "[LEAST, MOST] for a run that shrinks and grows"),
        (PRETRAIN, {"resources__workers": [1, 2, 3]}, "[LEAST, MOST] for a run that shrinks and grows"),
        (PRETRAIN, {"resources__workers": [0, 2]}, "[LEAST, MOST] for a run that shrinks and grows"),
        (PRETRAIN, {"resources__workers": [4, 2]}, "4 is more than 2: use [2, 4]"),
        (
            PRETRAIN,
            {"resources__workers": [5, 7]},
            "let resources.workers reach 4 or 8, or use training.global_batch=10",
        ),
        (PRETRAIN, {"resources__workers": [9, 12]}, "let resources.workers reach 8, or use training.global_batch=9"),
        (
            PRETRAIN,
            {"resources__workers": [3, 4], "training__micro_batch": 4},
            "in micro-batches of 4 over any number of workers from 3 to 4: let resources.workers reach 2",
        ),
        (
            PRETRAIN,
            {"resources__workers": [1, 2], "search": {"space": {}, "scheduler": "none"}},
            "a search's trials keep their size",
        ),
        (PRETRAIN, {"resources__capacity_timeout_s": -1}, "resources.capacity_timeout_s"),
        (PRETRAIN, {"resources__hang_timeout_s": 0}, "'auto' or a number above 0"),
        (PRETRAIN, {"checkpoint__every_steps": "often"}, "'auto' or a whole number"),
        (PRETRAIN, {"checkpoint__storage": "s4://bucket/x"}, "a folder that every node sees, or a URI such as s3://"),
        (PRETRAIN, {"checkpoint__storage": "https://host/x"}, "nothing can be written there"),
        (PRETRAIN, {"checkpoint__storage": "memory://x"}, "each process has a memory of its own"),
        (PRETRAIN, {"checkpoint__storage": "file:///mnt/runs"}, "give the path, /mnt/runs"),
        (PRETRAIN, {"checkpoint__storage": "s3:///runs"}, "use s3://BUCKET/PATH"),
        (PRETRAIN, {"checkpoint__storage": "s3://bucket/team/../other"}, "leads out of its path"),
        (PRETRAIN, {"checkpoint__storage": "gs://bucket/.."}, "leads out of its path"),
        (PRETRAIN, {"training__bad_steps": {"spikes": "on"}}, "'auto' or 'off'"),
        (PRETRAIN, {"training__bad_steps": {"max_rewinds": -1}}, "training.bad_steps.max_rewinds"),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"resources__workers": [1, 4]},
        {"resources__hang_timeout_s": 30, "resources__capacity_timeout_s": 60},
        {"checkpoint__every_steps": "auto", "checkpoint__storage": "s3://bucket/runs"},
        {"training__bad_steps": {"spikes": "off", "max_rewinds": 9}},
    ],
    ids=["workers", "patience", "checkpoints", "bad steps"],
)
def test_a_run_goes_on_as_itself_however_it_is_to_live_through_faults(changes: dict[str, Any]) -> None:
    assert spec(PRETRAIN, **changes).fingerprint() == spec(PRETRAIN).fingerprint()


def test_runs_of_earlier_versions_are_found_again() -> None:
    assert (spec(PRETRAIN).fingerprint(), spec(CLASSIFY).fingerprint()) == ("3cc1725f", "111892c4")


def test_the_masking_rate_shapes_a_masked_language_model_and_nothing_else() -> None:
    masked = [spec(PRETRAIN, task="masked-lm", training__masking_rate=rate).fingerprint() for rate in (0.15, 0.15, 0.4)]
    assert masked[0] == masked[1] != masked[2]
    assert spec(PRETRAIN, training__masking_rate=0.15).fingerprint() == spec(PRETRAIN).fingerprint()


def test_a_range_of_workers_is_elastic_and_needs_only_one_size_that_splits_the_batch() -> None:
    elastic = spec(PRETRAIN, resources__workers=[3, 7])
    assert elastic.resources.is_elastic
    assert [n for n in range(3, 8) if elastic.training.splits_over(n)] == [4]
    assert not spec(PRETRAIN, resources__workers=4).resources.is_elastic


@pytest.mark.parametrize(
    ("storage", "bucket"), [("s3://b/x", True), ("gs://b", True), ("/mnt/runs", False), (None, False)]
)
def test_storage_is_a_folder_or_a_bucket(storage: str | None, bucket: bool) -> None:
    assert spec(PRETRAIN, checkpoint__storage=storage).checkpoint.in_a_bucket is bucket


def test_a_spec_survives_its_own_dump() -> None:
    elastic = {"resources__workers": [2, 4], "checkpoint__every_steps": "auto"}
    original = spec(CLASSIFY, deepspeed={"zero_stage": 1, "wall_clock_breakdown": True}, method="lora", **elastic)
    assert spec_module.RunSpec.model_validate(original.model_dump(mode="json")) == original


def test_a_value_that_is_no_yaml_is_shown_with_its_key() -> None:
    with pytest.raises(SpecError) as caught:
        apply_override({}, "training.steps=[1")
    assert caught.value.got == "training.steps=[1"
    assert caught.value.do is not None
