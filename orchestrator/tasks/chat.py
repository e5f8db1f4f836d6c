"""`task: chat`: what an assistant says, from all that was said before. Instruction tuning, or supervised fine-tuning.

Only the assistant's own tokens count, those that end its turns among them; prompts are read and not learnt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.tasks.base import LearntTask, Objective
from orchestrator.tasks.causal_lm import LLAMA_3_8B, perplexity_of
from orchestrator.tasks.masked_lm import NO_LABEL, labelled_positions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from orchestrator.tasks.base import Batch


class Chat(LearntTask):
    """See the module."""

    name = "chat"
    tokens_per_example = 660  # 73M tokens in 110K instructions with their answers (Biderman 2024)
    assumed_base = LLAMA_3_8B
    form = "chats"
    metrics = ("eval/loss", "eval/perplexity")
    ranked_by = "eval/loss"
    models_language = True
    generates = True
    auto_class = "AutoModelForCausalLM"
    model_table = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    peft_type = "CAUSAL_LM"

    def trained_beside_adapters(self, model_type: str) -> tuple[str, ...] | None:
        """See `LearntTask`."""
        return None

    def group(self, kind: str) -> str:
        """See `LearntTask`: losses are over answers alone."""
        return f"{kind} chat"

    @property
    def objective(self) -> Objective:
        """See `LearntTask`."""
        return Objective(loss=_loss, evaluate=_evaluate, summarize=perplexity_of, predictions=labelled_positions)


def _losses(model: Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss of each position in nats, the token predicted there), both (samples, positions).

    No mask and no cache: so transformers keeps conversations apart whose positions begin anew.
    """
    import torch.nn.functional as F

    logits = model(**{name: ids for name, ids in batch.items() if name != "labels"}, use_cache=False).logits
    labels = batch["labels"]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="none")
    return losses.view_as(labels), logits.argmax(-1)


def _loss(model: Module, batch: Batch) -> Tensor:
    losses, _ = _losses(model, batch)
    return losses.sum() / labelled_positions(batch).clamp(min=1)


def _evaluate(model: Module, batch: Batch) -> Tensor:
    import torch

    losses, predicted = _losses(model, batch)
    labels = batch["labels"]
    counted = labels != NO_LABEL
    correct = (predicted == labels) & counted
    return torch.stack([losses.double().sum(-1), correct.double().sum(-1), counted.double().sum(-1)], dim=1)
