"""Whether a training hangs or is held up, and by whom. Pure: `control_channel` reads the heartbeats, `run_training`
acts.

Ages only, each by one clock: how long a rank says that it stood still, and how long the driver saw nothing new of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.runs.heartbeat import Beat, Phase, posting_period_s

_LEAST_PATIENCE_S = 60.0
"""What `auto` waits at least: about what starting again costs (18 to 22 s measured, with steps to take again), so that
a hang costs no more than twice what the wisest decision would have."""
_PATIENCE_STEPS = 10.0
"""A rank is still for less than a step; so many usual steps are no hiccup any more (a guess)."""
_SILENT_POSTS = 5.0
"""A rank whose last so many posts did not come is silent."""
_PHASE_FACTORS: Mapping[Phase, float] = {
    "starting": 30.0,  # 30 min, as for a collective: libraries, weights from a cold disk, kernels being built
    "loading": 30.0,
    "computing": 1.0,
    "waiting": 1.0,
    "evaluating": 2.0,  # marked for each batch
    "saving": 10.0,  # 10 min for one rank's share of a checkpoint on a slow disk
    "exporting": 10.0,
}
"""How much longer than in a step a rank may stand still (guesses; with `auto` they multiply 60 s)."""
_FIRST_STEP_FACTOR = 5.0
"""An attempt's first step also chooses kernels and fills caches (a guess)."""
_STRAGGLER_RATIO = 1.5
"""Own work of a straggler in three of four stretches, in what the others need in all but one of four: noise that
spreads a rank's times hides a straggler and makes none. The figure is a guess; whether that is worth a restart is for
`resize` to say."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    node_ip: str
    node_id: str
    """Ray's, which its label `ray.io/node-id` carries."""
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What a driver knows of one rank."""

    place: Place
    beat: Beat
    unseen_s: float
    """Seconds since the rank's newest post arrived, by the driver's clock, while the store answered."""
    kernel_kills: int | None = None
    """Processes that its machine's kernel had ended for want of memory at that post; None where it does not say."""

    @property
    def still_s(self) -> float:
        """Seconds without a sign that the rank moves: its own and, since then, the driver's."""
        return self.beat.still_s + self.unseen_s


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A training that stands still."""

    culprits: tuple[Place, ...]
    """Who holds the others up; empty where nobody can be told from the others."""
    still_s: float
    """Seconds for which all ranks have stood still."""
    reason: str
    """One sentence with ranks, hosts and seconds."""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that everyone waits for at every step."""

    place: Place
    ratio: float
    """Seconds of its own work, in those of the others: both as cautious as in `find_straggler`."""
    reason: str
    """One sentence with rank, host and figures."""


_LEAST_DELAY_S = 2e-3
"""A rank that costs the others less than so much a step is let be (a guess)."""
_NAMED = 4
"""So many ranks are named in a sentence; the others are counted."""


def find_hang(sightings: Mapping[int, Sighting], *, world_size: int, timeout_s: float | None = None) -> Hang | None:
    """The hang that all ranks' heartbeats show; None while any of them moves, or has an excuse for standing still.

    `timeout_s` is how long a rank may stand still in a step; None derives it from what starting again costs. Other
    phases are given multiples of it, and ten usual steps are waited for in any case.
    """
    if not sightings:
        return None
    if any(
        seen.still_s <= _patience_s(seen, world_size=world_size, timeout_s=timeout_s) for seen in sightings.values()
    ):
        return None
    still_s = min(seen.still_s for seen in sightings.values())
    culprits, reason = _blame(sightings, world_size=world_size, for_s=f"for {still_s:.0f} s")
    return Hang(culprits=tuple(seen.place for seen in culprits), still_s=still_s, reason=reason)


