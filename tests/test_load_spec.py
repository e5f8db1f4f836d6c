import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.load_spec import json_schema, load_spec, parse_value
from tests.specs import PRETRAIN, raw


def write(folder: Path, value: Any) -> Path:
    file = folder / "spec.yaml"
    file.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(file, overrides)
    return str(caught.value)


def test_an_unknown_key_names_the_nearest_and_lists_the_valid_ones(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, raw(PRETRAIN, training__learning_rat=1)))
    assert "unknown key training.learning_rat" in text
    assert "did you mean training.learning_rate?" in text
    assert "global_batch" in text


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    value = raw(PRETRAIN)
    del value["training"]["global_batch"]
    assert "training.global_batch is required" in refusal(write(tmp_path, value))


def test_several_problems_are_listed_together(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, raw(PRETRAIN, kind="train", training__global_batch=-1)))
    assert "2 problems" in text
    assert "kind" in text
    assert "training.global_batch" in text


@pytest.mark.parametrize(
    ("override", "got", "allowed"),
    [
        ("training.steps=many", "'many'", "a whole number"),
        ("training.steps=2.5", "2.5", "a whole number"),
        ("training.steps=0", "0", "a number from 1 on"),
        ("training.learning_rate=fast", "'fast'", "a number"),
        ("data.validation_fraction=2", "2", "a number below 1"),
        ("data.train={}", "{}", "a text or a list"),
        ("name=[a]", "['a']", "a text"),
        ("resources=2", "2", "workers, gpus_per_worker"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_our_words(
    tmp_path: Path, override: str, got: str, allowed: str
) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, raw(PRETRAIN)), [override])
    assert override.partition("=")[0] in caught.value.what
    assert caught.value.got == got
    assert (caught.value.allowed or "").startswith(allowed)
    assert not re.search("input|dictionary|string|parse|instance|tuple", str(caught.value).lower())


def test_overrides_set_clear_and_create_fields(tmp_path: Path) -> None:
    file = write(tmp_path, raw(PRETRAIN))
    spec = load_spec(
        file, ["training.steps=null", "training.tokens=2M", "training.learning_rate=3e-4", "resources.workers=2"]
    )
    assert (spec.training.steps, spec.training.tokens) == (None, 2_000_000)
    assert spec.training.learning_rate == pytest.approx(3e-4)
    assert spec.resources.workers == 2


def test_null_leaves_a_field_that_takes_none_to_its_default_and_refuses_an_unknown_one(tmp_path: Path) -> None:
    file = write(tmp_path, raw(PRETRAIN, training__schedule="linear"))
    spec = load_spec(file, ["training.schedule=null", "data.validation_fraction=null", "checkpoint.keep=null"])
    assert (spec.training.schedule, spec.data.validation_fraction) == ("cosine", 0.05)
    for unknown in ("training.schedul=null", "trainin.schedule=null"):
        with pytest.raises(SpecError, match="unknown key"):
            load_spec(file, [unknown])
    with pytest.raises(SpecError, match="kind"):
        load_spec(file, ["kind=null"])


def test_a_range_and_words_that_yaml_reads_as_truth_pass_through_overrides(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, raw(PRETRAIN)), ["resources.workers=[2, 4]", "training.bad_steps.spikes=off"])
    assert spec.resources.workers == (2, 4)
    assert spec.training.bad_steps.spikes == "off"


def test_a_field_of_several_kinds_is_one_problem_that_lists_them(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, raw(PRETRAIN, training__micro_batch="some")))
    assert text.splitlines()[0].endswith("training.micro_batch does not take this value")
    assert "'auto' or a whole number" in text


@pytest.mark.parametrize("override", ["training.steps", "=3", "name.first=x", "training.steps=[1"])
def test_an_override_that_cannot_be_applied_is_refused(tmp_path: Path, override: str) -> None:
    assert refusal(write(tmp_path, raw(PRETRAIN)), override)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no spec"), ("- a", "holds no spec"), ("a: [", "not valid YAML"), ("name: a\nname: b", "stands twice")],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, content: str, says: str) -> None:
    assert says in refusal(write(tmp_path, content))


def test_a_wrong_path_lists_the_specs_beside_it(tmp_path: Path) -> None:
    write(tmp_path, raw(PRETRAIN))
    assert "spec.yaml" in refusal(tmp_path / "sepc.yaml")


@given(st.floats(1e-12, 1e12))
def test_numbers_in_scientific_notation_are_numbers(number: float) -> None:
    assert parse_value(f"{number:e}") == pytest.approx(number, rel=1e-5)


def test_a_deepspeed_file_is_read_next_to_the_spec(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}))
    spec = load_spec(write(tmp_path, raw(PRETRAIN, deepspeed="ds.json")))
    assert spec.deepspeed.zero_stage == 1


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_deepspeed_file_that_holds_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    assert "JSON" in refusal(write(tmp_path, raw(PRETRAIN, deepspeed="ds.json")))


def test_a_missing_deepspeed_file_is_refused(tmp_path: Path) -> None:
    assert "deepspeed names no file" in refusal(write(tmp_path, raw(PRETRAIN, deepspeed="nowhere.json")))


def test_the_shipped_schema_is_the_one_the_code_makes() -> None:
    shipped = Path(__file__).parents[1] / "configs" / "spec.schema.json"
    assert json.loads(shipped.read_text()) == json_schema(), "run: orchestrator schema --write configs/spec.schema.json"
