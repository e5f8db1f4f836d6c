"""`method: full`: every weight of the base is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from orchestrator.methods.base import ALL_WEIGHTS, Method, Strategy

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.method_names import MethodName
    from orchestrator.spec import RunSpec


class Full(Method):
    """See the module."""

    name: ClassVar[MethodName] = "full"
    strategy: ClassVar[Strategy | None] = "full"
    cost = ALL_WEIGHTS
    is_advised = True
    quantised = "qlora"
    colour, marker = 0, "o"

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return shape.parameters

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`."""
        return shape.parameters
