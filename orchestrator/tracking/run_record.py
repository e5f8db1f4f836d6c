"""The desired state of a run in MLflow, kept in the run's folder: `reconcile` makes the server match it, at once or
when it is back.

The driver changes it (`create`, `change`); it never waits for a store. Beside it lie the points (`outbox`) and what the
store has confirmed. A driver holds a lock in the folder as long as it lives, which no kill can leave behind: so others
know whether a run that should be running is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.atomic_file import damaged, read_json, write_json
from orchestrator.credentials import public
from orchestrator.errors import ClusterError, StorageError

Status = Literal["running", "finished", "failed", "killed"]

OUTBOX = "outbox"
"""In a run folder: all that is on its way to MLflow."""
_DESIRED, _DESIRED_LOCK, _DRIVER_LOCK = "desired.json", "desired.lock", "driver.lock"
HANDLE = "handle.json"
"""Beside it: which run it is, without what may be secret, for a driver on another machine that takes the run up."""
_RUN_FILE = "mlflow.json"
"""In a run folder: which MLflow run it has become."""
_RESERVE, _RESERVE_BYTES = "reserve", 131_072
"""Room on the disk for the files below; together some 30 kB for a run with a long spec (a guess: up to 100)."""
_INSTANT_S = 0.05
_DEPTHS = ("", "trials/*/", "*/", "*/trials/*/")
"""Where runs lie below a run folder or a folder of run folders."""


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """Names a run, before and after the store knows it; goes to the workers."""

    key: str
    """Tag of the run in the store, by which it is found again."""
    uri: str
    """The store, the same from any working directory."""
    experiment: str
    name: str
    created_ms: int
    """Milliseconds since 1970."""
    parent: str | None = None
    """Run folder of the search that a trial belongs to, or of the whole that a stage belongs to, seen from its own."""


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """What the store calls a run."""

    run_id: str
    experiment_id: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class DesiredRun:
    """The desired state of a run in the store, apart from its metrics."""

    handle: RunHandle
    status: Status = "running"
    ended_ms: int | None = None
    """Milliseconds since 1970."""
    tags: Mapping[str, str | None] = field(default_factory=dict)
    """None for one that was true of an earlier attempt and is not any more."""
    params: Mapping[str, str] = field(default_factory=dict)
    """The store keeps the first value of each."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Text files by name."""
    best: str | None = None
    """On a search or a run of stages: run folder of the run whose figures it shows, seen from its own."""
    trials: tuple[str, ...] = ()
    """On a run that shows another's figures: run folders of all whose costs it sums, seen from its own."""

    def digest(self) -> str:
        """Another one after every change."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> DesiredRun:
        """The run that `asdict` gave, also after JSON."""
        known = {item.name: value[item.name] for item in fields(cls) if item.name in value}
        return cls(**{**known, "handle": RunHandle(**value["handle"]), "trials": tuple(value["trials"])})


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a run says of itself when it is opened, besides its metrics."""

    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    """Flattened; a run that is opened again keeps those it has."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Text files by name."""


def new_handle(*, uri: str, experiment: str, name: str, parent: str | None) -> RunHandle:
    """A handle that no other run has."""
    return RunHandle(
        key=uuid.uuid4().hex,
        uri=uri,
        experiment=experiment,
        name=name,
        created_ms=now_ms(),
        parent=parent,
    )


def known_handle(run_folder: Path, *, uri: str) -> RunHandle | None:
    """The handle that a driver on another machine gave the run of a folder; None where there was none."""
    value = read_json(run_folder / OUTBOX / HANDLE)
    return None if value is None else RunHandle(**value, uri=uri)


