"""`task: text-classification`: one class for each text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.architectures.weight_names import head_modules
from orchestrator.tasks.base import LearntTask, Objective
from orchestrator.tasks.masked_lm import ROBERTA_BASE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from orchestrator.tasks.base import Batch


class TextClassification(LearntTask):
    """See the module."""

    name = "text-classification"
    is_classification = True
    tokens_per_example = 128  # a snippet or a sentence pair: runs on GLUE
    assumed_base = ROBERTA_BASE
    form = "labelled-texts"
    metrics = ("eval/loss", "eval/accuracy", "eval/macro_f1")
    ranked_by = "eval/accuracy"
    auto_class = "AutoModelForSequenceClassification"
    model_table = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    peft_type = "SEQ_CLS"

    def trained_beside_adapters(self, model_type: str) -> tuple[str, ...] | None:
        """See `LearntTask`: the head is new."""
        return head_modules(model_type)

    @property
    def objective(self) -> Objective:
        """See `LearntTask`."""
        return Objective(loss=_loss, evaluate=_evaluate, summarize=_summary)


def _logits(model: Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
    return logits.float()


def _loss(model: Module, batch: Batch) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(_logits(model, batch), batch["labels"])


def _evaluate(model: Module, batch: Batch) -> Tensor:
    """Beside the usual three sums, for each class what `_summary` counts."""
    import torch
    import torch.nn.functional as F

    logits = _logits(model, batch)
    losses = F.cross_entropy(logits, batch["labels"], reduction="none").double()
    predicted, true = (F.one_hot(of, logits.shape[-1]).double() for of in (logits.argmax(-1), batch["labels"]))
    hits = predicted * true
    sums = torch.stack([losses, hits.sum(-1), torch.ones_like(losses)], dim=1)
    return torch.cat([sums, hits, predicted + true], dim=1)


def _summary(loss: float, correct: float, count: float, *by_class: float) -> dict[str, float]:
    """`by_class`: for each class how often it was predicted rightly, then how often it was predicted or true, together.

    Macro-F1 is the mean of the classes' F1 = 2 hits / (predicted + true), over those that were predicted or true.
    """
    half = len(by_class) // 2
    scores = [2 * hits / either for hits, either in zip(by_class[:half], by_class[half:], strict=True) if either]
    return {"eval/loss": loss / count, "eval/accuracy": correct / count, "eval/macro_f1": sum(scores) / len(scores)}
