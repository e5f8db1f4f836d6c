"""Whose turn it is where several drivers want the same cluster: first come, first served. Pure; `queue` keeps the
entries where all drivers see them.

A training that needs GPUs and one that needs only CPU cores do not wait for each other. Nobody is held up where there
is enough for all who came before as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_NAMED = 3
"""So many drivers are named in a sentence; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A driver that waits for workers or has some."""

    job: str
    """Ray's id of the driver's job."""
    name: str
    """Of its spec."""
    owner: str
    since_s: float
    """When it asked first, in seconds since 1970 by its own clock."""
    state: Literal["waiting", "starting", "running"]
    """`starting` from the moment there was room until its workers show up."""
    cpus: float
    gpus: float
    """What its workers take together."""

    def __str__(self) -> str:
        return f"{self.name} ({self.owner})"

    @property
    def wants(self) -> Literal["CPU", "GPU"]:
        """The resource that it competes for."""
        return "GPU" if self.gpus else "CPU"

    @property
    def amount(self) -> float:
        """How much of that it takes."""
        return self.gpus or self.cpus


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where a driver stands among those that want the same."""

    place: int
    """1 for the next to be served."""
    may_ask: bool
    """Whether it may take or ask for nodes: nobody is before it, or there is enough for them too."""
    behind: tuple[Entry, ...]
    """Who was first and has not started, the newest last."""
    holders: tuple[Entry, ...]
    """Whose workers run on what it wants."""

    @property
    def waits_for_others(self) -> bool:
        """Whether other trainings come first, or have what it needs."""
        return bool(self.holders) or not self.may_ask

    def in_words(self) -> str:
        """One line for the user."""
        if self.behind:
            return f"place {self.place} in the queue, behind {_names(self.behind)}"
        if self.holders:
            verb = "has" if len(self.holders) == 1 else "have"
            return f"place {self.place} in the queue; {_names(self.holders)} {verb} the workers"
        return f"place {self.place} in the queue"


def turn_of(me: Entry, others: Sequence[Entry], *, at_most: Mapping[str, float]) -> Turn:
    """Where a driver stands. `others` are the entries of all other drivers that live; `at_most` is how much `CPU` and
    `GPU` the cluster has, or could have with what its autoscaler may add."""
    rivals = [other for other in others if other.wants == me.wants]
    behind = sorted((one for one in rivals if one.state != "running" and _is_before(one, me)), key=_order)
    holders = tuple(sorted((one for one in rivals if one.state == "running"), key=_order))
    taken = sum(one.amount for one in (*behind, *holders))
    enough = taken + me.amount <= at_most.get(me.wants, 0.0)
    return Turn(
        place=1 + len(behind), may_ask=not behind or enough, behind=tuple(behind), holders=holders if not enough else ()
    )


def _is_before(one: Entry, me: Entry) -> bool:
    return _order(one) < _order(me)


def _order(one: Entry) -> tuple[float, str]:
    return one.since_s, one.job  # two in the same instant: any order, as long as all agree


def _names(entries: Sequence[Entry]) -> str:
    named = ", ".join(map(str, entries[:_NAMED]))
    return named if len(entries) <= _NAMED else f"{named} and {len(entries) - _NAMED} more"
