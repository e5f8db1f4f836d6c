from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.architectures.families import FAMILY_DEFAULTS
from orchestrator.commands.evaluate import Options, evaluation, model_folder
from orchestrator.commands.measured import measured_lines
from orchestrator.errors import ModelError, SpecError
from orchestrator.load_spec import parse_spec

CLASSIFIER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 32}
CLASSIFIER |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
CLASSIFIER |= {"max_position_embeddings": 64}
TRAINED: dict[str, Any] = {
    "name": "reviews",
    "task": "text-classification",
    "data": {
        "train": "rows.csv",
        "label_column": "mood",
        "sequence_length": 48,
        "validation_fraction": 0.15,
        "split_seed": 3,
        "max_train_examples": None,
    },
    "training": {"masking_rate": 0.15},
    "tracking": {"enabled": True, "uri": None, "experiment": "reviews"},
}


def spec_of(trained: Any = None, config: Any = CLASSIFIER, **options: Any) -> dict[str, Any]:
    chosen = Options(**{"model": "m", "data": "rows.csv", **options})
    return evaluation(chosen, model={"base": "runs/m/model"}, config=config, trained=trained)


def test_what_is_measured_is_all_of_the_data_in_samples_that_fit_the_model() -> None:
    raw = spec_of()
    assert raw["data"] == {"validation": "rows.csv", "sequence_length": 64}
    spec = parse_spec(raw)
    assert (spec.kind, spec.method, spec.task, spec.training.steps) == ("evaluate", "as_is", "text-classification", 0)


def test_a_runs_model_is_measured_at_the_length_and_in_the_experiment_of_the_run() -> None:
    raw = spec_of(TRAINED, data="others.csv")
    assert raw["data"] == {"validation": "others.csv", "sequence_length": 48}, "other data has columns of its own"
    assert raw["tracking"]["experiment"] == "reviews"
    assert raw["name"] == "reviews-on-others"


def test_held_out_are_the_rows_that_the_run_held_out() -> None:
    data = spec_of(TRAINED, split="held-out")["data"]
    assert data == {
        "train": "rows.csv",
        "label_column": "mood",
        "sequence_length": 48,
        "validation_fraction": 0.15,
        "split_seed": 3,
    }


def test_options_win_over_what_the_run_says() -> None:
    data = spec_of(TRAINED, label_column="other", text_column="words", split="test")["data"]
    assert (data["label_column"], data["text_column"], data["validation_split"]) == ("other", "words", "test")
    with pytest.raises(SpecError, match="--label-column is for classification"):
        spec_of(TRAINED, label_column="other", task="masked-lm")


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (CLASSIFIER, "text-classification"),
        ({**CLASSIFIER, "architectures": ["BertForMaskedLM"]}, "masked-lm"),
        ({**FAMILY_DEFAULTS["gpt2"], "architectures": ["GPT2LMHeadModel"], "vocab_size": 99}, "causal-lm"),
        ({**FAMILY_DEFAULTS["gpt2"], "vocab_size": 99}, "causal-lm"),
    ],
)
def test_the_task_is_that_which_the_model_was_saved_for(config: dict[str, Any], task: str) -> None:
    assert spec_of(config=config)["task"] == task


def test_workers_share_batches_of_the_size_that_was_asked_for() -> None:
    spec = parse_spec(spec_of(workers=3, batch=5))
    assert (spec.resources.workers, spec.training.micro_batch) == (3, 5)
    assert spec.training.splits_over(3)


@pytest.mark.parametrize("options", [{"split": "tst"}, {"task": "image-classification"}])
def test_an_unknown_split_or_task_is_refused_with_those_there_are(options: dict[str, str]) -> None:
    with pytest.raises(SpecError) as error:
        spec_of(**options)
    assert error.value.allowed


def test_a_run_folder_stands_for_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == model_folder(str(tmp_path / "model")) == str(tmp_path / "model")
    assert model_folder("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("name", "why"),
    [("empty", "no model in this folder"), ("file", "no model's folder"), ("gone", "no model's folder")],
)
def test_what_is_no_model_is_refused_before_anything_starts(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=why):
        model_folder(str(tmp_path / name))


def test_classes_are_shown_one_by_one_with_what_they_were_taken_for() -> None:
    classes = [
        {"name": "bad", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "rows": 2},
        {"name": "good", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 1000},
    ]
    found = {"rows": 1002, "samples": 1002, "classes": classes, "confusion": [[2, 0], [1000, 0]]}
    assert list(measured_lines(found, file="f")) == [
        "measured on 1,002 rows",
        "class  precision  recall      f1    rows  as bad  as good",
        "bad       0.5000  1.0000  0.6667       2       2        0",
        "good      0.0000  0.0000  0.0000   1,000   1,000        0",
    ]
    blocks = {"documents": 2, "samples": 30, "classes": None, "confusion": None}
    assert list(measured_lines(blocks, file="f")) == ["measured on 2 documents in 30 blocks"]
    many = {"rows": 9, "samples": 9, "classes": classes * 20, "confusion": [[0] * 40] * 40}
    assert list(measured_lines(many, file="f"))[-1] == "each of the 40 classes: f"
