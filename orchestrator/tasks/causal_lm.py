"""`task: causal-lm`: the next token from those before it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from orchestrator.tasks.base import BITS_PER_BYTE, LearntTask, Objective

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from orchestrator.tasks.base import Batch


LLAMA_3_8B = (8_000_000_000, 15e12)
"""Parameters and training tokens of a usual decoder, by its model card."""


class CausalLM(LearntTask):
    """See the module."""

    name = "causal-lm"
    tokens_per_example = 512  # an instruction with its answer: 73M tokens in 110K examples are 660 (Biderman 2024)
    assumed_base = LLAMA_3_8B
    form = "packed-blocks"
    metrics = ("eval/loss", "eval/perplexity", BITS_PER_BYTE)
    ranked_by = BITS_PER_BYTE
    models_language = True
    reads_raw_text = True
    takes_virtual_tokens = True
    generates = True
    auto_class = "AutoModelForCausalLM"
    model_table = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    peft_type = "CAUSAL_LM"

    def trained_beside_adapters(self, model_type: str) -> tuple[str, ...] | None:
        """See `LearntTask`."""
        return None

    @property
    def objective(self) -> Objective:
        """See `LearntTask`."""
        return Objective(loss=_loss, evaluate=_evaluate, summarize=perplexity_of)


def _loss(model: Module, batch: Batch) -> Tensor:
    import torch.nn.functional as F

    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())


def _evaluate(model: Module, batch: Batch) -> Tensor:
    import torch
    import torch.nn.functional as F

    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
    correct = (logits.argmax(-1) == batch["labels"]).sum(-1)
    counts = torch.full_like(correct, batch["labels"].shape[1])
    return torch.stack([losses.view_as(batch["labels"]).double().sum(-1), correct.double(), counts.double()], dim=1)


def perplexity_of(loss: float, correct: float, count: float) -> dict[str, float]:
    """Mean loss in nats and its exponential, of summed losses over so many predictions."""
    mean = loss / count
    return {"eval/loss": mean, "eval/perplexity": math.exp(min(mean, 700.0))}
