"""Every event in the life of a training, in any order, without Ray, a cluster or a clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.errors import (
    CapacityError,
    DataError,
    HangError,
    Interrupted,
    MemoryExhaustedError,
    OrchestratorError,
    TransientError,
)
from orchestrator.planning.run_plan import RunPlan
from orchestrator.runs.job import Outcome
from orchestrator.scheduling.decisions.next_action import (
    ROOM_EVERY_S,
    SETTLE_S,
    AskForRoom,
    Began,
    Ended,
    Event,
    Finish,
    GiveUp,
    Instruction,
    LogRecovery,
    Pause,
    Recovery,
    Room,
    Rules,
    RunState,
    Start,
    Tell,
    first_action,
    next_action,
)
from orchestrator.scheduling.decisions.retry import MAX_HANGS
from tests.test_out_of_memory import planned

RULES = Rules(max_failures=1, capacity_timeout_s=60, asks_for_room=True)
OF_ONE_SIZE = replace(RULES, asks_for_room=False)
DIED, HUNG = TransientError("a worker died", got="SIGKILL"), HangError("a rank hangs")
FULL, NO_ROOM = MemoryExhaustedError("out of memory"), CapacityError("no room", got="1 of 2 workers")
DONE = Outcome(status="finished", step=9, steps=9, metrics={}, checkpoint=None, model_path="model")


def running(*, workers: int = 2, micro_batch: int = 4, **known: Any) -> RunState:
    return RunState(plan=planned(workers, micro_batch, 2), cause="the first attempt", **known)


def after(state: RunState, *events: Event, rules: Rules = RULES) -> tuple[RunState, tuple[Instruction, ...]]:
    """What is known and what is to be done once these have happened."""
    instructions: tuple[Instruction, ...] = ()
    for event in events:
        state, instructions = next_action(state, event, rules)
    return state, instructions


# -- an attempt ends -------------------------------------------------------------------------------------------------


def test_an_outcome_ends_the_training_with_the_notes_of_all_attempts() -> None:
    noted = replace(DONE, notes=("of the last",))
    _, done = after(running(notes=("of an earlier one",)), Ended(attempt=2, outcome=noted))
    assert done == (Finish(outcome=replace(DONE, notes=("of an earlier one", "of the last"))),)


def test_a_training_that_ends_in_a_pause_has_ended_and_an_interrupted_one_goes_on() -> None:
    pause = Pause(kind="resize", reason="4 workers have room", workers=4)
    state, done = after(running(), Ended(attempt=1, outcome=DONE, pause=pause))
    assert isinstance(done[0], Finish)
    state, asked = after(running(), Ended(attempt=1, outcome=replace(DONE, status="interrupted"), pause=pause))
    assert asked == (AskForRoom(pause_s=0.0),)
    assert (state.cause, state.wanted, state.recovery) == ("4 workers have room", 4, Recovery(resizes=1))


@pytest.mark.parametrize(("kind", "counted"), [("preemption", "preemptions"), ("straggler", "moves")])
def test_each_kind_of_pause_is_counted_as_itself(kind: Any, counted: str) -> None:
    ended = Ended(attempt=1, outcome=replace(DONE, status="interrupted"), pause=Pause(kind=kind, reason="why"))
    state, _ = after(running(), ended)
    assert state.recovery == Recovery(**{counted: 1})
    assert state.wanted == 2


def test_a_lost_worker_is_forgiven_as_often_as_the_spec_says_and_the_last_word_names_what_is_kept() -> None:
    state, asked = after(running(), Ended(attempt=1, error=DIED, last_step=7))
    assert asked == (AskForRoom(pause_s=0.0),)
    assert (state.recovery.restarts, state.failed_at) == (1, 7)
    _, done = after(state, Ended(attempt=2, error=DIED, saved_step=5, resumed_step=5))
    assert isinstance(done[0], GiveUp)
    assert done[0].cause is DIED
    assert "2 attempts failed without progress" in done[0].error.what
    assert "the checkpoint of step 5 is kept" in str(done[0].error.do)


def test_progress_between_two_failures_earns_all_attempts_anew() -> None:
    died = [Ended(attempt=n, error=DIED, saved_step=10 * n, resumed_step=10 * (n - 1)) for n in range(1, 9)]
    state, asked = after(running(), *died)
    assert asked == (AskForRoom(pause_s=0.0),)
    assert state.recovery.restarts == 8


def test_hangs_do_not_use_up_the_patience_for_lost_workers_and_their_nodes_are_left_out_once_each() -> None:
    hung = Ended(attempt=1, error=HUNG, bad_nodes=("a", "b", "a"))
    state, _ = after(running(), *[hung] * MAX_HANGS)
    assert state.bad_nodes == ("a", "b")
    assert after(state, Ended(attempt=4, error=DIED))[1] == (AskForRoom(pause_s=0.0),)
    assert isinstance(after(state, hung)[1][0], GiveUp)


def test_memory_that_ran_out_halves_the_micro_batch_until_it_is_one_sample() -> None:
    state, sizes = running(micro_batch=4), []
    while True:
        state, done = after(state, Ended(attempt=1, error=FULL))
        if isinstance(done[0], GiveUp):
            break
        sizes.append((state.plan.micro_batch, state.plan.accumulation))
    assert sizes == [(2, 4), (1, 8)]
    assert "deepspeed.zero_stage=3" in str(done[0].error.do)
    assert len(state.notes) == 2
    assert "1 instead of 2" in state.cause


def test_an_error_that_would_come_again_speaks_for_itself() -> None:
    error = DataError("no rows")
    assert after(running(), Ended(attempt=1, error=error))[1] == (GiveUp(error=error, cause=error),)


def test_a_user_who_wants_to_stop_gets_no_further_attempt() -> None:
    _, done = after(running(), Ended(attempt=1, error=DIED, stop_requested=True))
    assert isinstance(done[0], GiveUp)


def test_without_a_planner_the_next_attempt_begins_at_once_and_says_why() -> None:
    state, done = after(running(), Ended(attempt=1, error=DIED), rules=OF_ONE_SIZE)
    assert done == (Tell(text=state.cause), Start())


# -- room is asked for -----------------------------------------------------------------------------------------------


def seeking(**known: Any) -> RunState:
    return running(wanted=2, **({"has_begun": True} | known))


def test_a_command_begins_with_its_workers_and_on_a_cluster_that_others_use_with_a_look_for_room() -> None:
    _, alone = first_action(running(), RULES, shares_cluster=False)
    assert alone == (Tell(text="starting workers"), Start())
    state, shared = first_action(running(), RULES, shares_cluster=True)
    assert shared == (AskForRoom(pause_s=0.0),)
    taken, done = after(state, Room(waited_s=0.0, found=state.plan))
    assert done == (Tell(text="starting workers"), Start()), "nothing has failed, so there is no cause to tell"
    assert taken.recovery == Recovery()
    assert first_action(running(), OF_ONE_SIZE, shares_cluster=True)[1] == (Start(),)


def test_a_first_wait_is_told_at_once_and_again_when_its_reason_changes() -> None:
    state, _ = first_action(running(), RULES, shares_cluster=True)
    asked = Room(waited_s=0.0, short=NO_ROOM, waits_for="1 l4_spot requested")
    state, told = after(state, asked)
    assert told[0] == Tell(text="waiting for room, 60 s at most: 1 l4_spot requested")
    assert after(state, asked)[1] == (AskForRoom(pause_s=ROOM_EVERY_S),)
    _, told = after(state, replace(asked, waited_s=9.0, waits_for="1 l4_spot starting"))
    assert told[0] == Tell(text="waiting for room, 60 s at most: 1 l4_spot starting")
    (given_up,) = after(state, replace(asked, waited_s=60.1))[1]
    assert isinstance(given_up, GiveUp)
    assert given_up.error.got == "1 l4_spot requested"


def test_behind_other_trainings_nothing_is_given_up_however_long_they_take() -> None:
    state, _ = first_action(running(), RULES, shares_cluster=True)
    queued = Room(waited_s=1e6, short=NO_ROOM, waits_for="place 2 in the queue", others_turn=True)
    state, told = after(state, queued)
    assert told == (Tell(text="waiting for room: place 2 in the queue"), AskForRoom(pause_s=ROOM_EVERY_S))
    assert after(state, queued)[1] == (AskForRoom(pause_s=ROOM_EVERY_S),)
    (stopped,) = after(state, replace(queued, stop_requested=True))[1]
    assert isinstance(stopped, GiveUp)
    assert isinstance(stopped.error, Interrupted)


def test_the_wanted_size_is_taken_at_once_and_a_smaller_one_after_what_was_held_had_time_to_be_free() -> None:
    small, large = planned(1, 4, 4), planned(2, 4, 2)
    state, done = after(seeking(), Room(waited_s=0.0, found=large))
    assert (state.plan, done) == (large, (Tell(text=state.cause), Start()))
    assert after(seeking(), Room(waited_s=SETTLE_S, found=small))[1] == (AskForRoom(pause_s=ROOM_EVERY_S),)
    state, done = after(seeking(), Room(waited_s=SETTLE_S + 0.1, found=small))
    assert (state.plan, done) == (small, (Tell(text=state.cause), Start()))


def test_a_wait_for_room_is_told_once_and_ends_after_its_time() -> None:
    early, waiting = Room(waited_s=1, short=NO_ROOM), Room(waited_s=SETTLE_S + 1, short=NO_ROOM)
    assert after(seeking(), early)[1] == (AskForRoom(pause_s=ROOM_EVERY_S),)
    state, told = after(seeking(), waiting)
    assert told == (Tell(text="waiting for room, 60 s at most: 1 of 2 workers"), AskForRoom(pause_s=ROOM_EVERY_S))
    assert after(state, waiting)[1] == (AskForRoom(pause_s=ROOM_EVERY_S),)
    (given_up,) = after(state, Room(waited_s=60.1, short=NO_ROOM))[1]
    assert isinstance(given_up, GiveUp)
    assert "no room for the workers for 60 s" in given_up.error.what


def test_a_node_that_hung_is_taken_again_before_the_training_is_given_up_the_oldest_first() -> None:
    state, done = after(seeking(bad_nodes=("a", "b")), Room(waited_s=99, short=NO_ROOM))
    assert (state.bad_nodes, done) == (("b",), (AskForRoom(pause_s=0.0),))
    assert after(seeking(bad_nodes=("a",)), Room(waited_s=1, short=NO_ROOM))[0].bad_nodes == ("a",)


def test_a_wish_to_stop_ends_the_wait_but_room_that_is_there_is_taken() -> None:
    (stopped,) = after(seeking(), Room(waited_s=1, short=NO_ROOM, stop_requested=True))[1]
    assert isinstance(stopped, GiveUp)
    assert isinstance(stopped.error, Interrupted)
    taken = after(seeking(), Room(waited_s=1, found=planned(2, 4, 2), stop_requested=True))[1]
    assert isinstance(taken[-1], Start)


# -- an attempt begins -----------------------------------------------------------------------------------------------


def test_steps_beyond_where_the_next_attempt_goes_on_are_lost_and_counted_once() -> None:
    state, told = after(running(failed_at=17, recovery=Recovery(restarts=1)), Began(step=10))
    assert (state.recovery.lost_steps, state.failed_at) == (7, None)
    assert told == (LogRecovery(step=10),)
    assert after(state, Began(step=20))[0].recovery.lost_steps == 7
    assert after(running(failed_at=5), Began(step=9))[0].recovery.lost_steps == 0


def test_a_first_attempt_has_nothing_to_log() -> None:
    assert after(running(), Began(step=0))[1] == ()


# -- any order -------------------------------------------------------------------------------------------------------

NODES = st.lists(st.sampled_from("abc"), max_size=2).map(tuple)
ERRORS = st.sampled_from([DIED, HUNG, FULL, NO_ROOM, DataError("no rows"), OrchestratorError("of a library")])


class AnyOrder(RuleBasedStateMachine):
    """A driver that meets whatever may happen next."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.rules = running(), RULES
        self.todo: tuple[Instruction, ...] = (Start(),)
        self.batch = self.state.plan.global_batch

    @initialize(failures=st.integers(0, 3), asks=st.booleans(), shares=st.booleans())
    def begins(self, failures: int, asks: bool, shares: bool) -> None:
        self.rules = Rules(max_failures=failures, capacity_timeout_s=60, asks_for_room=asks)
        self.state, self.todo = first_action(self.state, self.rules, shares_cluster=shares)

    def meets(self, event: Event) -> None:
        before = self.state
        self.state, self.todo = next_action(before, event, self.rules)
        assert repr(next_action(before, event, self.rules)) == repr((self.state, self.todo)), "the same again"

    def awaits(self, kind: type[Instruction]) -> bool:
        return bool(self.todo) and isinstance(self.todo[-1], kind)

    @precondition(lambda self: self.awaits(Start))
    @rule(step=st.integers(0, 50))
    def an_attempt_begins(self, step: int) -> None:
        todo = self.todo
        self.meets(Began(step=step))
        assert all(isinstance(instruction, LogRecovery) for instruction in self.todo)
        assert self.state.failed_at is None
        self.todo = todo

    @precondition(lambda self: self.awaits(Start))
    @rule(error=ERRORS, nodes=NODES, last=st.none() | st.integers(0, 50), further=st.booleans(), stop=st.booleans())
    def an_attempt_fails(
        self, error: OrchestratorError, nodes: tuple[str, ...], last: int | None, further: bool, stop: bool
    ) -> None:
        saved = 20 if further else 10
        ended = Ended(attempt=1, error=error, bad_nodes=nodes, last_step=last, saved_step=saved, resumed_step=10)
        self.meets(replace(ended, stop_requested=stop))
        if stop:
            assert self.awaits(GiveUp)

    @precondition(lambda self: self.awaits(Start))
    @rule(kind=st.sampled_from(["resize", "preemption", "straggler"]), workers=st.none() | st.integers(1, 4))
    def an_attempt_is_paused(self, kind: Any, workers: int | None) -> None:
        stopped = replace(DONE, status="interrupted")
        self.meets(Ended(attempt=1, outcome=stopped, pause=Pause(kind=kind, reason="why", workers=workers)))
        assert not self.awaits(GiveUp), "a pause costs no patience"

    @precondition(lambda self: self.awaits(AskForRoom))
    @rule(waited=st.floats(0, 100), workers=st.integers(0, 4), stop=st.booleans(), others=st.booleans())
    def room_is_looked_for(self, waited: float, workers: int, stop: bool, others: bool) -> None:
        found = replace(self.state.plan, workers=workers) if workers else None
        short = None if workers else NO_ROOM
        why = None if workers else "why"
        others = others and not workers
        room = Room(waited_s=waited, found=found, short=short, waits_for=why, others_turn=others, stop_requested=stop)
        self.meets(room)
        if others:
            assert self.awaits(GiveUp) == stop, "only a wish to stop ends a place in the queue"
        if self.awaits(Start):
            assert self.state.plan.workers == workers > 0, "nothing begins without room"

    @precondition(lambda self: self.awaits(Start))
    @rule()
    def a_training_comes_to_its_end(self) -> None:
        self.meets(Ended(attempt=1, outcome=DONE))
        assert self.awaits(Finish)

    @precondition(lambda self: self.awaits(Finish) or self.awaits(GiveUp))
    @rule()
    def another_command_begins(self) -> None:
        self.state, self.todo = running(), (Start(),)

    @invariant()
    def what_is_known_makes_sense(self) -> None:
        plan: RunPlan = self.state.plan
        assert plan.global_batch == self.batch
        assert plan.micro_batch >= 1
        assert len(set(self.state.bad_nodes)) == len(self.state.bad_nodes)
        assert min(vars(self.state.recovery).values()) >= 0
        most = {"worker": self.rules.max_failures, "hang": MAX_HANGS}
        if not self.awaits(GiveUp):
            assert all(count <= most.get(kind, count) for kind, count in self.state.tally.counts.items())
        assert sum(isinstance(one, Start | AskForRoom | Finish | GiveUp) for one in self.todo) == 1


AnyOrder.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
