"""`method: as_is`: no change. `kind: evaluate` measures a model so, by the metrics of the trainings of its task."""

from __future__ import annotations

from orchestrator.methods.base import MethodCost
from orchestrator.methods.untrained import Untrained

EVALUATION = "evaluation.json"
"""In a run folder: what an evaluation found beyond the metrics that a training logs."""


class AsIs(Untrained):
    """See the module."""

    name = "as_is"
    cost = MethodCost(flops_per_weight=2.0, bytes_per_weight=2.0, backward_share=0.0)
    colour, marker = 10, "8"
