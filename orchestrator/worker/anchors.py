"""L2-SP (Li, Grandvalet and Davoine 2018), decoupled: weights are pulled towards their starting values at every step.

The starting values are copies of the masters that an engine is built with, which are those of the base before any
checkpoint is loaded; so they are no part of a checkpoint, and are sharded and offloaded as the masters are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Anchors:
    """L2-SP: pulls master weights towards the values that they have when this is made."""

    def __init__(self, masters: Sequence[torch.Tensor], *, strength: float) -> None:
        self._strength = strength
        self._start = {weight: weight.detach().clone() for weight in masters}

    def pull(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Moves the weights that are about to be stepped; a pre-step hook of their optimizer.

        DeepSpeed calls the optimizer only for steps that it takes, and under ZeRO for one group or part at a time.
        """
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight in self._start:
                    weight.data.lerp_(self._start[weight], group["lr"] * self._strength)
