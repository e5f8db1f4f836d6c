"""Per-step all-reduce of the loss, the control signal and a failure flag: the same result on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch


class ControlSignal(IntEnum):
    """What rank 0 decides to do after a step."""

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
    wish: ControlSignal
    failed: bool
    """Whether some rank has met a failure of its own, beside the step, that ends the attempt."""


class Consensus:
    """One rank's side of the exchange. All ranks call it in the same order."""

    def __init__(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor], *, rank: int, world_size: int) -> None:
        self._sum, self._rank, self._world_size = sum_over_ranks, rank, world_size

    def wish(self, own: ControlSignal) -> ControlSignal:
        """Rank 0's wish, without a step."""
        return self._wish_of(self._sum(torch.tensor([float(own) if self._rank == 0 else 0.0]))[0])

    def after_step(self, *, loss: torch.Tensor, grad_norm: float | None, wish: ControlSignal, failed: bool) -> Agreed:
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

    def _wish_of(self, value: float | torch.Tensor) -> ControlSignal:
        return ControlSignal(int(value))
