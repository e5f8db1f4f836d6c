from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.errors import SpecError
from orchestrator.load_spec import json_schema, load_spec
from orchestrator.load_stages import load_any, parse_stages
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import StagedSpec
from tests.specs import CLASSIFY, PRETRAIN

STAGES: dict[str, Any] = {
    "name": "films",
    "model": {"base": "base"},
    "training": {"global_batch": 8, "learning_rate": 1e-3, "steps": 6},
    "data": {"sequence_length": 16},
    "stages": [
        {"name": "domain", "kind": "pretrain", "task": "masked-lm", "data": {"train": "raw.txt"}},
        {
            "name": "classify",
            "kind": "finetune",
            "task": "text-classification",
            "data": {"train": "rows.csv", "label_column": "label"},
            "training": {"epochs": 2, "steps": None},
        },
    ],
}
"""Continued pretraining, then a classifier."""


def changed(number: int | None = None, **fields: Any) -> dict[str, Any]:
    """`STAGES` with fields of one stage, or of those that all share, replaced."""
    stages = [dict(stage) for stage in STAGES["stages"]]
    if number is None:
        return {**STAGES, "stages": stages, **fields}
    stages[number] |= fields
    return {**STAGES, "stages": stages}


def written(folder: Path, raw: dict[str, Any]) -> Path:
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def test_a_stage_has_its_own_fields_over_those_that_all_share() -> None:
    domain, classify = (stage.spec for stage in parse_stages(STAGES).stages)
    assert (domain.name, domain.training.steps, domain.training.epochs) == ("films.domain", 6, None)
    assert (classify.name, classify.training.steps, classify.training.epochs) == ("films.classify", None, 2)
    assert classify.training.learning_rate == domain.training.learning_rate == 1e-3
    assert (domain.data.train, classify.data.train) == ("raw.txt", "rows.csv")
    assert classify.data.sequence_length == 16


def test_only_the_first_stage_begins_with_the_model_of_the_spec() -> None:
    new = changed(model={"config": "bert", "vocab_size": 300})
    domain, classify = (stage.spec for stage in parse_stages(new).stages)
    assert (domain.model.config, domain.model.vocab_size) == ("bert", 300)
    assert (classify.model.base, classify.model.tokenizer) == ("stage:domain", "auto")


def test_values_that_are_no_blocks_are_replaced_whole() -> None:
    raw = changed(0, model={"config": "bert", "base": None, "overrides": {"num_hidden_layers": 2}})
    raw["model"] = {"base": "base", "overrides": {"hidden_size": 32}}
    assert parse_stages(raw).first.model.overrides == {"num_hidden_layers": 2}


def test_cycles_run_all_stages_again_from_the_model_of_the_last() -> None:
    staged = parse_stages(changed(cycles=2))
    assert [stage.label for stage in staged.stages] == [
        "domain (cycle 1)",
        "classify (cycle 1)",
        "domain (cycle 2)",
        "classify (cycle 2)",
    ]
    again = staged.stages[2].spec
    assert (again.name, again.model.base) == ("films.domain.2", "stage:classify")
    assert staged.fingerprint() != parse_stages(STAGES).fingerprint()


def test_an_override_may_be_of_one_stage_and_null_there_clears_what_all_share(tmp_path: Path) -> None:
    file = written(tmp_path, STAGES)
    lines = ["stages.classify.training.learning_rate=2e-4", "training.seed=3", "stages.domain.training.steps=null"]
    staged = load_any(file, [*lines, "stages.domain.training.tokens=1k"])
    assert isinstance(staged, StagedSpec)
    domain, classify = (stage.spec.training for stage in staged.stages)
    assert (domain.learning_rate, classify.learning_rate, domain.seed, classify.seed) == (1e-3, 2e-4, 3, 3)
    assert (domain.tokens, domain.steps) == (1000, None)


