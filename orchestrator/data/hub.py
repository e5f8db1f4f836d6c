"""A source -> a `datasets.Dataset`. The only module that imports `datasets`, and only when a table is opened."""

from __future__ import annotations

import errno
import hashlib
import logging
from pathlib import Path
from typing import Any

from orchestrator import locations
from orchestrator.data.contents import digests
from orchestrator.data.sources import HUB_NAME, Source
from orchestrator.errors import DataError, StorageError

_HUB_TIMEOUT_S = 10.0  # A guess: long for a metadata request, short for a person who waits.


def load_table(source: Source) -> Any:
    """A `datasets.Dataset` of a hub dataset, or of all files of a source."""
    if source.reader == "hub":
        match = HUB_NAME.match(source.location)
        if match is None:
            raise DataError("this names no hub dataset", got=source.location, allowed="owner/name:config@split")
        return _load(match["name"], name=match["config"], split=match["split"] or source.split)
    if empty := [file for file in source.files if not file.stat().st_size]:
        raise DataError(f"{empty[0]} is empty", got="0 bytes", do="remove it, or leave it out with data.exclude")
    # Only an empty cell is missing: pandas would also take the words "None", "NA" and "null" for that.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if source.reader in ("csv", "tsv") else {}
    if source.reader == "tsv":
        options["sep"] = "\t"
    builder = "csv" if source.reader == "tsv" else source.reader
    try:
        return _load(builder, data_files=[str(file) for file in source.files], split="train", **options)
    except DataError:
        for file in source.files if len(source.files) > 1 else ():  # The reader does not say which one it was.
            try:
                _load(builder, data_files=[str(file)], split="train", **options)
            except DataError as error:
                raise DataError(f"{file} cannot be read", got=error.got) from error.__cause__
        raise


def _load(path: str, **options: Any) -> Any:
    """`datasets.load_dataset`, silent, with its failures as DataError or StorageError."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # The reason is in the error raised below.
    cache = locations.home() / "cache" / "datasets"
    files: list[str] = options.get("data_files", [])
    if files:  # It knows a file by path and time, and would give the rows of one that was replaced.
        cache /= hashlib.sha256("".join(digests([Path(file) for file in files])).encode()).hexdigest()[:16]
    try:
        if not files:
            _ask_hub(path)
        return datasets.load_dataset(path, cache_dir=str(cache), **options)
    except Exception as error:  # Its readers raise ValueError, OSError, and pyarrow's, pandas' and their own kinds.
        reason = error.__cause__ or error
        if getattr(reason, "errno", None) == errno.ENOSPC:
            raise StorageError(f"no space left in {cache}", do="free some, or set ORCHESTRATOR_HOME") from error
        got = f"{type(reason).__name__}: {' '.join(str(reason).split())}"
        if files:
            raise DataError(f"{', '.join(files[:3])} cannot be read", got=got) from error
        raise DataError(
            f"{path} is neither a local path nor a dataset that can be reached and read on the hub",
            got=got,
            do="check path, name and connection; HF_HUB_OFFLINE=1 uses what was downloaded before",
        ) from error


def _ask_hub(name: str) -> None:
    """Fails in seconds without a connection, where `datasets` tries for half a minute."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
