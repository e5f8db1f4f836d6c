import math

import pytest
import torch

from orchestrator.worker.consensus import Agreed, Consensus, ControlSignal


def agreed(*, losses: list[float], **of_rank: list[float]) -> list[Agreed]:
    """What each rank gets when all bring their part to one sum."""
    brought: list[torch.Tensor] = []

    def bring(values: torch.Tensor) -> torch.Tensor:
        brought.append(values.clone())
        return values

    def receive(values: torch.Tensor) -> torch.Tensor:
        return torch.stack(brought).sum(0)

    def exchange(sum_over_ranks, rank: int) -> Agreed:  # type: ignore[no-untyped-def]
        return Consensus(sum_over_ranks, rank=rank, world_size=len(losses)).after_step(
            loss=torch.tensor(losses[rank]),
            grad_norm=of_rank.get("norms", [None] * len(losses))[rank],
            wish=ControlSignal(int(of_rank.get("wishes", [0] * len(losses))[rank])),
            failed=bool(of_rank.get("failed", [0] * len(losses))[rank]),
        )

    for rank in range(len(losses)):
        exchange(bring, rank)
    return [exchange(receive, rank) for rank in range(len(losses))]


def test_all_ranks_learn_the_mean_loss() -> None:
    for seen in agreed(losses=[1.0, 3.0]):
        assert seen.loss == 2.0
        assert seen.wish == ControlSignal.GO_ON
        assert not seen.failed
        assert seen.grad_norm is None


def test_only_rank_0_has_wishes() -> None:
    assert agreed(losses=[1.0, 1.0], wishes=[ControlSignal.STOP, ControlSignal.GO_ON])[1].wish == ControlSignal.STOP
    assert agreed(losses=[1.0, 1.0], wishes=[ControlSignal.GO_ON, ControlSignal.STOP])[0].wish == ControlSignal.GO_ON


def test_one_rank_in_trouble_is_known_to_all() -> None:
    assert all(seen.failed for seen in agreed(losses=[1.0, 1.0, 1.0], failed=[0, 0, 1]))


def test_all_judge_by_the_gradient_norm_of_rank_0() -> None:
    assert {seen.grad_norm for seen in agreed(losses=[1.0, 1.0], norms=[0.5, 0.5000001])} == {0.5}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_on_one_rank_is_so_for_all_and_spoils_nothing_else(value: float) -> None:
    for seen in agreed(losses=[1.0, value], wishes=[ControlSignal.STOP, 0], norms=[2.0, 2.0]):
        assert not math.isfinite(seen.loss)
        assert seen.wish == ControlSignal.STOP
        assert seen.grad_norm == 2.0
