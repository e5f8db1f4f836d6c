"""`method: scratch`: the architecture of the base with new weights, for comparison."""

from __future__ import annotations

from typing import ClassVar

from orchestrator.methods.base import Strategy
from orchestrator.methods.full import Full


class Scratch(Full):
    """See the module."""

    name = "scratch"
    strategy: ClassVar[Strategy] = "scratch"
    is_from_scratch = True
    colour, marker = 3, "D"