def test_a_spec_without_stages_loads_as_before(tmp_path: Path) -> None:
    for raw in (PRETRAIN, CLASSIFY):
        file = written(tmp_path, raw)
        loaded = load_any(file, ["training.seed=3"])
        assert isinstance(loaded, RunSpec)
        assert loaded == load_spec(file, ["training.seed=3"])


def test_a_command_for_one_training_says_that_it_takes_no_stages(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="takes one training or search, and this spec has stages"):
        load_spec(written(tmp_path, STAGES))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(1, training={"steps": 3, "stepz": 3}), "(?s)stage classify: unknown key training.stepz.*steps[?]"),
        (changed(1, training={"epochs": 2}), "stage classify: .*exactly one of training.tokens"),
        (changed(1, model={"base": "other"}), "stage classify: it begins with the model of stage domain"),
        (changed(1, model={"tokenizer": "other"}), "stage classify: it begins with the model of stage domain"),
        (changed(0, budget="3usd"), "stage domain: budget belongs to all stages together"),
        (changed(0, tracking={"experiment": "a"}), "stage domain: tracking belongs to all"),
        (changed(0, stages=[]), "stage domain: stages belongs to all"),
        (changed(1, search={"space": {}}), "stage classify: stages are single trainings"),
        (changed(search={"space": {}}), "the spec: stages are single trainings"),
        (changed(1, method="scratch"), "stage classify: method: scratch would draw new weights"),
        (
            changed(0, kind="finetune", method="lora", export="adapter"),
            "(?s)stage domain: it leaves an adapter alone.*export=merged",
        ),
        (
            changed(0, kind="finetune", method="prefix", task="causal-lm"),
            "(?s)stage domain: it leaves an adapter alone.*make it the last stage",
        ),
        (changed(1, name="domain"), "name of stages is there twice"),
        (changed(1, name="a.b"), "stage 2 needs a name"),
        (changed(1, name=None), "stage 2 needs a name"),
        (changed(name=None), "the whole needs a name"),
        (changed(name="a b"), "stage domain: name"),
        (changed(stages=[]), "stages does not take this value"),
        (changed(stages={"name": "domain"}), "stages does not take this value"),
        (changed(cycles=0), "cycles does not take this value"),
        (changed(data={"sequence_length": 2}), "stage domain: .*sequence_length of at least 3"),
    ],
)
def test_a_mistake_is_refused_with_the_name_of_its_stage(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_stages(raw)


def test_an_adapter_may_be_what_the_last_stage_leaves() -> None:
    last = parse_stages(changed(1, method="lora", export="adapter")).stages[-1]
    assert last.spec.export == "adapter"


@pytest.mark.parametrize("override", ["stages.clasify.training.epochs=3", "stages.domain=3", "stages=null"])
def test_an_override_of_no_stage_lists_the_stages(tmp_path: Path, override: str) -> None:
    with pytest.raises(SpecError, match=r"(?s)stages.NAME.key=value.*domain, classify"):
        load_any(written(tmp_path, STAGES), [override])


def test_the_fingerprint_of_the_whole_changes_with_what_shapes_a_result_alone() -> None:
    whole = parse_stages(STAGES).fingerprint()
    assert whole == parse_stages(changed(budget="3usd", resources={"workers": 2})).fingerprint()
    assert whole != parse_stages(changed(1, training={"epochs": 3, "steps": None})).fingerprint()


def test_the_schema_takes_stages_and_still_asks_a_single_training_for_all_it_needs() -> None:
    schema = json_schema()
    assert "required" not in schema["$defs"]["TrainingSpec"]
    problems = jsonschema.Draft202012Validator(schema)
    for good in (STAGES, PRETRAIN, CLASSIFY):
        assert problems.is_valid(json.loads(json.dumps(good))), good["name"]
    assert not problems.is_valid({**PRETRAIN, "training": {"steps": 3}})
    assert not problems.is_valid({"name": "films", "stages": [{"kind": "pretrain"}]})
    assert not problems.is_valid(changed(1, epochs=3))
