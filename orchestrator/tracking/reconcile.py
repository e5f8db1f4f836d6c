"""Makes MLflow's store agree with run folders: `sync` once, `Shipper` in the background, `flush` for what was left.

The store may be absent at the start, die, and come back: what is wanted waits in the folder, and each step of `sync`
may be repeated. One process at a time does so for a folder.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import OrchestratorError, StorageError, UserError
from orchestrator.tracking import mlflow_backend, outbox, run_record, store
from orchestrator.tracking.run_record import OUTBOX, DesiredRun, StoredRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

POLL_S = 1.0
"""Pause between looks at the folders: a run of 10 steps/s sends one batch a second (a guess that suits a chart)."""
RETRY_FIRST_S = 0.5
RETRY_MOST_S = 30.0
"""Pauses while the store is away double from the first to the most (a guess: a server restart takes 6 to 25 s)."""
GRACE_S = 2.0
"""How long the end of a command waits for a store that is away."""

_CONFIRMED, _SYNC_LOCK = "confirmed.json", "sync.lock"
_BY_FLUSH = "its driver ended without saying how"


def sync(folder: Path, *, probe: bool = True) -> int:
    """Makes the store agree with a run folder; returns the points sent, 0 when there was nothing to do.

    `probe` looks first whether the store answers, which MLflow itself takes half a minute to find out. Raises
    StorageError when the store does not take it all, SpecError when it never will; what it has not taken stays.
    """
    wanted = run_record.read(folder)
    if wanted is None or _agrees(folder, wanted):
        return 0
    uri = wanted.handle.uri
    if probe:
        store.check_store(uri)
    client = _client(uri)
    with store.translated(uri, doing=f"take the run {wanted.handle.name!r}"):
        parent_run_id = _parent_run_id(client, folder, wanted)
        with run_record.locked(folder / OUTBOX / _SYNC_LOCK):
            wanted = run_record.read(folder) or wanted
            run = _found_or_created(client, folder, wanted, parent_run_id=parent_run_id)
            return _agree(client, folder, wanted, run)


def is_settled(folder: Path) -> bool:
    """Whether the run of a folder has ended and the store has it all."""
    wanted = run_record.read(folder)
    return wanted is None or (_agrees(folder, wanted) and wanted.status != "running")


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """What became of one run's results."""

    folder: Path
    name: str
    status: run_record.Status
    run_id: str | None
    """In MLflow; None while the store does not know the run."""
    sent: int = 0
    """Points that the store has taken now."""
    waiting: int = 0
    """Points that it has not."""
    why: str | None = None
    """Why something still waits; None when the store has everything."""
    is_final: bool = False
    """It will not be taken later either, for instance because the run was deleted in the store."""

    def note(self) -> str | None:
        """For the user, where something still waits."""
        if self.why is None:
            return None
        return (
            f"MLflow has not taken all results, {self.waiting} points wait: {self.why}; "
            f"`orchestrator flush {self.folder}` sends them"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "run_folder": str(self.folder),
            "name": self.name,
            "status": self.status,
            "mlflow_run_id": self.run_id,
            "sent": self.sent,
            "waiting": self.waiting,
            "why": self.why,
            "is_final": self.is_final,
        }


def shipment(folder: Path, *, error: OrchestratorError | None = None) -> Shipment:
    """Where a tracked run stands; `error` is what its last sync met. Raises StorageError when its folder is gone."""
    wanted, run = run_record.read(folder), run_record.stored_run(folder)
    if wanted is None:
        raise StorageError("the run's folder is gone, and with it what MLflow had not been told", got=str(folder))
    why = None if error is None else _one_line(error)
    if why is None and wanted.status != "running" and not _agrees(folder, wanted):
        why = "the store has not been given everything yet"
    return Shipment(
        folder=folder,
        name=wanted.handle.name,
        status=wanted.status,
        run_id=None if run is None else run.run_id,
        waiting=outbox.count_waiting(folder / OUTBOX),
        why=why,
        is_final=isinstance(error, UserError),
    )


def flush(folders: Iterable[Path]) -> list[Shipment]:
    """Sends what dead machines and absent stores left in run folders; says of each run what became of it.

    A run that should be running and has no driver any more is killed.
    """
    away: dict[str, StorageError] = {}
    # Trials before their search, which shows the figures of the best.
    return [_flush_one(folder, away) for folder in sorted(folders, key=lambda folder: (-len(folder.parts), folder))]


