from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduling.decisions.resize import (
    GrowthDecision,
    SizeDecision,
    Timing,
    decide_growth,
    decide_leaving,
    decide_size,
)

USABLE = (1, 2, 4, 8)
RESTART_S = 20.0


def timing(**changes: Any) -> Timing:
    """An hour behind and an hour ahead."""
    usual: dict[str, Any] = {"since_start_s": 3600.0, "step_s": 1.0, "restart_s": RESTART_S, "steps_left": 3600}
    return Timing(**{**usual, **changes})


def decided(**changes: Any) -> SizeDecision:
    """A run of 2 workers that has had room for 4 for an hour, with an hour of steps to go."""
    shape = {name: changes.pop(name, usual) for name, usual in (("running", 2), ("room", 4))}
    return decide_size(USABLE, **shape, timing=timing(**changes))


@pytest.mark.parametrize(("room", "workers"), [(1, 1), (3, 2), (7, 4), (8, 8), (50, 8)])
def test_after_a_failure_the_largest_size_with_room_goes_on(room: int, workers: int) -> None:
    decision = decide_size(USABLE, running=None, room=room)
    assert (decision.workers, decision.act) == (workers, True)


def test_without_room_for_the_smallest_size_the_run_waits_and_says_for_what() -> None:
    decision = decide_size((2, 4), running=None, room=1)
    assert (decision.workers, decision.act) == (None, False)
    assert decision.reason == "there is room for 1 worker, and the run needs at least 2"


def test_a_run_grows_when_that_pays() -> None:
    decision = decided()
    assert (decision.workers, decision.act) == (4, True)
    assert "growing from 2 to 4 workers saves up to 30m00s of the 1h00m" in decision.reason


def test_a_run_that_is_nearly_done_does_not_grow() -> None:
    decision = decided(steps_left=60)
    assert (decision.workers, decision.act) == (2, False)
    assert "would not pay in the 1m00s that are left" in decision.reason


def test_a_run_that_has_just_changed_its_size_does_not_grow() -> None:
    decision = decided(since_start_s=30.0)
    assert (decision.workers, decision.act) == (2, False)
    assert "waits until 1m20s after the attempt began" in decision.reason


def test_a_run_that_has_timed_no_step_does_not_grow() -> None:
    assert not decided(step_s=None).act


def test_a_run_with_all_it_may_have_stays() -> None:
    assert decided(running=8, room=20) == SizeDecision(
        workers=8, act=False, reason="8 workers, the most that the run may have"
    )


def test_room_between_two_sizes_changes_nothing() -> None:
    assert decided(running=4, room=7).act is False


def test_a_node_that_leaves_shrinks_the_run_at_once() -> None:
    decision = decided(running=4, room=3, since_start_s=0.0)
    assert (decision.workers, decision.act) == (2, True)


def test_a_node_that_leaves_no_room_ends_the_attempt_with_a_checkpoint() -> None:
    decision = decide_size((4, 8), running=4, room=3)
    assert (decision.workers, decision.act) == (None, True)


def test_a_node_that_comes_and_goes_costs_a_bounded_share_of_the_time() -> None:
    """Every second the adversary offers a node, and takes it away as soon as the run has grown."""
    now, changed_at, restarting_s, running = 0.0, 0.0, 0.0, 2
    while now < 10_000:
        room = 4 if running == 2 else 2
        decision = decided(running=running, room=room, since_start_s=now - changed_at, steps_left=10**6)
        if decision.act and decision.workers is not None:
            restarting_s += RESTART_S if decision.workers > running else 0.0
            running, changed_at = decision.workers, now
        now += 1.0
    assert 0 < restarting_s / now < 0.25


def left(ratio: float, **changes: Any) -> SizeDecision:
    """The run of 2 workers, one of them on a slow node, with room for as many elsewhere."""
    elsewhere = changes.pop("elsewhere", 2)
    return decide_leaving(ratio, running=2, elsewhere=elsewhere, timing=timing(**changes))


def test_a_straggler_is_left_where_there_is_room_and_that_pays() -> None:
    decision = left(3.0)
    assert (decision.workers, decision.act) == (2, True)
    assert decision.reason.startswith("leaving its node, with 2 workers elsewhere, saves up to 40m00s of the 1h00m")


def test_a_straggler_is_put_up_with_where_there_is_no_room_or_not_enough_to_gain() -> None:
    assert not left(3.0, elsewhere=0).act
    assert not left(1.5, elsewhere=1).act, "one worker without it is slower than two with it"
    assert left(3.0, elsewhere=1).workers == 1, "one worker without it is faster than two with it"
    assert "would not pay in the 50s that are left" in left(3.0, steps_left=50).reason
    assert "waits until 1m00s after the attempt began" in left(3.0, since_start_s=50.0).reason


@given(
    usable=st.sets(st.integers(1, 64), min_size=1, max_size=8),
    index=st.integers(0, 7),
    room=st.integers(0, 80),
    since=st.floats(0, 1e6),
    step=st.floats(1e-3, 100),
    restart=st.floats(0, 1000),
    left=st.integers(0, 10**7),
)
def test_a_decision_is_a_usable_size_with_room(
    usable: set[int], index: int, room: int, since: float, step: float, restart: float, left: int
) -> None:
    sizes = sorted(usable)
    running = sizes[index] if index < len(sizes) else None
    decision = decide_size(
        sizes,
        running=running,
        room=room,
        timing=Timing(since_start_s=since, step_s=step, restart_s=restart, steps_left=left),
    )
    assert decision.workers is None or (decision.workers in usable and decision.workers <= room)
    assert (decision.workers is None) == (room < sizes[0])
    assert decision.act or decision.workers == running
    if running is not None and decision.act and decision.workers is not None:
        assert decision.workers != running


# -- nodes that could be asked for ---------------------------------------------------------------------------------


def grows(*, room: int = 2, can_ask: bool = True, others_wait: bool = False, **changes: Any) -> GrowthDecision:
    """A run of 2 workers without room for more, on a cluster that could have more nodes."""
    return decide_growth(
        USABLE, running=2, room=room, timing=timing(**changes), can_ask=can_ask, others_wait=others_wait
    )


def test_a_run_asks_for_its_next_size_where_growing_would_pay() -> None:
    assert (grows().size.act, grows().ask_for) == (False, 2)
    assert grows(steps_left=10).ask_for == 0, "no node is started for nothing"
    assert grows(since_start_s=1.0).ask_for == 0
    assert grows(can_ask=False).ask_for == 0
    assert decide_growth((1, 2), running=2, room=2, timing=timing(), can_ask=True, others_wait=False).ask_for == 0


def test_what_has_come_is_taken_and_kept_until_the_run_is_of_that_size() -> None:
    growth = grows(room=4)
    assert (growth.size.act, growth.size.workers, growth.ask_for) == (True, 4, 2)
    late = grows(room=4, steps_left=10)
    assert (late.size.act, late.ask_for) == (False, 0), "what does not pay any more is let go"


def test_a_run_leaves_room_to_others_that_wait() -> None:
    growth = grows(room=4, others_wait=True)
    assert (growth.size.act, growth.ask_for) == (False, 0)
