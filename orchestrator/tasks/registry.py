"""The tasks by the names that a spec gives them: a name without an object does not pass the type checker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from orchestrator.tasks.base import AdvisedTask, LearntTask
from orchestrator.tasks.causal_lm import CausalLM
from orchestrator.tasks.chat import Chat
from orchestrator.tasks.image_classification import ImageClassification
from orchestrator.tasks.masked_lm import MaskedLM
from orchestrator.tasks.names import Task, TrainedTask
from orchestrator.tasks.text_classification import TextClassification

_CAUSAL_LM, _MASKED_LM, _TEXT_CLASSIFICATION, _CHAT = CausalLM(), MaskedLM(), TextClassification(), Chat()
_IMAGE_CLASSIFICATION = ImageClassification()


def task_of(name: TrainedTask) -> LearntTask:
    """The task that a spec names."""
    match name:
        case "causal-lm":
            return _CAUSAL_LM
        case "masked-lm":
            return _MASKED_LM
        case "text-classification":
            return _TEXT_CLASSIFICATION
        case "chat":
            return _CHAT
        case _:
            assert_never(name)


def advised_task(name: Task) -> AdvisedTask:
    """The task that a question to the advisor names."""
    return _IMAGE_CLASSIFICATION if name == "image-classification" else task_of(name)


LEARNT: Mapping[str, LearntTask] = {task.name: task for task in (_CAUSAL_LM, _MASKED_LM, _TEXT_CLASSIFICATION, _CHAT)}
"""All of them, for names that come from elsewhere: runs of a store may be of tasks that this version does not know."""
