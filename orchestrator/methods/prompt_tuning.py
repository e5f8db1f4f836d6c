"""Embeddings learnt in front of every sample (Lester et al. 2021)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.methods.base import FROZEN_BACKBONE, PricedMethod

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape

USUAL_TOKENS = 100
"""Lester et al. (2021)."""


class PromptTuning(PricedMethod):
    """See the module."""

    name = "prompt_tuning"
    aliases = ("prompt",)
    cost = replace(FROZEN_BACKBONE, virtual_tokens=USUAL_TOKENS)

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return USUAL_TOKENS * shape.hidden
