"""What is learnt from a batch, and what a model gives for one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.runs.job import TrainingJob
from orchestrator.samples.forms.registry import form_of
from orchestrator.spec import Task
from orchestrator.tasks.base import ClassLoss, Objective
from orchestrator.tasks.registry import task_of

Batch = dict[str, Tensor]


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """What a model gives for a batch's inputs, on the CPU in fp32 or fp64; no gradients, no dropout."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits.cpu() if logits.dtype == torch.float64 else logits.float().cpu()


def training_objective(job: TrainingJob) -> Objective:
    """The objective of a training: that of its task, whose loss counts classes as the spec says."""
    task, training = task_of(job.spec.task), job.spec.training
    if not task.is_classification:
        return task.objective
    weights = None
    if training.class_weights == "balanced":
        sizes = form_of(task).class_sizes(job.data.path, job.data.label_names)
        assert sizes is not None, "rows have a class each"
        weights = balanced(list(sizes.values()))
    return task.objective_with(ClassLoss(weights=weights, smoothing=training.label_smoothing))


def balanced(sizes: Sequence[int]) -> tuple[float, ...]:
    """A weight for the rows of each class so that all classes count alike, 1 on average over rows (King and Zeng 2001;
    scikit-learn's `balanced`)."""
    rows, classes = sum(sizes), sum(size > 0 for size in sizes)
    return tuple(rows / (classes * size) if size else 0.0 for size in sizes)


def objective_for(task: Task) -> Objective:
    """The objective of a task."""
    return task_of(task).objective
