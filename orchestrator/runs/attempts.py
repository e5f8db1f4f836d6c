"""The attempts of a run, numbered from 1, and the fence that keeps the workers of old ones out. No torch.

    attempts/0002.json           by the driver before the attempt starts: how many workers, and why there is a new one
    attempts/0002.resumed.json   by its rank 0: the step it went on from
    attempts/0002.ended.json     by the driver once its workers are gone
    attempts/0002.told.json      by a trial, which is its own driver: what MLflow shows of the attempt
    attempts/kept.json           what all attempts of the run have in common

A worker that was cut off or stopped may wake up when another attempt has long taken its place. Two rules keep it from
doing harm, and neither needs a clock or a lock: it looks for a newer number before it writes (`Fence`), and what it
managed to write for steps beyond the one that a later attempt went on from does not count (`Attempts.is_void`).

Where machines exchange their files through a bucket, they see each other's as often as they look (`file_exchange`).
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.atomic_file import damaged, write_json
from orchestrator.errors import FencedError, StorageError
from orchestrator.object_store import PATIENCE_S
from orchestrator.planning.run_plan import Kept
from orchestrator.runs.file_exchange import CommonFolder, Exchange

_LOOK_EVERY_S = 0.25
"""How long an answer of `Fence.holds` stays good: a folder is listed in 20 us on a local disk, not on a shared one."""
_SEEN_WITHIN_S = 10.0
"""How long a network file system may take to show a new file to another machine (a guess: NFS caches for seconds)."""
_DIGITS = 4
_KEPT = "kept.json"
ATTEMPTS = "attempts"
"""In a run folder."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """How long a run's earlier attempts had their workers, from when these were asked for to when they were gone."""

    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    """Seconds times workers."""


