import pytest

from orchestrator.errors import (
    CapacityError,
    ClusterError,
    DataError,
    DivergedError,
    FencedError,
    HangError,
    MemoryExhaustedError,
    OrchestratorError,
    StorageError,
    TransientError,
)
from orchestrator.scheduling.decisions.retry import Kind, Tally, decide_retry, kind_of


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_lost_worker_is_replaced_as_often_as_the_spec_allows(failures: int) -> None:
    assert decide_retry(TransientError("x"), failures=failures, max_failures=3).retry


def test_then_the_run_gives_up_and_says_why() -> None:
    decision = decide_retry(TransientError("x"), failures=4, max_failures=3)
    assert not decision.retry
    assert "max_failures is 3" in decision.reason


@pytest.mark.parametrize("kind", [DataError, DivergedError, StorageError, FencedError, ClusterError])
def test_what_would_fail_again_is_not_tried_again(kind: type[OrchestratorError]) -> None:
    assert kind_of(kind("x")) is None
    assert not decide_retry(kind("x"), failures=1, max_failures=3).retry


def test_a_step_that_did_not_fit_is_tried_in_halves_while_it_can_be_halved() -> None:
    assert decide_retry(MemoryExhaustedError("x"), failures=9, max_failures=0).smaller_steps
    assert not decide_retry(MemoryExhaustedError("x"), failures=1, max_failures=3, can_split=False).retry


def test_missing_room_is_waited_for() -> None:
    assert decide_retry(CapacityError("x"), failures=9, max_failures=0).retry


def test_hangs_have_a_budget_of_their_own() -> None:
    assert decide_retry(HangError("x"), failures=1, max_failures=0).retry
    assert not decide_retry(HangError("x"), failures=4, max_failures=99).retry


def test_failures_are_counted_by_kind_and_anew_after_progress() -> None:
    def counted(*failures: tuple[Kind, bool]) -> list[int]:
        tally, counts = Tally(), []
        for kind, progressed in failures:
            tally = tally.after(kind, progressed=progressed)
            counts.append(tally.of(kind))
        return counts

    assert counted(*[("worker", False)] * 3, ("hang", False), ("worker", False)) == [1, 2, 3, 1, 4]
    assert counted(("worker", False), ("worker", True), ("hang", False)) == [1, 1, 1]
    assert counted(("hang", False), ("worker", True), ("hang", False)) == [1, 1, 1]
