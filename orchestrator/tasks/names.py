"""The names of tasks: those that `run` trains, and those that the advisor answers for."""

from __future__ import annotations

from typing import Literal

TrainedTask = Literal["causal-lm", "masked-lm", "text-classification"]
"""What a spec may name. Each has its object in `registry`."""
Task = Literal["causal-lm", "masked-lm", "text-classification", "image-classification"]
TASKS: tuple[Task, ...] = ("causal-lm", "masked-lm", "text-classification", "image-classification")
