"""What follows a failed attempt. Pure; called by `next_action`.

Each kind of failure has a budget of its own, so that one kind does not use up the patience for another. A budget is
used up by failures without progress in between: an attempt that went on from a later step than the one before has
earned all of them anew, since a run of weeks loses many workers and must not end for their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.errors import CapacityError, HangError, MemoryExhaustedError, OrchestratorError, TransientError

Kind = Literal["worker", "hang", "memory", "capacity"]

MAX_HANGS = 3
"""A guess: a node that hangs is left out where possible, so a third hang in a row is the program's."""


@dataclass(frozen=True, kw_only=True)
class RetryDecision:
    """Try again or not, and why."""

    retry: bool
    reason: str
    smaller_steps: bool = False
    """The next attempt takes half the micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Failures in a row without progress, by kind."""

    counts: Mapping[Kind, int] = field(default_factory=dict)

    def after(self, kind: Kind, *, progressed: bool) -> Tally:
        """The same after one more failure; where the run had got further before it, the earlier ones are forgiven."""
        kept = {} if progressed else self.counts
        return Tally(counts={**kept, kind: kept.get(kind, 0) + 1})

    def of(self, kind: Kind) -> int:
        """How many of a kind there were since the run last got further."""
        return self.counts.get(kind, 0)


def kind_of(error: OrchestratorError) -> Kind | None:
    """Whose budget a failure is counted on; None for one that the same attempt would meet again."""
    for branch, kind in _KINDS.items():
        if isinstance(error, branch):
            return kind
    return None


def decide_retry(
    error: OrchestratorError, *, failures: int, max_failures: int, can_split: bool = True
) -> RetryDecision:
    """Whether another attempt may succeed where this one failed.

    `failures` counts those of the same kind without progress, this one included; `can_split` says whether the
    micro-batch can be halved.
    """
    kind = kind_of(error)
    if kind is None:
        return RetryDecision(retry=False, reason="the same attempt would fail again")
    if kind == "capacity":
        return RetryDecision(retry=True, reason="waiting for room")
    if kind == "memory":
        if not can_split:
            return RetryDecision(retry=False, reason="its micro-batch is one sample already")
        return RetryDecision(retry=True, reason="again with half the micro-batch", smaller_steps=True)
    allowed, setting = (MAX_HANGS, "consecutive hangs") if kind == "hang" else (max_failures, "resources.max_failures")
    if failures > allowed:
        limit = f"{setting} is {allowed}" if kind == "worker" else f"limit: {allowed} {setting}"
        return RetryDecision(retry=False, reason=f"{failures} attempts failed without progress and {limit}")
    what = "a rank hung" if kind == "hang" else "a worker was lost"
    return RetryDecision(retry=True, reason=f"{what}; attempt {failures + 1} of {allowed + 1}")


_KINDS: dict[type[OrchestratorError], Kind] = {
    HangError: "hang",
    MemoryExhaustedError: "memory",
    CapacityError: "capacity",
    TransientError: "worker",
}
"""The first branch that fits counts."""
