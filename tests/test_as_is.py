"""`kind: evaluate` in worker processes without Ray: models of short trainings, measured on what these held out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ModelError
from orchestrator.methods.as_is import EVALUATION
from orchestrator.planning.base_fit import model_in
from orchestrator.runs.job import TrainingJob
from tests import training_runs

pytestmark = pytest.mark.slow

TRAIN = {
    "causal-lm": training_runs.pretrain,
    "masked-lm": training_runs.fill_gaps,
    "text-classification": training_runs.classify,
}


def measured(folder: Path, model: Path, task: str, data: dict[str, Any], **changes: Any) -> TrainingJob:
    values = {"name": "measured", "kind": "evaluate", "model": {"base": str(model)}, "task": task, "data": data}
    return training_runs._job(folder, values, **changes)


def found(job: TrainingJob) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((job.run_folder / EVALUATION).read_text())
    return value


@pytest.mark.parametrize("task", TRAIN)
def test_a_model_has_the_figures_of_its_trainings_last_evaluation(task: str, tmp_path: Path) -> None:
    trained = TRAIN[task](tmp_path / "trained")
    before = training_runs.run(trained).metrics
    data = trained.spec.data.model_dump(mode="json", exclude_defaults=True)
    job = measured(tmp_path / "measured", trained.model_folder, task, data)
    assert job.data.held_out.fingerprint == trained.data.held_out.fingerprint
    after = training_runs.run(job).metrics
    evaluated = {name: value for name, value in before.items() if name.startswith("eval/") and "gap" not in name}
    assert len(evaluated) >= 2
    assert {name: after[name] for name in evaluated} == pytest.approx(evaluated, rel=1e-6)


def test_classes_are_told_apart_as_transformers_and_scikit_learn_have_it_at_any_number_of_workers(
    tmp_path: Path,
) -> None:
    import torch
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    trained = training_runs.classify(tmp_path / "trained", training__steps=12, training__learning_rate=5e-3)
    training_runs.run(trained)
    file = tmp_path / "rows.csv"
    with training_runs.rows().open(newline="") as stream:
        rows = list(csv.DictReader(stream))[:41]
    rows = [row for number, row in enumerate(rows) if row["label"] == "bad" or number % 4 == 1]
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, ["text", "label"])
        table.writeheader()
        table.writerows(rows)
    assert len(rows) % 2, "an uneven number for two workers"
    data = {"validation": str(file), "label_column": "label", "sequence_length": 16}
    changes = {"training": {"micro_batch": 4, "global_batch": 8}}
    jobs = [
        measured(tmp_path / str(workers), trained.model_folder, "text-classification", data, **changes)
        if workers == 1
        else measured(
            tmp_path / str(workers), trained.model_folder, "text-classification", data, **changes, resources__workers=2
        )
        for workers in (1, 2)
    ]
    outcomes = [training_runs.run(job) for job in jobs]
    assert [job.plan.workers for job in jobs][1] == 2
    model = AutoModelForSequenceClassification.from_pretrained(trained.model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.model_folder)
    with torch.no_grad():
        answers = [
            model(**tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")).logits.argmax().item()
            for row in rows
        ]
    true = [model.config.label2id[row["label"]] for row in rows]
    precision, recall, _, support = precision_recall_fscore_support(true, answers, labels=[0, 1], zero_division=0)
    for job, outcome in zip(jobs, outcomes, strict=True):
        answer = found(job)
        assert answer["confusion"] == confusion_matrix(true, answers, labels=[0, 1]).tolist()
        assert (answer["rows"], answer["samples"]) == (len(rows), len(rows))
        assert [each["name"] for each in answer["classes"]] == ["bad", "good"]
        for key, expected in (("precision", precision), ("recall", recall), ("rows", support)):
            assert [each[key] for each in answer["classes"]] == pytest.approx(list(expected))
        weighted = f1_score(true, answers, average="weighted", zero_division=0)
        assert outcome.metrics["eval/weighted_f1"] == pytest.approx(weighted)
    one, two = ({name: value for name, value in each.metrics.items() if name.startswith("eval/")} for each in outcomes)
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize(("task", "method"), [("text-classification", "lora"), ("causal-lm", "prompt_tuning")])
def test_an_adapter_is_measured_beside_its_base(task: str, method: str, tmp_path: Path) -> None:
    changes = {"method": method, "export": "adapter"}
    if task == "causal-lm":
        training_runs.run(training_runs.pretrain(tmp_path / "base"))
        changes |= {
            "prompt_tuning": {"tokens": 4},
            "data": {"train": str(training_runs.corpus()), "sequence_length": 24},
        }
        trained = training_runs.continued(tmp_path / "trained", tmp_path / "base" / "model", **changes)
    else:
        trained = training_runs.classify(tmp_path / "trained", **changes)
    before = training_runs.run(trained).metrics
    block = model_in(str(trained.model_folder))
    assert set(block) == {"base", "adapter"}
    data = trained.spec.data.model_dump(mode="json", exclude_defaults=True)
    job = measured(tmp_path / "measured", Path(block["base"]), task, data, model__adapter=block["adapter"])
    after = training_runs.run(job).metrics
    assert after["eval/loss"] == pytest.approx(before["eval/loss"], rel=1e-6)


def test_a_weight_that_is_in_no_file_is_refused_and_never_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained = training_runs.classify(tmp_path / "trained")
    training_runs.run(trained)
    weights = load_file(trained.model_folder / "model.safetensors")
    del weights["classifier.bias"]
    data = trained.spec.data.model_dump(mode="json", exclude_defaults=True)
    job = measured(tmp_path / "measured", trained.model_folder, "text-classification", data)
    save_file(weights, trained.model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="would be drawn at random"):
        training_runs.run(job)
