"""The folder of a run: where it is, whether it can be written, how it is taken up on another machine, and forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator import locations
from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import SpecError, StorageError
from orchestrator.object_store import check_bucket
from orchestrator.runs.attempts import ATTEMPTS
from orchestrator.runs.budget_ledger import LEDGER
from orchestrator.runs.file_exchange import Exchange, exchange_at
from orchestrator.runs.job import MODEL, OUTCOME, bucket_of
from orchestrator.samples.prepare import PreparedData
from orchestrator.scheduling.identity import Met, identity_of
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import StagedSpec
from orchestrator.tracking import run_record
from orchestrator.tracking.reconcile import flush
from orchestrator.tracking.run_record import OUTBOX, check_undriven, find_runs

RESULT = "result.json"
"""In a run folder: what the run answered, and its budget; it is over, or over until it is given a larger budget."""
SHARED = (ATTEMPTS, OUTBOX, LEDGER, OUTCOME, RESULT, MODEL)
"""In a run folder: what a driver needs that others may have written."""
_BUCKET = "bucket.json"


def run_folder_of(spec: RunSpec, data: PreparedData, trials: Sequence[Met] = ()) -> Path:
    """The folder of a training, or of a search with its trials: the same for the same settings on the same inputs.

    Raises DataError when a file of the base model cannot be read.
    """
    return storage_of(spec) / f"{spec.name}-{identity_of(spec, data, trials)}"


def stages_folder_of(staged: StagedSpec) -> Path:
    """The folder of a run of stages, beside those of the stages themselves: the same for the same settings."""
    return storage_of(staged.first) / f"{staged.name}-{staged.fingerprint()}"


def storage_of(spec: RunSpec) -> Path:
    """Where run folders lie on this machine."""
    if spec.checkpoint.storage and not spec.checkpoint.in_a_bucket:
        return Path(spec.checkpoint.storage).expanduser().absolute()
    return locations.home() / "runs"


def ledger_folder(run_folder: Path) -> Path:
    """Where a training, or a search for all its trials, keeps what was spent of its budget."""
    return run_folder / LEDGER


def check_storage(spec: RunSpec) -> None:
    """Refuses a storage folder that is a file; raises SpecError. A bucket takes `check_bucket_of` to look into."""
    storage = spec.checkpoint.storage
    if storage is not None and not spec.checkpoint.in_a_bucket and Path(storage).expanduser().is_file():
        raise SpecError("checkpoint.storage is a file", got=storage, do="give a folder, new or existing")


def check_bucket_of(spec: RunSpec) -> None:
    """Raises SpecError when the spec's bucket does not exist, StorageError when it cannot be opened."""
    if spec.checkpoint.storage is not None and spec.checkpoint.in_a_bucket:
        check_bucket(spec.checkpoint.storage)


def make_folder(folder: Path) -> None:
    """Creates a run folder; raises StorageError when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "the run's folder cannot be created", got=f"{folder} ({error.strerror})", do="set checkpoint.storage"
        ) from error


def exchanged_at(spec: RunSpec, folder: Path) -> str | None:
    """Where in a bucket the machines of a training share its folder; None where all see it, as those of a search."""
    return None if spec.search is not None else bucket_of(spec, folder)


def take_up(spec: RunSpec, folder: Path) -> None:
    """Brings what earlier drivers and workers of a run have left on other machines. Raises StorageError."""
    uri = exchanged_at(spec, folder)
    exchange_at(folder, uri).fetch(*SHARED)
    if uri is not None and folder.is_dir():
        write_json(folder / _BUCKET, {"uri": uri})


def shared(spec: RunSpec, folder: Path) -> Exchange:
    """The exchange of a training that begins; where it is, is kept for `fetch_points` and `model_for_all`.

    Raises StorageError when the bucket cannot be opened.
    """
    uri = exchanged_at(spec, folder)
    if uri is not None:
        write_json(folder / _BUCKET, {"uri": uri})
    return exchange_at(folder, uri)


def model_for_all(model: str, folder: Path) -> str:
    """Where every machine finds a run's model: in the bucket that the run's machines met in, else at its path."""
    bucket = read_json(folder / _BUCKET)
    return model if bucket is None else f"{bucket['uri']}/{MODEL}"


def fetch_points(folder: Path) -> None:
    """Brings the metrics that workers of a run have left in its bucket, if it has one. Raises StorageError."""
    bucket = read_json(folder / _BUCKET)
    if bucket is not None:
        exchange_at(folder, bucket["uri"]).fetch(OUTBOX)


def forget(spec: RunSpec, folder: Path) -> None:
    """Removes an earlier run's folder and what it has in a bucket; what MLflow has not taken of it stays beside it, for
    `flush`.

    Raises ClusterError when another command drives that run, StorageError when the bucket cannot be emptied.
    """
    check_undriven(folder)
    exchange_at(folder, bucket_of(spec, folder)).forget()
    if not folder.is_dir():
        return
    if any(shipment.why and not shipment.is_final for shipment in flush(find_runs(folder))):
        run_record.set_aside(folder)
    shutil.rmtree(folder, ignore_errors=True)