def _flush_one(folder: Path, away: dict[str, StorageError]) -> Shipment:
    """`away` holds the stores that have been found not to answer, with what they said."""
    try:
        uri = settle_dead(folder).handle.uri
    except StorageError as error:
        return Shipment(folder=folder, name=folder.name, status="running", run_id=None, why=_one_line(error))
    before = outbox.count_waiting(folder / OUTBOX)
    failure: OrchestratorError | None = away.get(uri)
    if failure is None:
        try:
            sync(folder)
        except StorageError as error:
            failure = away[uri] = error
        except UserError as error:
            failure = error
    standing = shipment(folder, error=failure)
    return replace(standing, sent=max(0, before - standing.waiting))


def flush_left_behind(root: Path, *, but: Path) -> list[Shipment]:
    """`flush` for runs below a folder whose driver is gone and of which the store lacks something; `but` and its trials
    are left out."""
    found = [folder for folder in run_record.find_runs(root) if not folder.is_relative_to(but)]
    return flush(folder for folder in found if _is_left_behind(folder))


def _is_left_behind(folder: Path) -> bool:
    try:
        return not is_settled(folder) and not run_record.driver_lives(folder)
    except StorageError:
        return True  # a damaged one, of which `flush` says so


def settle_dead(folder: Path) -> DesiredRun:
    """The wanted run, with a truthful status where its driver is dead: killed, when the last points were written."""

    def judged(run: DesiredRun) -> DesiredRun:
        if run.status != "running" or run_record.driver_lives(folder):
            return run
        ended_ms = outbox.newest_point_ms(folder / OUTBOX) or run.handle.created_ms
        return run_record.ended(run, "killed", tags={mlflow_backend.ERROR_TAG: _BY_FLUSH}, ended_ms=ended_ms)

    run = run_record.change(folder, judged)
    assert run is not None, "the run is tracked"
    return run


class Shipper:
    """Syncs run folders in the background until `close`, and says when the store goes away and comes back."""

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._folders, self._say = [folder], say
        self._root, self._start_waits = folder, True
        self._error: OrchestratorError | None = None
        self._first_pass = threading.Event()
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._ship, name="mlflow-shipper", daemon=True)

    def start(self, *, patience_s: float) -> None:
        """Begins, and waits for the end of the first pass for some seconds. Raises the UserError that it met."""
        self._thread.start()
        self._first_pass.wait(patience_s)
        self._start_waits = False
        if isinstance(self._error, UserError):
            self._given_up.set()
            raise self._error

    def add(self, folder: Path) -> None:
        """Ships another folder too: a trial's."""
        if folder not in self._folders:
            self._folders.append(folder)

    def close(self, *, patience_s: float) -> Shipment:
        """Sends what is left, for some seconds, or for `GRACE_S` where the store is away; says what still waits."""
        began = time.monotonic()
        self._closing.set()
        while self._thread.is_alive():
            waited_s = time.monotonic() - began
            if waited_s > patience_s or (self._error is not None and waited_s > GRACE_S):
                break
            self._thread.join(0.05)
        self._given_up.set()
        return shipment(self._root, error=self._error)

    def _ship(self) -> None:
        retry_s = RETRY_FIRST_S
        while not self._given_up.is_set():
            last_pass = self._closing.is_set()
            failed = self._try_pass()
            self._first_pass.set()
            if last_pass and not failed:
                return
            pause_s = POLL_S
            if failed:
                pause_s, retry_s = (RETRY_FIRST_S if last_pass else retry_s), min(2 * retry_s, RETRY_MOST_S)
            else:
                retry_s = RETRY_FIRST_S
            (self._given_up if last_pass else self._closing).wait(pause_s)

    def _try_pass(self) -> bool:
        """Whether it failed: whatever was not taken stays, and is tried again."""
        before, self._error = self._error, self._pass(probe=self._error is not None or not self._first_pass.is_set())
        raised_by_start = self._start_waits and isinstance(self._error, UserError)
        if self._error is not None and before is None and not raised_by_start:
            self._say(f"MLflow does not take results, they wait in {self._root}: {_one_line(self._error)}")
        if self._error is None and before is not None:
            self._say("MLflow takes results again")
        return self._error is not None

    def _pass(self, *, probe: bool) -> OrchestratorError | None:
        """Syncs every folder; the first error. One run that was deleted in the store does not hold up the others."""
        first: OrchestratorError | None = None
        for folder in list(self._folders):
            try:
                sync(folder, probe=probe)
                if folder != self._root and is_settled(folder):
                    self._folders.remove(folder)
            except UserError as error:
                first = first or error
            except OrchestratorError as error:
                return first or error
        return first


