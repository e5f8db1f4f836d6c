"""Patience with a bucket that is away; that a real server's absence is met with it, `test_storage` shows."""

from __future__ import annotations

import errno
import time

import pytest

from orchestrator import object_store
from orchestrator.object_store import patiently

AWAY = OSError("When reading information for key 'x': AWS Error NETWORK_CONNECTION during HeadObject operation")


class Action:
    """Raises these, one a call, and then gives 7."""

    def __init__(self, *errors: OSError) -> None:
        self._errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return 7


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(object_store, "_LONGEST_PAUSE_S", 0.04)


def test_a_bucket_that_comes_back_in_time_is_waited_for() -> None:
    action = Action(AWAY, AWAY, AWAY)
    assert patiently(action, patience_s=20) == 7
    assert action.calls == 4


def test_one_that_stays_away_is_an_error_after_the_time_that_was_given() -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        patiently(Action(*[AWAY] * 1000), patience_s=0.3)
    assert 0.1 < time.monotonic() - began < 5
    action = Action(AWAY)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        patiently(action, patience_s=0)
    assert action.calls == 1


@pytest.mark.parametrize(
    "lasting",
    [
        OSError("AWS Error ACCESS_DENIED during PutObject operation: no"),
        OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        OSError(errno.ENOSPC, "no space left on device"),
    ],
)
def test_what_waiting_does_not_mend_is_an_error_at_once(lasting: OSError) -> None:
    action = Action(lasting)
    with pytest.raises(type(lasting)):
        patiently(action, patience_s=20)
    assert action.calls == 1