def find_straggler(sightings: Mapping[int, Sighting]) -> Straggler | None:
    """The rank whose own work took much longer than the others' most of the recent time, if there is one.

    None until all ranks have worked for 16 seconds and steps, and where own work is not measured.
    """
    low_s = {rank: seen.beat.own_low_s for rank, seen in sightings.items() if seen.beat.own_low_s is not None}
    high_s = {rank: seen.beat.own_high_s for rank, seen in sightings.items() if seen.beat.own_high_s is not None}
    if len(low_s) < max(2, len(sightings)):
        return None
    slowest = max(low_s, key=lambda rank: low_s[rank])
    usual_s = statistics.median(high_s[rank] for rank in high_s if rank != slowest)
    if low_s[slowest] <= max(_STRAGGLER_RATIO * usual_s, usual_s + _LEAST_DELAY_S):
        return None
    place, ratio = sightings[slowest].place, low_s[slowest] / max(usual_s, 1e-9)
    return Straggler(
        place=place,
        ratio=ratio,
        reason=(
            f"{place} keeps the others waiting: the same work takes it {ratio:.1f} times as long, so training could be "
            f"up to {ratio:.1f} times faster without it"
        ),
    )


def _patience_s(seen: Sighting, *, world_size: int, timeout_s: float | None) -> float:
    """How long this rank may stand still; a silent one has stopped, whatever it was at."""
    beat = seen.beat
    least_s = max(_LEAST_PATIENCE_S if timeout_s is None else timeout_s, _PATIENCE_STEPS * (beat.usual_step_s or 0.0))
    if _is_silent(seen, world_size):
        return least_s
    is_first_step = beat.phase in ("computing", "waiting") and beat.usual_step_s is None
    return least_s * (_FIRST_STEP_FACTOR if is_first_step else _PHASE_FACTORS[beat.phase])


def _is_silent(seen: Sighting, world_size: int) -> bool:
    return seen.unseen_s > _SILENT_POSTS * posting_period_s(world_size)


def _blame(sightings: Mapping[int, Sighting], *, world_size: int, for_s: str) -> tuple[Sequence[Sighting], str]:
    """Who differs from the others: silent, behind in the collectives, or at work while the others wait."""
    everyone = [sightings[rank] for rank in sorted(sightings)]
    missing = sorted(set(range(world_size)) - sightings.keys())
    if missing:
        return (), f"{_ranks(missing)} never gave a sign, and the others have stood still {for_s}"
    silent = [seen for seen in everyone if _is_silent(seen, world_size)]
    if silent:
        why = f"{_names(silent)} gave no sign {for_s}: stopped, or the host is frozen or cut off"
        return _minority(silent, everyone), why
    fewest = min(seen.beat.collectives for seen in everyone)
    behind = [seen for seen in everyone if seen.beat.collectives == fewest]
    if len(behind) < world_size:
        others = _ranks([seen.place.rank for seen in everyone if seen not in behind])
        return behind, f"{_names(behind)} stood still {for_s} {_doing(behind)}, and has not come to where {others} wait"
    at_work = [seen for seen in everyone if seen.beat.phase != "waiting"]
    if at_work:
        return _minority(at_work, everyone), f"{_names(at_work)} stood still {for_s} {_doing(at_work)}"
    hosts = sorted({seen.place.host for seen in everyone})
    where = f"the network between {', '.join(hosts)}" if len(hosts) > 1 else f"host {hosts[0]}"
    return (), f"all {world_size} ranks have waited for each other {for_s}: nobody stands out, look at {where}"


def _minority(some: list[Sighting], everyone: list[Sighting]) -> list[Sighting]:
    """Those who stand out; nobody does where it is all of several."""
    return some if len(some) < len(everyone) or len(everyone) == 1 else []


def _doing(some: Sequence[Sighting]) -> str:
    phases = sorted({seen.beat.phase for seen in some})
    return f"while {' and '.join(phases)} after step {some[0].beat.step}"


def _names(some: Sequence[Sighting]) -> str:
    """Up to four in full."""
    named = ", ".join(str(seen.place) for seen in some[:_NAMED])
    return named if len(some) <= _NAMED else f"{named} and {len(some) - _NAMED} more"


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NAMED])) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"