class Attempts:
    """The attempts of one run, in its folder. Raises StorageError when that cannot be read or written."""

    def __init__(self, run_folder: Path, exchange: Exchange | None = None) -> None:
        self._folder, self._exchange = run_folder / ATTEMPTS, exchange or CommonFolder(run_folder)

    def refresh(self) -> None:
        """Brings what other machines have written."""
        self._exchange.fetch(ATTEMPTS, patience_s=PATIENCE_S)

    def open(self, *, workers: int, cause: str, after: int | None = None) -> int:
        """A new attempt's number; from here on the workers of all earlier ones are fenced out.

        `cause` is `first start`, or what ended the attempt before. `after` is the attempt that whoever opens this one
        has opened before: raises FencedError when another has opened one since, which must not be fenced out.
        """
        self.refresh()
        while True:
            newest = self.newest()
            if after is not None and newest != after:
                raise _taken_over(after, newest)
            number = newest + 1
            try:
                value = {"number": number, "workers": workers, "cause": cause, "started_s": time.time()}
                self._write(_name(number), {**value, "driver": uuid.uuid4().hex}, new=True)
            except FileExistsError:  # another driver took this number
                continue
            if not self._exchange.stands(f"{ATTEMPTS}/{_name(number)}"):  # one on another machine did
                raise _taken_over(number, number)
            return number

    def close(self, number: int) -> None:
        """The workers of an attempt are gone; the first to say so is believed."""
        with suppress(FileExistsError):
            self._write(_ended_name(number), {"ended_s": time.time()}, new=True)

    def held(self) -> Held:
        """How long all attempts that were seen to end had their workers; one whose driver was killed counts as 0."""
        wall = device = 0.0
        for number in range(1, self.newest() + 1):
            started, ended = self._read(_name(number)), self._read(_ended_name(number))
            if started is not None and ended is not None:
                seconds = max(0.0, float(ended["ended_s"]) - float(started["started_s"]))
                wall, device = wall + seconds, device + seconds * int(started["workers"])
        return Held(wall_seconds=wall, device_seconds=device)

    def started_s(self, number: int) -> float | None:
        """Unix time at which the workers of an attempt were asked for."""
        started = self._read(_name(number))
        return None if started is None else float(started["started_s"])

    def check_seen(self, number: int, *, within_s: float = _SEEN_WITHIN_S) -> None:
        """A worker makes sure that its machine sees what the driver has written. Raises StorageError when it does not:
        its checkpoints and metrics would lie where nobody looks for them."""
        self.refresh()
        file = self._folder / _name(number)
        deadline = time.monotonic() + within_s
        while not file.is_file():
            if time.monotonic() > deadline:
                raise unseen(self._folder.parent)
            time.sleep(_LOOK_EVERY_S)

    def cause_of_start(self) -> str:
        """Why a command opens an attempt, before it has seen one end."""
        return "started again" if self.newest() else "first start"

    def newest(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._unusable(error) from error
        return max((int(name[:_DIGITS]) for name in names if name[:_DIGITS].isdigit()), default=0)

    def note_resumed(self, number: int, step: int) -> None:
        """Rank 0 of an attempt says from which step it goes on."""
        self._write(_resumed_name(number), {"step": step})

    def resumed_step(self, number: int) -> int | None:
        """The step that an attempt went on from; None while it has not begun to train."""
        resumed = self._read(_resumed_name(number))
        return None if resumed is None else int(resumed["step"])

    def tell(self, number: int, text: str) -> None:
        """What an attempt was, or how it ended; a later text replaces an earlier one."""
        self._write(_told_name(number), {"text": text})

    def told(self) -> dict[int, str]:
        """What was told of each attempt, by its number."""
        found = {number: self._read(_told_name(number)) for number in range(1, self.newest() + 1)}
        return {number: str(value["text"]) for number, value in found.items() if value is not None}

    def keep(self, kept: Kept) -> None:
        """From now on attempts have this in common."""
        self._write(_KEPT, asdict(kept))

    def kept(self) -> Kept | None:
        """What earlier attempts have settled; None before the first."""
        value = self._read(_KEPT)
        return None if value is None else Kept(**value)

    def is_void(self, number: int, step: int) -> bool:
        """Whether what attempt `number` wrote for `step` does not count: a later one went on from a step before."""
        later = map(self.resumed_step, range(number + 1, self.newest() + 1))
        return any(resumed is not None and step > resumed for resumed in later)

    def fence(self, number: int) -> Fence:
        """What the workers of an attempt ask before they write."""
        return Fence(number, newest=self.newest, refresh=self.refresh)

    def _write(self, name: str, value: dict[str, Any], *, new: bool = False) -> None:
        """Raises FileExistsError when `new` finds the name taken."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / name, value, new=new)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._unusable(error) from error
        self._exchange.send(f"{ATTEMPTS}/{name}", patience_s=PATIENCE_S)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = json.loads((self._folder / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise damaged("what the run knows of its attempts", self._folder / name, error) from error
        except OSError as error:
            raise self._unusable(error) from error
        return value

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            "the attempts of this run cannot be kept",
            got=f"{self._folder} ({error})",
            do="free space, or set checkpoint.storage to a folder that every node can write",
        )


def unseen(run_folder: Path) -> StorageError:
    """The error of a worker whose machine does not see the run's folder."""
    return StorageError(
        "a worker's machine does not see the run's folder",
        got=f"{socket.gethostname()}: {run_folder}",
        do="set ORCHESTRATOR_HOME on all nodes, or checkpoint.storage, to a folder that every node sees; or use a "
        "bucket instead: checkpoint.storage=s3://BUCKET/PATH",
    )


def _name(number: int) -> str:
    return f"{number:0{_DIGITS}d}.json"


def _ended_name(number: int) -> str:
    return f"{number:0{_DIGITS}d}.ended.json"


def _resumed_name(number: int) -> str:
    return f"{number:0{_DIGITS}d}.resumed.json"


def _told_name(number: int) -> str:
    return f"{number:0{_DIGITS}d}.told.json"


class Fence:
    """Tells the workers of one attempt whether they may still write."""

    def __init__(
        self,
        number: int,
        *,
        newest: Callable[[], int],
        refresh: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`refresh` makes sure that `newest` knows what other machines have written by now."""
        self._number, self._newest, self._refresh, self._clock = number, newest, refresh, clock
        self._looked_s = float("-inf")
        self._holds = True

    def holds(self, *, now: bool = False) -> bool:
        """Whether no newer attempt has begun; `now` looks at once, else an answer may be 0.25 s old.

        Once it does not hold it never will again.
        """
        if self._holds and (now or self._clock() - self._looked_s >= _LOOK_EVERY_S):
            if now:
                self._refresh()
            self._holds = self._newest() <= self._number
            self._looked_s = self._clock()
        return self._holds

    def holds_here(self) -> bool:
        """Whether this machine has been told of no newer attempt by now: no answer of before it was told will do, as a
        process that was stopped for a while may have two threads ask within an instant."""
        self._looked_s = float("-inf")
        return self.holds()

    def check(self) -> None:
        """Raises FencedError when a newer attempt has begun."""
        if not self.holds(now=True):
            raise _taken_over(self._number, self._newest())


def _taken_over(number: int, newest: int) -> FencedError:
    return FencedError(
        "another command has taken this run over",
        got=f"attempt {number}, while attempt {newest} of the other has begun",
        do="leave this run to the other command, or stop that one first",
    )
