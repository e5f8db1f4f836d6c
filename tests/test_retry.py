import pytest

from orchestrator.errors import ClusterError, DataError, OrchestratorError, StorageError, TransientError
from orchestrator.scheduling.retry import decide_retry


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_lost_worker_is_replaced_as_often_as_the_spec_allows(failures: int) -> None:
    assert decide_retry(TransientError("x"), failures=failures, max_failures=3).retry


def test_then_the_run_gives_up_and_says_why() -> None:
    decision = decide_retry(TransientError("x"), failures=4, max_failures=3)
    assert not decision.retry
    assert "max_failures is 3" in decision.reason


@pytest.mark.parametrize("error", [DataError("x"), StorageError("x"), ClusterError("x")])
def test_what_would_fail_again_is_not_tried_again(error: OrchestratorError) -> None:
    assert not decide_retry(error, failures=1, max_failures=3).retry
