"""The tasks that the advisor answers for; a spec takes those of them that `run` trains."""

from __future__ import annotations

from typing import Literal

Task = Literal["causal-lm", "masked-lm", "text-classification", "image-classification"]
TASKS: tuple[Task, ...] = ("causal-lm", "masked-lm", "text-classification", "image-classification")
