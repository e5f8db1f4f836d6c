from __future__ import annotations

import pytest

from orchestrator.checkpoints.async_writer import SaveTimes
from orchestrator.checkpoints.save_cost import PRIOR_SLOWDOWN, SaveCost
from orchestrator.planning.checkpoint_interval import CheckpointCost

pytestmark = pytest.mark.slow  # the module imports torch


def times(writing_s: float = 2.0, blocked_s: float = 0.1) -> SaveTimes:
    return SaveTimes(step=0, blocked_s=blocked_s, waited_s=0.0, writing_s=writing_s, bytes=1)


def fed(*steps_s: float, disturbed_s: tuple[float, ...]) -> SaveCost:
    """Undisturbed steps, a checkpoint, steps while it was written, and the checkpoint after."""
    cost = SaveCost()
    for seconds in steps_s:
        cost.add_step(seconds, is_writing=False)
    cost.save_begins([])
    for number, seconds in enumerate(disturbed_s, start=1):
        cost.add_step(seconds, is_writing=number < len(disturbed_s))
    cost.save_begins([times()])
    return cost


def lost_s(cost: SaveCost) -> float:
    mean = cost.mean()
    assert mean is not None
    return mean.lost_s


def test_nothing_is_known_before_a_checkpoint_is_complete() -> None:
    cost = SaveCost()
    cost.add_step(1.0, is_writing=False)
    cost.save_begins([])
    assert cost.mean() is None


def test_a_checkpoint_costs_what_it_blocked_and_by_how_much_the_steps_beside_it_were_late() -> None:
    cost = fed(*[1.0] * 9, disturbed_s=(1.4, 1.3, 1.1))
    assert cost.mean() == CheckpointCost(blocked_s=0.1, write_s=2.0, late_s=pytest.approx(0.8))
    assert lost_s(cost) == pytest.approx(0.9)


def test_one_odd_step_does_not_change_what_steps_are_compared_with() -> None:
    assert lost_s(fed(30.0, *[1.0] * 9, disturbed_s=(1.4,))) == pytest.approx(0.5)


def test_steps_that_were_not_slower_cost_nothing() -> None:
    assert lost_s(fed(*[1.0] * 9, disturbed_s=(0.9, 1.0))) == pytest.approx(0.1)


def test_steps_after_the_write_are_compared_with_and_not_counted() -> None:
    cost = fed(*[1.0] * 9, disturbed_s=(1.5,))
    cost.add_step(1.5, is_writing=False)
    for _ in range(9):
        cost.add_step(1.0, is_writing=False)
    cost.save_begins([times()])
    assert lost_s(cost) == pytest.approx(0.6)


def test_the_mean_follows_the_newest_checkpoints() -> None:
    cost = fed(*[1.0] * 9, disturbed_s=(1.5,))
    for _ in range(5):
        cost.add_step(3.0, is_writing=False)
        cost.add_step(1.0, is_writing=False)
        cost.save_begins([times(blocked_s=0.0)])
    assert lost_s(cost) == pytest.approx(2.0)


def test_without_a_step_to_compare_with_the_stated_prior_stands() -> None:
    cost = fed(disturbed_s=(1.4, 1.3))
    assert lost_s(cost) == pytest.approx(0.1 + 2.0 * PRIOR_SLOWDOWN / (1 + PRIOR_SLOWDOWN))