def _one_line(error: OrchestratorError) -> str:
    return error.what if error.got is None else f"{error.what} ({error.got})"


# -- one run -----------------------------------------------------------------------------------------------------------


def _agrees(folder: Path, wanted: DesiredRun) -> bool:
    return _confirmed(folder).get("digest") == wanted.digest() and outbox.is_empty(folder / OUTBOX)


def _confirmed(folder: Path) -> dict[str, Any]:
    """What the store has said yes to: the digests of the wanted run and of its artifacts."""
    try:
        value: dict[str, Any] = json.loads((folder / OUTBOX / _CONFIRMED).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value


def _agree(client: MlflowClient, folder: Path, wanted: DesiredRun, run: StoredRun) -> int:
    """What the run is, then its points in order, then how it ended."""
    confirmed, digest = _confirmed(folder), wanted.digest()
    is_new = confirmed.get("digest") != digest
    if is_new:
        mlflow_backend.describe(client, run.run_id, wanted, known_artifacts=confirmed.get("artifacts", {}))
    sent = outbox.flush_folder(folder / OUTBOX, lambda batch: mlflow_backend.send(client, run, batch))
    if is_new and wanted.status != "running":
        _end(client, folder, wanted, run)
    if confirmed.get("digest") != digest:
        artifacts = {name: mlflow_backend.digest(text) for name, text in wanted.artifacts.items()}
        run_record.write_private(folder / OUTBOX / _CONFIRMED, {"digest": digest, "artifacts": artifacts})
    return sent


def _end(client: MlflowClient, folder: Path, wanted: DesiredRun, run: StoredRun) -> None:
    for trial in wanted.trials:
        with suppress(UserError):  # one that was deleted in the store
            sync(folder / trial, probe=False)
    if wanted.best is not None:
        best = run_record.stored_run(folder / wanted.best)
        assert best is not None, "its trials are in the store"
        assert wanted.ended_ms is not None
        stored = [run_record.stored_run(folder / trial) for trial in wanted.trials]
        ids = [trial.run_id for trial in stored if trial is not None]
        mlflow_backend.copy_best(client, run, best.run_id, trials=ids, at_ms=wanted.ended_ms)
    mlflow_backend.end(client, run.run_id, wanted)


def _found_or_created(
    client: MlflowClient, folder: Path, wanted: DesiredRun, *, parent_run_id: str | None
) -> StoredRun:
    """The run of a folder; remembers there what the store calls it."""
    run = run_record.stored_run(folder)
    if run is not None and run.uri == wanted.handle.uri:
        return run
    if run is not None:
        run = StoredRun(run_id=run.run_id, experiment_id=run.experiment_id, uri=wanted.handle.uri)
    else:
        experiment_id = store.experiment_id(client, wanted.handle.uri, wanted.handle.experiment)
        run = mlflow_backend.find(client, wanted.handle, experiment_id)
        if run is not None:  # given it by a driver on another machine, or by one that died right after
            outbox.assume_shipped(folder / OUTBOX, mlflow_backend.newest_steps(client, run.run_id))
        else:
            run = mlflow_backend.create(client, wanted, experiment_id, parent_run_id=parent_run_id)
    run_record.write_stored_run(folder, run)
    return run


def _parent_run_id(client: MlflowClient, child: Path, wanted: DesiredRun) -> str | None:
    """The run of the search, in the store before its trials; None on a disk that does not hold the search."""
    if wanted.handle.parent is None:
        return None
    folder = child / wanted.handle.parent
    known, parent = run_record.stored_run(folder), run_record.read(folder)
    if known is not None or parent is None:
        return None if known is None else known.run_id
    with run_record.locked(folder / OUTBOX / _SYNC_LOCK):
        return _found_or_created(client, folder, parent, parent_run_id=None).run_id


@functools.lru_cache(maxsize=8)
def _client(uri: str) -> MlflowClient:
    """One client of a store for all runs of the process."""
    return store.client(uri)
