"""`method: full`: every weight of the base is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.methods.base import ALL_WEIGHTS, Method, Strategy

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class Full(Method):
    """See the module."""

    name = "full"
    strategy: ClassVar[Strategy] = "full"
    cost = ALL_WEIGHTS
    colour, marker = 0, "o"

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`."""
        return shape.parameters
