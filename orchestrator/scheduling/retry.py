"""Whether a failed attempt is tried again. Pure; `train_run` acts on it."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import OrchestratorError, TransientError


@dataclass(frozen=True, kw_only=True)
class RetryDecision:
    """Try again or not, and why."""

    retry: bool
    reason: str


def decide_retry(error: OrchestratorError, *, failures: int, max_failures: int) -> RetryDecision:
    """Only transient failures are tried again, `max_failures` times in a row of attempts.

    `failures` counts the failed attempts, this one included.
    """
    if not isinstance(error, TransientError):
        return RetryDecision(retry=False, reason="the same attempt would fail again")
    if failures > max_failures:
        return RetryDecision(
            retry=False, reason=f"{failures} attempts failed and resources.max_failures is {max_failures}"
        )
    return RetryDecision(retry=True, reason=f"a worker was lost; attempt {failures + 1} of {max_failures + 1}")
