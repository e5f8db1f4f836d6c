"""A folder of the cache that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import StorageError


@contextmanager
def whole_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end; gone where that failed.

    `last` names the file that is written last, so one that has it is whole.
    Raises StorageError when the disk is full or cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    with _storage_errors(folder.parent):
        try:
            partial.mkdir(parents=True)
            yield partial
            _publish(partial, folder, last)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path, last: str) -> None:
    """Gives a finished folder its name; another process may have been faster with the same content."""
    try:
        os.rename(partial, folder)
    except OSError:
        if (folder / last).is_file():
            return
        shutil.rmtree(folder)  # Someone deleted a part of it: it counts as absent.
        os.rename(partial, folder)


@contextmanager
def _storage_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        place = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
        raise StorageError(
            f"the disk of {cache} is full" if full else f"{cache} cannot be written",
            got=f"{shutil.disk_usage(place).free / 1e9:.1f} GB free" if full else error.strerror or str(error),
            do="free space, or set ORCHESTRATOR_HOME to a folder on another disk" if full else "check its permissions",
        ) from error
