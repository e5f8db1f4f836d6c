"""`method: scratch`: the architecture of the base with new weights, for comparison."""

from __future__ import annotations

from typing import ClassVar

from orchestrator.methods.base import Strategy
from orchestrator.methods.full import Full


class Scratch(Full):
    """See the module."""

    name = "scratch"
    strategy: ClassVar[Strategy | None] = "scratch"
    is_from_scratch = True
    epochs_factor = 1.5  # new weights took so many times those of full fine-tuning in runs on film reviews
    colour, marker = 3, "D"

    def learning_rate(self, base_parameters: int | None) -> float:
        """See `Method`: as in the runs on film reviews that `full_learning_rate` rests on."""
        return 3e-4
