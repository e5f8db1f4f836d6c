"""What the methods share that train nothing: the base answers as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.methods.base import Method

if TYPE_CHECKING:
    from orchestrator.architectures.families import ModelShape
    from orchestrator.spec import RunSpec


class Untrained(Method):
    """A method without a training."""

    trains = False
    recomputes = False
    can_merge = False

    def usual_parameters(self, shape: ModelShape, *, rank: int) -> int:
        """See `PricedMethod`."""
        return 0

    def trainable_parameters(self, spec: RunSpec, shape: ModelShape) -> int:
        """See `Method`."""
        return 0

    def largest_zero_stage(self, spec: RunSpec) -> int:
        """See `Method`."""
        return 0

    def problem(self, spec: RunSpec) -> str | None:
        """See `Method`."""
        return next((f"method: {self.name} {sentence}" for sentence in self.problems(spec)), None)

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """What of a spec has no meaning here, each as the end of a sentence."""
        settings = spec.deepspeed
        if spec.export != "auto":
            yield f"trains no model to export: remove export: {spec.export}"
        if spec.retain is not None:
            yield "forgets nothing: remove retain"
        if spec.layerwise.is_on:
            yield "trains no layers: remove layerwise"
        if spec.search is not None:
            yield "has no training to search over: remove search, and compare runs instead"
        if settings.zero_stage not in ("auto", 0) or settings.offload not in ("auto", "none"):
            yield "keeps the base whole on each device: set deepspeed=auto"
