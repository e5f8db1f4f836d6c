from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from orchestrator.tasks.base import ClassLoss
from orchestrator.tasks.registry import task_of
from orchestrator.worker.objectives import balanced, objective_for


class _Answers(torch.nn.Module):
    """Says the logits that it is given as tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        return type("Output", (), {"logits": input_ids})


@pytest.mark.parametrize("classes", [2, 5])
def test_macro_f1_is_that_of_scikit_learn_however_the_rows_are_batched(classes: int) -> None:
    torch.manual_seed(classes)
    true = torch.multinomial(torch.tensor([0.9, *[0.1 / (classes - 1)] * (classes - 1)]), 300, replacement=True)
    logits = torch.randn(300, classes)
    logits[:, 0] += 1.0
    objective = objective_for("text-classification")
    sums = torch.zeros(1)
    for rows in torch.arange(300).split(16):
        batch = {"input_ids": logits[rows], "attention_mask": logits[rows], "labels": true[rows]}
        sums = sums + objective.evaluate(_Answers(), batch).sum(0)
    found = objective.summarize(*sums.tolist())
    predicted = logits.argmax(-1)
    assert objective.answers is not None
    each = objective.evaluate(_Answers(), {"input_ids": logits, "attention_mask": logits, "labels": true})
    assert torch.equal(objective.answers(each), torch.stack([true, predicted], dim=1))
    assert found["eval/accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert found["eval/macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert found["eval/macro_f1"] < found["eval/accuracy"] - 0.1


def test_the_constant_answer_has_a_high_accuracy_and_half_the_macro_f1() -> None:
    true = torch.tensor([0] * 499 + [1])
    logits = torch.tensor([[1.0, 0.0]]).expand(500, 2)
    objective = objective_for("text-classification")
    batch = {"input_ids": logits, "attention_mask": logits, "labels": true}
    found = objective.summarize(*objective.evaluate(_Answers(), batch).sum(0).tolist())
    assert found["eval/accuracy"] == 0.998
    assert found["eval/macro_f1"] == pytest.approx(0.5, abs=0.001)


def test_a_breakdown_has_every_class_of_the_model_also_those_without_rows() -> None:
    true, answers = np.array([0, 0, 2, 2, 2]), np.array([0, 2, 2, 2, 1])
    found = task_of("text-classification").breakdown(true, answers, ("a", "b", "c", "d"))
    assert found is not None
    assert [(each.name, each.rows) for each in found.classes] == [("a", 2), ("b", 0), ("c", 3), ("d", 0)]
    assert found.confusion == ((1, 0, 1, 0), (0, 0, 0, 0), (0, 1, 2, 0), (0, 0, 0, 0))
    assert [each.precision for each in found.classes] == pytest.approx([1, 0, 2 / 3, 0])
    assert [each.recall for each in found.classes] == pytest.approx([1 / 2, 0, 2 / 3, 0])
    weighted = (2 * 2 / 3 + 3 * 2 / 3) / 5
    assert found.metrics == {"eval/weighted_f1": pytest.approx(weighted)}
    assert tuple(found.metrics) == task_of("text-classification").further_metrics


def test_language_models_have_no_classes() -> None:
    assert task_of("causal-lm").breakdown(np.zeros(1), np.zeros(1), ()) is None


def test_all_classes_count_alike_however_few_rows_they_have() -> None:
    weights = balanced([90, 10, 0])
    assert weights == pytest.approx((100 / 180, 5.0, 0.0))
    assert 90 * weights[0] == pytest.approx(10 * weights[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
def test_the_loss_counts_classes_as_torch_does_and_evaluations_count_rows(
    smoothing: float, weights: tuple[float, ...] | None
) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 3), torch.arange(12) % 3
    batch = {"input_ids": logits, "attention_mask": logits, "labels": labels}
    plain = task_of("text-classification")
    objective = plain.objective_with(ClassLoss(weights=weights, smoothing=smoothing))
    tensor = None if weights is None else torch.tensor(weights)
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=tensor, label_smoothing=smoothing)
    assert objective.loss(_Answers(), batch) == pytest.approx(float(expected))
    assert torch.equal(objective.evaluate(_Answers(), batch), plain.objective.evaluate(_Answers(), batch))
    if weights is None:
        assert objective.predictions is None, "all rows count alike"
    else:
        assert objective.predictions is not None
        assert float(objective.predictions(batch)) == pytest.approx(4 * sum(weights))
