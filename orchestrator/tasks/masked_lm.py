"""`task: masked-lm`: hidden tokens from those on both sides.

The perplexity is a pseudo-perplexity: no bound on bits per token, and to be compared only at the same masking rate.
There are no bits per byte of hidden tokens: a finer tokenizer leaves other pieces of a hidden word in sight, so
pseudo-likelihoods of two tokenizers do not compare (Kauf and Ivanova 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.architectures.masked_lm_heads import MASKED_LM_TRANSFORMS
from orchestrator.tasks.base import LearntTask, Objective
from orchestrator.tasks.causal_lm import perplexity_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from orchestrator.tasks.base import Batch

ROBERTA_BASE = (125_000_000, 30e9)
"""Parameters and training tokens of a usual encoder: 160 GB of text, about 30B words (Liu 2019)."""
NO_LABEL = -100
"""Where nothing is predicted: what torch's cross-entropy leaves out."""


class MaskedLM(LearntTask):
    """See the module."""

    name = "masked-lm"
    tokens_per_example = 512
    assumed_base = ROBERTA_BASE
    form = "masked-blocks"
    metrics = ("eval/loss", "eval/perplexity")
    ranked_by = "eval/loss"
    models_language = True
    reads_raw_text = True
    hides_tokens = True
    auto_class = "AutoModelForMaskedLM"
    model_table = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"
    peft_type = None

    def trained_beside_adapters(self, model_type: str) -> tuple[str, ...] | None:
        """See `LearntTask`: a sentence encoder comes without them."""
        return MASKED_LM_TRANSFORMS.get(model_type)

    def group(self, kind: str) -> str:
        """See `LearntTask`."""
        return f"{kind} masked-lm"

    @property
    def objective(self) -> Objective:
        """See `LearntTask`."""
        return Objective(loss=_loss, evaluate=_evaluate, summarize=perplexity_of, predictions=labelled_positions)


def _logits(model: Module, batch: Batch) -> Tensor:
    """Those of the predicted positions, (samples, positions, vocabulary); the model computes all of them."""
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    return logits.gather(1, batch["positions"].unsqueeze(-1).expand(-1, -1, logits.shape[-1])).float()


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="none")


def labelled_positions(batch: Batch) -> Tensor:
    """Each sample has as many positions (`masking.mask`), but some have no label where most tokens are special."""
    return (batch["labels"] != NO_LABEL).sum()


def _loss(model: Module, batch: Batch) -> Tensor:
    losses = _losses(_logits(model, batch), batch["labels"])
    return losses.sum() / labelled_positions(batch).clamp(min=1)


def _evaluate(model: Module, batch: Batch) -> Tensor:
    import torch

    logits, labels = _logits(model, batch), batch["labels"]
    losses = _losses(logits, labels).view_as(labels).double().sum(-1)
    correct = (logits.argmax(-1) == labels).sum(-1)
    return torch.stack([losses, correct.double(), (labels != NO_LABEL).double().sum(-1)], dim=1)
