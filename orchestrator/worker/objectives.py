"""What is learnt from a batch, and what a model gives for one."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.spec import Task
from orchestrator.tasks.base import Objective
from orchestrator.tasks.registry import task_of

Batch = dict[str, Tensor]


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """What a model gives for a batch's inputs, on the CPU in fp32 or fp64; no gradients, no dropout."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits.cpu() if logits.dtype == torch.float64 else logits.float().cpu()


def objective_for(task: Task) -> Objective:
    """The objective of a task."""
    return task_of(task).objective
