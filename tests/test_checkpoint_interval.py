from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.planning.checkpoint_interval import (
    FIRST_INTERVAL_STEPS,
    MOST_LOST_S,
    CheckpointCost,
    IntervalDecision,
    expected_overhead,
    failures_per_node_hour,
    interval_steps,
    optimum_s,
)

COST = CheckpointCost(blocked_s=0.5, write_s=4.0, late_s=0.8)


def decided(**changes: Any) -> IntervalDecision:
    usual: dict[str, Any] = {
        "step_s": 1.0,
        "cost": COST,
        "restart_s": 20.0,
        "nodes": 2,
        "failures": 0,
        "node_hours": 10.0,
    }
    return interval_steps(**{**usual, **changes})


@pytest.mark.parametrize(("between_min", "optimum_min"), [(24 * 60, 117.0), (6 * 60, 57.0), (15, 9.1)])
def test_the_optimum_is_that_of_dalys_examples(between_min: float, optimum_min: float) -> None:
    """Figures 3 to 5 of Daly 2006: dumps of 5 minutes."""
    optimum_min_here = optimum_s(cost_s=300.0, between_failures_s=60 * between_min) / 60
    assert optimum_min_here == pytest.approx(optimum_min, rel=0.01)


def test_for_rare_failures_the_optimum_is_youngs() -> None:
    assert optimum_s(cost_s=1.0, between_failures_s=1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)


def test_where_saving_takes_longer_than_failures_are_apart_the_interval_is_the_time_between_them() -> None:
    assert optimum_s(cost_s=100.0, between_failures_s=40.0) == 40.0


@given(cost=st.floats(0.01, 1e3), between=st.floats(10, 1e7), factor=st.floats(0.1, 10))
def test_no_interval_wastes_much_less_than_the_optimum(cost: float, between: float, factor: float) -> None:
    assume(cost < between)
    best = optimum_s(cost_s=cost, between_failures_s=between)

    def wasted(interval_s: float) -> float:
        return expected_overhead(interval_s=interval_s, cost_s=cost, between_failures_s=between, restart_s=0.0)

    assert wasted(best) <= wasted(best * factor) + 1e-3


def test_the_expected_overhead_is_what_a_simulation_measures() -> None:
    interval_s, cost_s, between_s, restart_s = 60.0, 3.0, 600.0, 20.0
    random = np.random.default_rng(0)
    clock, trained, fails_at = 0.0, 0.0, random.exponential(between_s)
    while trained < 1e6:
        if clock + interval_s + cost_s <= fails_at:
            clock, trained = clock + interval_s + cost_s, trained + interval_s
            continue
        clock = fails_at
        fails_at += random.exponential(between_s)
        while fails_at < clock + restart_s:  # a failure while restarting starts the restart again
            clock = fails_at
            fails_at += random.exponential(between_s)
        clock += restart_s
    expected = expected_overhead(
        interval_s=interval_s, cost_s=cost_s, between_failures_s=between_s, restart_s=restart_s
    )
    assert 1 - trained / clock == pytest.approx(expected, abs=0.005)


def test_until_something_was_measured_the_first_interval_stands() -> None:
    for unknown in ({"cost": None}, {"step_s": None}):
        assert decided(**unknown).steps == FIRST_INTERVAL_STEPS
        assert decided(**unknown).overhead is None


@given(
    step=st.floats(1e-3, 1e4),
    blocked=st.floats(0, 100),
    write=st.floats(0, 1000),
    late=st.floats(0, 1000),
    nodes=st.integers(1, 2048),
    failures=st.integers(0, 1000),
    node_hours=st.floats(0, 1e7),
)
def test_the_interval_is_whole_steps_within_its_bounds(
    step: float, blocked: float, write: float, late: float, nodes: int, failures: int, node_hours: float
) -> None:
    cost = CheckpointCost(blocked_s=blocked, write_s=write, late_s=late)
    decision = decided(step_s=step, cost=cost, nodes=nodes, failures=failures, node_hours=node_hours)
    assert decision.steps >= 1
    assert decision.steps * step >= min(write, step)
    assert decision.steps == 1 or (decision.steps - 1) * step < max(MOST_LOST_S, write)
    assert decision.overhead is not None
    assert 0 <= decision.overhead <= 1
    assert decision == decided(step_s=step, cost=cost, nodes=nodes, failures=failures, node_hours=node_hours)


def test_dearer_checkpoints_are_further_apart_and_frequent_failures_bring_them_closer() -> None:
    dear = CheckpointCost(blocked_s=5.0, write_s=4.0, late_s=0.8)
    assert decided(cost=dear).steps > decided().steps > decided(failures=1).steps > decided(failures=5).steps
    assert decided(nodes=64).steps < decided().steps


def test_a_checkpoint_that_costs_nothing_is_made_as_soon_as_the_last_is_written() -> None:
    free = CheckpointCost(blocked_s=0.0, write_s=4.5, late_s=0.0)
    assert decided(cost=free).steps == 5
    assert "takes 4s to be written" in decided(cost=free).reason


def test_no_failure_undoes_more_than_half_an_hour() -> None:
    decision = decided(cost=CheckpointCost(blocked_s=600.0, write_s=0.0, late_s=0.0), node_hours=1e5)
    assert decision.steps == MOST_LOST_S
    assert "no failure may undo more than 30m00s" in decision.reason


def test_before_anything_failed_the_rate_lies_near_that_of_published_runs_after_some_hours() -> None:
    assert failures_per_node_hour(failures=0, node_hours=100.0) == pytest.approx(6e-4, rel=0.5)
    assert failures_per_node_hour(failures=419, node_hours=54 * 24 * 2048) == pytest.approx(1.58e-4, rel=0.01)


def test_a_few_failures_within_minutes_outweigh_the_prior() -> None:
    assert failures_per_node_hour(failures=3, node_hours=0.1) > 5
    assert failures_per_node_hour(failures=2, node_hours=20.0) == pytest.approx(0.1, rel=0.5)


@given(failures=st.integers(0, 50), node_hours=st.floats(0, 1e5), more=st.floats(0, 1e5))
def test_the_rate_grows_with_failures_and_falls_with_quiet_hours(failures: int, node_hours: float, more: float) -> None:
    rate = failures_per_node_hour(failures=failures, node_hours=node_hours)
    assert failures_per_node_hour(failures=failures + 1, node_hours=node_hours) > rate
    assert failures_per_node_hour(failures=failures, node_hours=node_hours + more) <= rate * (1 + 1e-9)
