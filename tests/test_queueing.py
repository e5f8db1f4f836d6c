"""Whose turn it is on a shared cluster: first come, first served, and nobody waits for what there is enough of."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduling.decisions.queueing import Entry, turn_of

FOUR_GPUS = {"CPU": 16.0, "GPU": 4.0}


def entry(name: str, since_s: float, *, gpus: float = 4, cpus: float = 4, state: str = "waiting") -> Entry:
    return Entry(job=f"0{name}", name=name, owner="ana", since_s=since_s, state=state, cpus=cpus, gpus=gpus)  # type: ignore[arg-type]


def test_the_first_to_come_is_served_first() -> None:
    first, second, third = entry("first", 1), entry("second", 2), entry("third", 3)
    assert turn_of(first, [third, second], at_most=FOUR_GPUS).may_ask
    turn = turn_of(third, [second, first], at_most=FOUR_GPUS)
    assert (turn.place, turn.may_ask) == (3, False)
    assert turn.in_words() == "place 3 in the queue, behind first (ana), second (ana)"


def test_one_whose_workers_are_starting_still_comes_first_and_one_that_runs_holds_what_it_has() -> None:
    late = entry("late", 9)
    assert not turn_of(late, [entry("early", 1, state="starting")], at_most=FOUR_GPUS).may_ask
    turn = turn_of(late, [entry("early", 1, state="running")], at_most=FOUR_GPUS)
    assert (turn.may_ask, turn.waits_for_others) == (True, True)
    assert turn.in_words() == "place 1 in the queue; early (ana) has the workers"


def test_nobody_waits_for_what_there_is_enough_of_for_all_before_it() -> None:
    others = [entry("runs", 1, gpus=2, state="running"), entry("waits", 2, gpus=1)]
    turn = turn_of(entry("small", 3, gpus=1), others, at_most=FOUR_GPUS)
    assert (turn.may_ask, turn.waits_for_others) == (True, False)
    assert turn_of(entry("large", 3, gpus=2), others, at_most=FOUR_GPUS).waits_for_others


def test_trainings_on_gpus_and_on_cores_do_not_wait_for_each_other() -> None:
    on_gpus = entry("gpus", 1, gpus=4, cpus=16)
    turn = turn_of(entry("cores", 2, gpus=0, cpus=8), [on_gpus], at_most=FOUR_GPUS)
    assert (turn.place, turn.may_ask, turn.waits_for_others) == (1, True, False)


def test_many_before_it_are_counted_not_listed() -> None:
    others = [entry(f"job-{n}", n) for n in range(5)]
    words = turn_of(entry("last", 9), others, at_most=FOUR_GPUS).in_words()
    assert words == "place 6 in the queue, behind job-0 (ana), job-1 (ana), job-2 (ana) and 2 more"


ENTRIES = st.lists(
    st.builds(
        entry,
        st.text("abc", min_size=1, max_size=3),
        st.integers(0, 3),
        gpus=st.integers(0, 4),
        cpus=st.integers(1, 16),
        state=st.sampled_from(["waiting", "starting", "running"]),
    ),
    max_size=6,
    unique_by=lambda one: one.job,
)


@given(entries=ENTRIES, seed=st.integers(0, 99))
def test_of_all_that_wait_someone_may_always_go_on_and_all_agree_on_the_order(entries: list[Entry], seed: int) -> None:
    waiting = [one for one in entries if one.state == "waiting"]
    random.Random(seed).shuffle(entries)
    turns = {one.job: turn_of(one, [o for o in entries if o is not one], at_most=FOUR_GPUS) for one in waiting}
    for wants in ("GPU", "CPU"):
        rivals = [one for one in waiting if one.wants == wants]
        starting = any(one.wants == wants and one.state == "starting" for one in entries)
        assert not rivals or starting or any(turns[one.job].may_ask for one in rivals), "the queue never stands still"
        places = [turns[one.job].place for one in rivals]
        assert len(set(places)) == len(places)


def test_two_that_came_in_the_same_instant_have_one_order() -> None:
    one, other = entry("a", 1), replace(entry("b", 1), owner="ben")
    assert {turn_of(one, [other], at_most=FOUR_GPUS).place, turn_of(other, [one], at_most=FOUR_GPUS).place} == {1, 2}
