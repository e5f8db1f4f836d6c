"""Hub names -> the rows of a dataset. The only module that imports `datasets`, and only when such a name is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator import locations
from orchestrator.atomic_file import is_full
from orchestrator.data.formats.parquet import ROWS_AT_A_TIME, class_name
from orchestrator.data.formats.typed import as_text
from orchestrator.data.sources import HUB_NAME
from orchestrator.errors import DataError, StorageError, one_line

_HUB_TIMEOUT_S = 10.0  # A guess: long for a metadata request, short for a person who waits.


def load(location: str, *, split: str) -> Any:
    """The `datasets.Dataset` that `owner/name:config@split` names; `split` where it names none.

    Raises DataError when it cannot be reached or read, StorageError when the disk of its cache is full.
    """
    match = HUB_NAME.match(location)
    if match is None:
        raise DataError("this names no hub dataset", got=location, allowed="owner/name:config@split")
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # The reason is in the error raised below.
    cache, name = locations.home() / "cache" / "datasets", match["name"]
    try:
        _ask_hub(name)
        return datasets.load_dataset(name, name=match["config"], split=match["split"] or split, cache_dir=str(cache))
    except Exception as error:  # It raises ValueError, OSError, and pyarrow's, pandas' and its own kinds.
        reason = error.__cause__ or error
        if is_full(reason):
            raise StorageError(f"no space left in {cache}", do="free some, or set ORCHESTRATOR_HOME") from error
        raise DataError(
            f"{name} is neither a local path nor a dataset that can be reached and read on the hub",
            got=f"{type(reason).__name__}: {one_line(reason, most=None)}",
            do="check path, name and connection; HF_HUB_OFFLINE=1 uses what was downloaded before",
        ) from error


def read(table: Any, columns: Sequence[str], *, location: str, rows: range | None = None) -> Iterator[tuple[Any, ...]]:
    """For some rows at a time, an array of strings without nulls for each column; of all rows or of a range."""
    named = class_names(table)
    chosen = table if rows is None else table.select(rows)
    done = 0 if rows is None else rows.start
    wanted = chosen.select_columns(list(dict.fromkeys(columns))).with_format("arrow")
    for batch in wanted.iter(batch_size=ROWS_AT_A_TIME):
        yield tuple(
            as_text(batch.column(name), name=name, location=location, first_row=done, class_names=named.get(name))
            for name in columns
        )
        done += len(batch)


def first_rows(table: Any, count: int) -> tuple[dict[str, Any], ...]:
    """The first rows with all columns, as Python values; class numbers as their names."""
    return tuple(values(table, range(min(count, len(table)))))


def values(table: Any, rows: range) -> Iterator[dict[str, Any]]:
    """A range of rows with all columns, as Python values; class numbers as their names."""
    named = class_names(table)
    for row in table.select(rows):
        yield {name: class_name(value, named.get(name)) for name, value in row.items()}


def class_names(table: Any) -> dict[str, list[str]]:
    """The names of classes by column: `datasets` stores their numbers."""
    return {name: feature.names for name, feature in table.features.items() if hasattr(feature, "int2str")}


def _ask_hub(name: str) -> None:
    """Fails in seconds without a connection, where `datasets` tries for half a minute."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
