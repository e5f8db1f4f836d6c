"""What a model is measured on: all rows that are given, with the numbers that the model has for their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.sources import find_sources
from orchestrator.data.splits import as_classes, measured_rows, model_classes, split_rows
from orchestrator.errors import DataError, SpecError
from orchestrator.load_spec import parse_spec
from orchestrator.spec import RunSpec
from tests import specs

EVALUATE: dict[str, Any] = {
    "name": "measured",
    "kind": "evaluate",
    "model": {"base": "base"},
    "task": "text-classification",
    "data": {"validation": "rows.csv", "text_column": "text", "label_column": "label"},
}


def table(folder: Path, labels: list[str], name: str = "rows.csv") -> Path:
    file = folder / name
    file.write_text("text,label\n" + "".join(f"text {number},{label}\n" for number, label in enumerate(labels)))
    return file


def measured(folder: Path, labels: list[str], classes: list[str], **changes: Any) -> Any:
    spec = specs.spec(EVALUATE, **changes)
    return measured_rows(spec, find_sources(str(table(folder, labels))), classes)


def test_rows_get_the_numbers_of_the_model_whatever_their_order_and_none_is_trained_on(tmp_path: Path) -> None:
    found = measured(tmp_path, ["good", "bad", "good"], ["bad", "so-so", "good"])
    texts, labels = found.splits["validation"]
    assert (found.names, labels.tolist()) == (("bad", "so-so", "good"), [2, 0, 2])
    assert list(texts) == ["text 0", "text 1", "text 2"]
    assert (len(found.splits["train"][0]), len(found.splits["train"][1])) == (0, 0)
    assert found.labels("validation") == ["good", "bad", "good"]


def test_a_label_that_the_model_never_had_is_refused_with_its_file_and_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a label that the model never had") as error:
        measured(tmp_path, ["good", "bad", "meh", "meh"], ["bad", "good"])
    assert "'meh'" in str(error.value.got)
    assert "rows.csv, row 3; 2 rows of such labels" in str(error.value.got)
    assert error.value.allowed == "bad, good"


def test_the_row_is_that_of_the_file_where_incomplete_rows_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never had") as error:
        measured(tmp_path, ["good", "", "", "meh"], ["bad", "good"], data__incomplete_rows="leave-out")
    assert "row 4" in str(error.value.got)


def test_classes_without_names_are_numbers_unless_the_data_calls_them_as_transformers_does() -> None:
    unnamed = ["LABEL_0", "LABEL_1"]
    assert model_classes(["0", "1"], unnamed) == ("0", "1")
    assert model_classes(["1"], unnamed) == ("0", "1")
    assert model_classes(["LABEL_1"], unnamed) == ("LABEL_0", "LABEL_1")
    assert model_classes(["good"], ["bad", "good"]) == ("bad", "good")


def test_one_class_is_enough_and_no_row_is_not(tmp_path: Path) -> None:
    assert measured(tmp_path, ["good"], ["bad", "good"]).splits["validation"][1].tolist() == [1]
    with pytest.raises(DataError, match="no row"):
        measured(tmp_path, [], ["bad", "good"])


def test_rows_held_out_of_a_training_are_the_same_by_the_numbers_of_the_model(tmp_path: Path) -> None:
    spec = specs.spec(specs.CLASSIFY, data__text_column="text")
    sources = find_sources(str(table(tmp_path, ["a", "b", "c", "b"] * 10)))
    trained = split_rows(spec, sources, ())
    renumbered = as_classes(trained, ["c", "b", "a"], column="label")
    assert renumbered.labels("validation") == trained.labels("validation")
    assert list(renumbered.splits["validation"][0]) == list(trained.splits["validation"][0])
    assert not np.array_equal(renumbered.splits["validation"][1], trained.splits["validation"][1])


# -- the spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "lora"}, "kind: evaluate measures a model as it is: remove method: lora"),
        ({"method": "few_shot"}, "kind: evaluate measures a model as it is: remove method: few_shot"),
        ({"kind": "finetune", "method": "as_is", "data__train": "rows.csv"}, "is for kind: evaluate alone"),
        ({"model": {"config": "bert"}}, "kind: evaluate needs model.base"),
        ({"data__validation": None}, "kind: evaluate needs data.validation"),
        ({"export": "adapter"}, "trains no model to export"),
        ({"search": {"space": {"training.seed": {"grid": [1, 2]}}}}, "has no training to search over"),
        ({"deepspeed": {"zero_stage": 3}}, "keeps the base whole on each device"),
    ],
)
def test_what_has_no_meaning_for_a_measured_model_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        specs.spec(EVALUATE, **changes)


def test_the_split_that_is_measured_makes_another_run_and_so_does_the_share_that_is_hidden() -> None:
    def fingerprint(**changes: Any) -> str:
        return specs.spec(EVALUATE, **changes).fingerprint()

    assert fingerprint() != fingerprint(data__validation_split="test")
    assert fingerprint() == fingerprint(training={"micro_batch": 4, "global_batch": 64})
    hidden = {"task": "masked-lm", "data": {"validation": "rows.csv"}}
    assert fingerprint(**hidden) != fingerprint(**hidden, training={"masking_rate": 0.3})


def test_a_training_still_needs_data_to_train_on() -> None:
    with pytest.raises(SpecError, match=r"data\.train is required"):
        specs.spec(specs.CLASSIFY, data={"validation": "rows.csv"})


def test_a_folders_test_split_is_measured_where_it_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        table(tmp_path, ["a", "b"], f"{split}-0.csv")
    assert [file.name for file in find_sources(str(tmp_path), split="test")[0].files] == ["test-0.csv"]
    with pytest.raises(DataError, match="no split to validate on") as error:
        find_sources(str(tmp_path), split="validation")
    assert "data.validation_split" in str(error.value.do)


def test_an_evaluation_prints_and_is_read_again() -> None:
    spec: RunSpec = specs.spec(EVALUATE)
    assert parse_spec(spec.model_dump(mode="json")) == spec