def note_handle(run_folder: Path, handle: RunHandle) -> None:
    """Keeps it for `known_handle`; the URI of a store may hold a password. Raises StorageError when it cannot."""
    write_private(run_folder / OUTBOX / HANDLE, {key: value for key, value in asdict(handle).items() if key != "uri"})


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def read(run_folder: Path) -> DesiredRun | None:
    """What is wanted of the run of a folder; None when it is not tracked.

    Raises StorageError when that cannot be read.
    """
    file = run_folder / OUTBOX / _DESIRED
    try:
        run = DesiredRun.from_dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("what a run wants to say to MLflow cannot be read", got=f"{file}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise damaged("what a run wants to say to MLflow", file, error) from error
    uri = _moved_along(run.handle.uri, run_folder)
    return run if uri == run.handle.uri else replace(run, handle=replace(run.handle, uri=uri))


def _moved_along(uri: str, run_folder: Path) -> str:
    """A SQLite store that has known the run and is gone from its place, where it now lies above the run's folder: the
    home of both was moved."""
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not uri.startswith("sqlite:////") or path.exists() or not (run_folder / _RUN_FILE).is_file():
        return uri
    found = (folder / path.name for folder in run_folder.absolute().parents)
    return next((uri.replace(str(path), str(file)) for file in found if file.is_file()), uri)


def put(run_folder: Path, run: DesiredRun | None) -> None:
    """Replaces what is wanted; None takes it away. Raises StorageError when it cannot be written."""
    with _changing(run_folder):
        _write(run_folder, run)
        _reserve_room(run_folder / OUTBOX)


def change(run_folder: Path, how: Callable[[DesiredRun], DesiredRun]) -> DesiredRun | None:
    """Changes what is wanted, one process at a time; nothing to change where the run is not tracked.

    Raises StorageError when it cannot be read or written.
    """
    if not (run_folder / OUTBOX / _DESIRED).exists():
        return None
    with _changing(run_folder):
        before = read(run_folder)
        if before is None:
            return None
        after = how(before)
        if after != before:
            _write(run_folder, after)
        return after


def with_tags(run: DesiredRun, tags: Mapping[str, str | None]) -> DesiredRun:
    """The run with some tags set or, where None, taken away."""
    return replace(run, tags={**run.tags, **tags})


def ended(run: DesiredRun, status: Status, *, tags: Mapping[str, str | None], ended_ms: int) -> DesiredRun:
    """The run as it has ended."""
    return replace(with_tags(run, tags), status=status, ended_ms=ended_ms)


def stored_run(run_folder: Path) -> StoredRun | None:
    """The MLflow run of a folder, once the store knows it."""
    value = read_json(run_folder / _RUN_FILE)
    return None if value is None else StoredRun(**value)


def write_stored_run(run_folder: Path, run: StoredRun) -> None:
    """Remembers the MLflow run of a folder. Raises StorageError when it cannot be written."""
    write_private(run_folder / _RUN_FILE, asdict(run))


def find_runs(root: Path) -> list[Path]:
    """Run folders with something for MLflow: the root, a search's trials, and those of runs one level below."""
    found = {path.parent.parent for depth in _DEPTHS for path in root.glob(f"{depth}{OUTBOX}/{_DESIRED}")}
    return sorted(found)


def set_aside(run_folder: Path) -> Path:
    """Gives the folder's name free for another run; what this one and its trials wanted to say stays to be sent, beside
    it. Returns where. Raises StorageError when that cannot be done."""
    aside = run_folder.with_name(f"{run_folder.name}.unsent-{uuid.uuid4().hex[:8]}")
    try:
        run_folder.rename(aside)
        for folder in (*aside.glob("trials/*"), aside):
            for path in folder.iterdir():
                if path.is_dir() and path.name not in (OUTBOX, "trials"):
                    shutil.rmtree(path)
                elif path.is_file() and path.name != _RUN_FILE:
                    path.unlink()
    except OSError as error:
        raise StorageError("an earlier run cannot be moved aside", got=f"{run_folder}: {error.strerror}") from error
    return aside


# -- who drives it -----------------------------------------------------------------------------------------------------


@contextmanager
def driving(run_folder: Path) -> Iterator[None]:
    """Says to others that this process drives the run of a folder.

    Raises ClusterError when another one does.
    """
    file = _open_lock(run_folder / OUTBOX / _DRIVER_LOCK)
    try:
        # Whoever asks whether a driver lives holds the lock for an instant.
        if not any(_try_lock(file, fcntl.LOCK_EX, after_s=pause_s) for pause_s in (0, _INSTANT_S, _INSTANT_S)):
            raise ClusterError(
                "another command drives this run",
                got=os.pread(file, 200, 0).decode(errors="replace").strip(),
                do="wait for its end, or stop it with Ctrl-C; training.seed=N makes another run",
            )
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def check_undriven(run_folder: Path) -> None:
    """Raises ClusterError when another process drives the run of a folder, which need not be there."""
    if (run_folder / OUTBOX / _DRIVER_LOCK).exists():
        with driving(run_folder):
            pass


def driver_lives(run_folder: Path) -> bool:
    """Whether some process drives the run of a folder; a trial is driven by its search, a stage by itself too."""
    run = read(run_folder)
    above = [] if run is None or run.handle.parent is None else [run_folder / run.handle.parent]
    return any(_is_driven(folder / OUTBOX / _DRIVER_LOCK) for folder in (run_folder, *above))


def _is_driven(path: Path) -> bool:
    if not path.exists():
        return False
    file = _open_lock(path)
    try:
        return not _try_lock(file, fcntl.LOCK_SH, after_s=0)
    finally:
        os.close(file)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for a lock that is gone with its process."""
    file = _open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _try_lock(file: int, kind: int, *, after_s: float) -> bool:
    time.sleep(after_s)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            "the run's folder cannot be written",
            got=f"{path.parent}: {error.strerror}",
            do="set checkpoint.storage to a folder that can be written",
        ) from error


# -- files -------------------------------------------------------------------------------------------------------------


def _changing(run_folder: Path) -> Any:
    return locked(run_folder / OUTBOX / _DESIRED_LOCK)


def _write(run_folder: Path, run: DesiredRun | None) -> None:
    file = run_folder / OUTBOX / _DESIRED
    if run is None:
        file.unlink(missing_ok=True)
    else:
        write_private(file, public(asdict(run)))


def _reserve_room(folder: Path) -> None:
    file = folder / _RESERVE
    if not file.exists():
        try:
            file.write_bytes(bytes(_RESERVE_BYTES))
        except OSError as error:
            raise StorageError("the run's folder cannot be written", got=f"{folder}: {error.strerror}") from error


def write_private(path: Path, value: Mapping[str, Any]) -> None:
    """JSON that appears whole, through a crash of the machine too, and that only its owner may read: the URI of a
    database may hold a password. Raises StorageError when it cannot be written."""
    try:
        try:
            write_json(path, value, durable=True, private=True)
        except OSError as error:
            # How a run ended on a full disk must still be said: the room for that was taken when it began.
            reserve = path.parent / _RESERVE
            if error.errno != errno.ENOSPC or not reserve.exists():
                raise
            reserve.unlink(missing_ok=True)
            write_json(path, value, durable=True, private=True)
    except OSError as error:
        raise StorageError("the run's folder cannot be written", got=f"{path.parent}: {error.strerror}") from error
