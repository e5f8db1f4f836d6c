from __future__ import annotations

import threading

import pytest

from orchestrator.errors import Interrupted
from orchestrator.samples.patience import go_on, patiently


def test_the_answer_of_the_work_is_given_and_its_error_raised() -> None:
    assert patiently(lambda: 7, go_on) == 7
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0, go_on)


def test_a_wish_to_stop_ends_the_wait_for_work_that_goes_on() -> None:
    released = threading.Event()

    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        patiently(lambda: released.wait(60), stop)
    assert not released.is_set()
    released.set()


def test_a_wish_that_is_there_before_lets_no_work_begin() -> None:
    done = []

    def stop() -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        patiently(lambda: done.append("work that takes no time"), stop)
    assert done == []
