"""What is learnt: the loss of a micro-batch, and sums over held-out data from which every figure follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.samples.masking import NO_LABEL
from orchestrator.spec import Task

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A task's loss for training and its sums for evaluation."""

    loss: Callable[[torch.nn.Module, Batch], Tensor]
    """Mean loss of a micro-batch, a scalar in fp32."""
    evaluate: Callable[[torch.nn.Module, Batch], Tensor]
    """Per sample, shape (n, 3 or more): summed loss in nats, correct predictions, predictions; for classification also
    what `_classification_summary` counts by class."""
    summarize: Callable[..., dict[str, float]]
    """The sums over all held-out samples as named metrics."""
    predictions: Callable[[Batch], Tensor] | None = None
    """How many a micro-batch's loss is the mean of, a scalar; None where equal micro-batches hold equally many."""


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """What a model gives for a batch's inputs, on the CPU in fp32 or fp64; no gradients, no dropout."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits.cpu() if logits.dtype == torch.float64 else logits.float().cpu()


def objective_for(task: Task) -> Objective:
    """The objective of a task."""
    return _OBJECTIVES[task]


def _causal_lm_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def _causal_lm_evaluate(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
    correct = (logits.argmax(-1) == batch["labels"]).sum(-1)
    counts = torch.full_like(correct, batch["labels"].shape[1])
    return torch.stack([losses.view_as(batch["labels"]).double().sum(-1), correct.double(), counts.double()], dim=1)


def _causal_lm_summary(loss: float, correct: float, count: float) -> dict[str, float]:
    mean = loss / count
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}


def _masked_lm_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Those of the predicted positions, (samples, positions, vocabulary); the model computes all of them."""
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    return logits.gather(1, batch["positions"].unsqueeze(-1).expand(-1, -1, logits.shape[-1])).float()


def _masked_lm_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none")


def _masked_lm_predictions(batch: Batch) -> Tensor:
    """Each sample has as many positions (`masking.mask`), but some have no label where most tokens are special."""
    return (batch["labels"] != NO_LABEL).sum()


def _masked_lm_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    losses = _masked_lm_losses(_masked_lm_logits(model, batch), batch["labels"])
    return losses.sum() / _masked_lm_predictions(batch).clamp(min=1)


def _masked_lm_evaluate(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits, labels = _masked_lm_logits(model, batch), batch["labels"]
    losses = _masked_lm_losses(logits, labels).view_as(labels).double().sum(-1)
    correct = (logits.argmax(-1) == labels).sum(-1)
    return torch.stack([losses, correct.double(), (labels != NO_LABEL).double().sum(-1)], dim=1)


def _masked_lm_summary(loss: float, correct: float, count: float) -> dict[str, float]:
    """The perplexity is a pseudo-perplexity, of hidden tokens given those on both sides: no bound on bits per token,
    and to be compared only at the same masking rate."""
    return _causal_lm_summary(loss, correct, count)


def _classification_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def _classification_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(_classification_logits(model, batch), batch["labels"])


def _classification_evaluate(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = _classification_logits(model, batch)
    losses = F.cross_entropy(logits, batch["labels"], reduction="none").double()
    predicted, true = (F.one_hot(of, logits.shape[-1]).double() for of in (logits.argmax(-1), batch["labels"]))
    hits = predicted * true
    sums = torch.stack([losses, hits.sum(-1), torch.ones_like(losses)], dim=1)
    return torch.cat([sums, hits, predicted + true], dim=1)


def _classification_summary(loss: float, correct: float, count: float, *by_class: float) -> dict[str, float]:
    """`by_class`: for each class how often it was predicted rightly, then how often it was predicted or true, together.

    Macro-F1 is the mean of the classes' F1 = 2 hits / (predicted + true), over those that were predicted or true.
    """
    half = len(by_class) // 2
    scores = [2 * hits / either for hits, either in zip(by_class[:half], by_class[half:], strict=True) if either]
    return {"eval/loss": loss / count, "eval/accuracy": correct / count, "eval/macro_f1": sum(scores) / len(scores)}


_OBJECTIVES: dict[Task, Objective] = {
    "causal-lm": Objective(loss=_causal_lm_loss, evaluate=_causal_lm_evaluate, summarize=_causal_lm_summary),
    "masked-lm": Objective(
        loss=_masked_lm_loss,
        evaluate=_masked_lm_evaluate,
        summarize=_masked_lm_summary,
        predictions=_masked_lm_predictions,
    ),
    "text-classification": Objective(
        loss=_classification_loss, evaluate=_classification_evaluate, summarize=_classification_summary
    ),
}
