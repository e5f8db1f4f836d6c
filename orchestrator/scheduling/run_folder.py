"""The folder of a run: where it is, whether it can be written, and how it is forgotten."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from orchestrator import locations
from orchestrator.errors import SpecError, StorageError
from orchestrator.spec import RunSpec
from orchestrator.tracking import desired
from orchestrator.tracking.desired import driving, find_runs
from orchestrator.tracking.sync import flush
from orchestrator.training.prepare import PreparedData

_LEDGER = "ledger"
"""In a run folder: what was spent of its budget."""


def run_folder_of(spec: RunSpec, data: PreparedData) -> Path:
    """The folder of a run: the same for the same spec on the same data."""
    identity = hashlib.sha256(f"{spec.fingerprint()} {data.fingerprint}".encode()).hexdigest()[:8]
    storage = (
        Path(spec.checkpoint.storage).expanduser().absolute()
        if spec.checkpoint.storage and not spec.checkpoint.in_a_bucket
        else locations.home() / "runs"
    )
    return storage / f"{spec.name}-{identity}"


def ledger_folder(run_folder: Path) -> Path:
    """Where a training, or a search for all its trials, keeps what was spent of its budget."""
    return run_folder / _LEDGER


def check_storage(spec: RunSpec) -> None:
    """Refuses a storage folder that is a file; raises SpecError."""
    storage = spec.checkpoint.storage
    if storage is not None and not spec.checkpoint.in_a_bucket and Path(storage).expanduser().is_file():
        raise SpecError("checkpoint.storage is a file", got=storage, do="give a folder, new or existing")


def make_folder(folder: Path) -> None:
    """Creates a run folder; raises StorageError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "the run's folder cannot be created", got=f"{folder} ({error.strerror})", do="set checkpoint.storage"
        ) from error


def forget(folder: Path) -> None:
    """Removes an earlier run's folder; what MLflow has not taken of it stays beside it, for `flush`.

    Raises ClusterError when another command drives that run.
    """
    if not folder.is_dir():
        return
    with driving(folder):
        pass
    if any(shipment.why and not shipment.is_final for shipment in flush(find_runs(folder))):
        desired.set_aside(folder)
    shutil.rmtree(folder, ignore_errors=True)
