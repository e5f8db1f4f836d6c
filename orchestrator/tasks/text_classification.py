"""`task: text-classification`: one class for each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.architectures.weight_names import head_modules
from orchestrator.tasks.base import Breakdown, ByClass, ClassLoss, LearntTask, Objective
from orchestrator.tasks.masked_lm import ROBERTA_BASE

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor
    from torch.nn import Module

    from orchestrator.tasks.base import Batch


_TOTALS = 3
"""Sums of an evaluation that are not by class."""


class TextClassification(LearntTask):
    """See the module."""

    name = "text-classification"
    is_classification = True
    tokens_per_example = 128  # a snippet or a sentence pair: runs on GLUE
    assumed_base = ROBERTA_BASE
    form = "labelled-texts"
    metrics = ("eval/loss", "eval/accuracy", "eval/macro_f1")
    further_metrics = ("eval/weighted_f1",)
    ranked_by = "eval/accuracy"
    auto_class = "AutoModelForSequenceClassification"
    model_table = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    peft_type = "SEQ_CLS"

    def trained_beside_adapters(self, model_type: str) -> tuple[str, ...] | None:
        """See `LearntTask`: the head is new."""
        return head_modules(model_type)

    def breakdown(self, true: ndarray, answers: ndarray, names: Sequence[str]) -> Breakdown:
        """See `LearntTask`: scikit-learn's figures, over all classes of the model; weighted F1 weights by rows."""
        from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

        numbers = list(range(len(names)))
        by_class = precision_recall_fscore_support(true, answers, labels=numbers, zero_division=0)
        weighted = f1_score(true, answers, labels=numbers, average="weighted", zero_division=0)
        return Breakdown(
            metrics={"eval/weighted_f1": float(weighted)},
            classes=tuple(
                ByClass(name=name, precision=float(precision), recall=float(recall), f1=float(f1), rows=int(rows))
                for name, precision, recall, f1, rows in zip(names, *by_class, strict=True)
            ),
            confusion=tuple(map(tuple, confusion_matrix(true, answers, labels=numbers).tolist())),
        )

    @property
    def objective(self) -> Objective:
        """See `LearntTask`."""
        return Objective(loss=_loss, evaluate=_evaluate, summarize=_summary, answers=_answers)

    def objective_with(self, loss: ClassLoss) -> Objective:
        """See `LearntTask`: with weights, the mean over rows by the weights of their classes, as torch has it."""
        if loss == ClassLoss():
            return self.objective
        predictions = None if loss.weights is None else partial(_weight_of, weights=loss.weights)
        return replace(self.objective, loss=partial(_counted_loss, counts=loss), predictions=predictions)


def _logits(model: Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
    return logits.float()


def _loss(model: Module, batch: Batch) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(_logits(model, batch), batch["labels"])


def _counted_loss(model: Module, batch: Batch, counts: ClassLoss) -> Tensor:
    import torch
    import torch.nn.functional as F

    logits = _logits(model, batch)
    weights = None if counts.weights is None else torch.tensor(counts.weights, device=logits.device)
    return F.cross_entropy(logits, batch["labels"], weight=weights, label_smoothing=counts.smoothing)


def _weight_of(batch: Batch, weights: tuple[float, ...]) -> Tensor:
    """What a micro-batch's mean counts: the weights of its rows together."""
    import torch

    return torch.tensor(weights, device=batch["labels"].device)[batch["labels"]].sum()


def _evaluate(model: Module, batch: Batch) -> Tensor:
    """Beside the usual three sums, for each class what `_summary` counts."""
    import torch
    import torch.nn.functional as F

    logits = _logits(model, batch)
    losses = F.cross_entropy(logits, batch["labels"], reduction="none").double()
    predicted, true = (F.one_hot(of, logits.shape[-1]).double() for of in (logits.argmax(-1), batch["labels"]))
    hits = predicted * true
    sums = torch.stack([losses, hits.sum(-1), torch.ones_like(losses)], dim=1)
    return torch.cat([sums, hits, predicted, true], dim=1)


def _answers(sums: Tensor) -> Tensor:
    """See `Objective`: the last two of the three blocks of classes."""
    import torch

    _, predicted, true = sums[:, _TOTALS:].chunk(3, dim=1)
    return torch.stack([true.argmax(-1), predicted.argmax(-1)], dim=1)


def _summary(loss: float, correct: float, count: float, *by_class: float) -> dict[str, float]:
    """`by_class`: for each class how often it was predicted rightly, then how often it was predicted, then how often
    it was true.

    Macro-F1 is the mean of the classes' F1 = 2 hits / (predicted + true), over those that were predicted or true.
    """
    classes = len(by_class) // 3
    blocks = (by_class[start : start + classes] for start in range(0, len(by_class), classes))
    scores = [2 * hits / (predicted + true) for hits, predicted, true in zip(*blocks, strict=True) if predicted + true]
    return {"eval/loss": loss / count, "eval/accuracy": correct / count, "eval/macro_f1": sum(scores) / len(scores)}
