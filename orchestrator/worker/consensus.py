"""What all ranks must know of each other after a step, in one small all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch


class Wish(IntEnum):
    """What rank 0 wants to happen after a step."""

    GO_ON = 0
    STOP = 1
    """Someone asked the run to save and end."""
    OVER_BUDGET = 2
    """Another step would overrun the budget."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The same on every rank."""

    loss: float
    """Mean over all ranks."""
    grad_norm: float | None
    """Rank 0's, so that all judge by the same bits."""
    wish: Wish
    failed: bool
    """Whether some rank has met a failure of its own, beside the step, that ends the attempt."""


class Agreement:
    """One rank's side of the exchange. All ranks call it in the same order."""

    def __init__(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], *, rank: int, world_size: int) -> None:
        self._sum, self._rank, self._world_size = sum_over_ranks, rank, world_size

    def wish(self, own: Wish) -> Wish:
        """Rank 0's wish, without a step."""
        return self._wish_of(self._sum(torch.tensor([float(own) if self._rank == 0 else 0.0]))[0])

    def after_step(self, *, loss: torch.Tensor, grad_norm: float | None, wish: Wish, failed: bool) -> Agreed:
        """Exchanges this rank's mean loss (0-d), wish and state of health."""
        leads = self._rank == 0
        knows_norm = leads and grad_norm is not None
        values = torch.zeros(5)
        values[0] = loss.float().cpu() / self._world_size
        values[1] = grad_norm if knows_norm else 0.0
        values[2] = float(knows_norm)
        values[3] = float(wish) if leads else 0.0
        values[4] = float(failed)
        total = self._sum(values).tolist()
        return Agreed(
            loss=total[0],
            grad_norm=total[1] if total[2] else None,
            wish=self._wish_of(total[3]),
            failed=total[4] > 0,
        )

    def _wish_of(self, value: float | torch.Tensor) -> Wish:
        return Wish(int(value))
