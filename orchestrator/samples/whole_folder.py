"""A folder of the cache that is there whole or not at all: written beside its place, then renamed.

A list of its files with their sizes is written last, so that one which has lost a part since does not count.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.atomic_file import is_full, read_json, write_json
from orchestrator.errors import StorageError

_SIZES = "sizes.json"
"""In such a folder: bytes of each file, by its path below the folder."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end; gone where that failed.

    Raises StorageError when the disk is full or cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    with _storage_errors(folder.parent):
        try:
            partial.mkdir(parents=True)
            yield partial
            write_json(partial / _SIZES, _sizes(partial))
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder that `whole_folder` has written is there with all its files, each of its size."""
    wanted = read_json(folder / _SIZES)
    return wanted is not None and wanted == {name: _size(folder / name) for name in wanted}


def _sizes(folder: Path) -> dict[str, int | None]:
    return {str(path.relative_to(folder)): _size(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _publish(partial: Path, folder: Path) -> None:
    """Gives a finished folder its name; another process may have been faster with the same content."""
    try:
        os.rename(partial, folder)
    except OSError:
        if is_whole(folder):
            return
        shutil.rmtree(folder)  # It has lost a part: it counts as absent.
        os.rename(partial, folder)


@contextmanager
def _storage_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = is_full(error)
        place = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
        raise StorageError(
            f"the disk of {cache} is full" if full else f"{cache} cannot be written",
            got=f"{shutil.disk_usage(place).free / 1e9:.1f} GB free" if full else error.strerror or str(error),
            do="free space, or set ORCHESTRATOR_HOME to a folder on another disk" if full else "check its permissions",
        ) from error
