"""The folder of a run: where it is, whether it can be written, how it is taken up on another machine, and forgotten."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from orchestrator import locations
from orchestrator.atomic_file import read_json, write_json
from orchestrator.errors import SpecError, StorageError
from orchestrator.methods.as_is import EVALUATION
from orchestrator.methods.few_shot import PROMPT, SCORES
from orchestrator.object_store import PATIENCE_S, check_bucket
from orchestrator.runs.attempts import ATTEMPTS
from orchestrator.runs.budget_ledger import LEDGER
from orchestrator.runs.file_exchange import Exchange, begin_life, exchange_at
from orchestrator.runs.job import ENDING, MODEL, OUTCOME, REPORTS, RUNGS, TRIALS, bucket_of
from orchestrator.samples.prepare import PreparedData
from orchestrator.scheduling.identity import Met, identity_of
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import StagedSpec
from orchestrator.tracking import run_record
from orchestrator.tracking.reconcile import flush
from orchestrator.tracking.run_record import OUTBOX, check_undriven, find_runs

RESULT = "result.json"
"""In a run folder: what the run answered, and its budget; it is over, or over until it is given a larger budget."""
SHARED = (ATTEMPTS, OUTBOX, LEDGER, OUTCOME, RESULT, MODEL, EVALUATION, PROMPT, SCORES)
"""In a run folder: what a driver needs that others may have written."""
POINTS_OF_TRIALS = f"{TRIALS}/*/{OUTBOX}/*"
"""In the run folder of a search: what its trials have left for MLflow."""
_BUCKET = "bucket.json"
"""In a run folder: where in a bucket it is shared, and which life of the run it is of."""
_OF_A_SEARCH = (
    *(RUNGS, RESULT, f"{TRIALS}/*/{ENDING}", f"{TRIALS}/*/{REPORTS}", f"{TRIALS}/*/{OUTCOME}"),
    *(ATTEMPTS, f"{TRIALS}/*/{ATTEMPTS}/*", f"{OUTBOX}/*", POINTS_OF_TRIALS),
)
"""What a driver of a search needs, beside the trials' models. Its ledger has no copies."""


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


def take_up(spec: RunSpec, folder: Path) -> None:
    """Brings what earlier drivers and workers of a run have left on other machines. Raises StorageError."""
    uri = bucket_of(spec, folder)
    exchange = exchange_at(folder, uri)
    if spec.search is None:
        exchange.fetch(_BUCKET, *SHARED)
    else:
        exchange.fetch(_BUCKET, *_OF_A_SEARCH)
        fetch_models(exchange, folder)
    if uri is not None and folder.is_dir() and not (folder / _BUCKET).is_file():
        write_json(folder / _BUCKET, {"uri": uri})


def fetch_models(exchange: Exchange, search_folder: Path, *, patience_s: float = 0.0) -> None:
    """Brings the models of trials that have come to their end, or their budget's. Raises StorageError."""
    names = [file.parent.name for file in sorted(search_folder.glob(f"{TRIALS}/*/{ENDING}"))]
    exchange.fetch(*(f"{TRIALS}/{name}/{MODEL}" for name in names), patience_s=patience_s)


def shared(spec: RunSpec, folder: Path) -> Exchange:
    """The exchange of a run that begins or goes on; where it is, is kept for `fetch_points` and `model_for_all`.

    Raises StorageError when the bucket cannot be opened or written.
    """
    uri = bucket_of(spec, folder)
    exchange = exchange_at(folder, uri)
    if uri is not None:
        life = life_of(folder) or uuid.uuid4().hex
        write_json(folder / _BUCKET, {"uri": uri, "life": life})
        begin_life(folder, life)
        exchange.send(_BUCKET, patience_s=PATIENCE_S)
    return exchange


def life_of(folder: Path) -> str:
    """Which life the run of a folder is in; nothing where it has none, as one whose machines see a common folder."""
    return str((read_json(folder / _BUCKET) or {}).get("life", ""))


def model_for_all(model: str, folder: Path) -> str:
    """Where every machine finds the model of a run, or of a trial: in the bucket that its machines met in, else at its
    path."""
    is_trial = folder.parent.name == TRIALS
    bucket = read_json((folder.parent.parent if is_trial else folder) / _BUCKET)
    inside = f"{TRIALS}/{folder.name}/{MODEL}" if is_trial else MODEL
    return model if bucket is None else f"{bucket['uri']}/{inside}"


def fetch_points(folder: Path) -> None:
    """Brings the metrics that workers of a run, or the trials of a search, have left in its bucket, if it has one.

    Raises StorageError.
    """
    bucket = read_json(folder / _BUCKET)
    if bucket is not None:
        exchange_at(folder, bucket["uri"]).fetch(OUTBOX, POINTS_OF_TRIALS)


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
