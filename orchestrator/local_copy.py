"""Data and models that lie in a store are copied to this machine once, and again where they have changed.

    CACHE/<hash of the URI>/NAME or NAME/...   what lies there, under the names it has there
    CACHE/<hash of the URI>.json               size and time of change of each, as copied

Processes of one machine take turns, so that the ranks of a training copy a model once.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.atomic_file import draft_of, locked, read_json, write_json
from orchestrator.errors import DataError, SpecError, StorageError, one_line
from orchestrator.object_store import check_readable_uri, download, is_lasting, open_bucket, patiently

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0
"""For a store that is away before anything has begun (a guess)."""
_WORTH_SAYING = 100e6
"""Bytes; a copy above this is told of, as it takes seconds (a guess)."""


@functools.cache
def local_copy(uri: str, cache: Path) -> str:
    """Path on this machine with what a URI names: a file, a folder, or a pattern of which all matches are copied.

    One process looks once. Raises SpecError for a URI with credentials or of no known scheme, DataError where it cannot
    be opened or nothing lies there, and StorageError where it cannot be read or this disk has no room for it.
    """
    try:
        check_readable_uri(uri, what="a location")
    except ValueError as error:
        raise SpecError(str(error)) from error
    fixed, pattern = _split(uri)
    try:
        files, prefix = open_bucket(fixed)
    except StorageError as error:  # nothing has answered at such an address: it is taken for a mistake in it
        raise DataError(error.what, got=error.got, allowed=error.allowed, do=error.do) from error
    place = cache / hashlib.sha256(fixed.encode()).hexdigest()[:16]
    target = place / (PurePosixPath(prefix).name or "all")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place.with_suffix(".lock")):
            found = patiently(functools.partial(_list, files, prefix, pattern), patience_s=_PATIENCE_S)
            if not found:
                raise _nothing(uri, files, prefix)
            _update(files, target, found, place.with_suffix(".json"), uri, keep_others=bool(pattern))
    except OSError as error:
        raise _unreadable(uri, error) from error
    return str(target / pattern) if pattern else str(target)


def _split(uri: str) -> tuple[str, str]:
    """(the URI of what is certain, the pattern below it or nothing)."""
    scheme, _, rest = uri.rstrip("/").partition("://")
    parts = rest.split("/")
    first = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return f"{scheme}://{'/'.join(parts[:first])}", "/".join(parts[first:])


def _list(files: Any, prefix: str, pattern: str) -> dict[str, Any]:
    """pyarrow's FileInfo of each file by its path below the prefix, which is empty for the prefix itself."""
    from pyarrow.fs import FileSelector, FileType

    info = files.get_file_info(prefix)
    if info.type == FileType.File:
        return {"": info}
    every = files.get_file_info(FileSelector(prefix, recursive=True, allow_not_found=True))
    found = {one.path[len(prefix) :].lstrip("/"): one for one in every if one.type == FileType.File}
    if pattern:
        from fsspec.utils import glob_translate

        wanted = re.compile(glob_translate(pattern))
        found = {name: one for name, one in found.items() if wanted.match(name)}
    for name in found:
        if {".", ".."} & set(name.split("/")):
            raise DataError("a name in the store leads out of its folder", got=f"{prefix}/{name}", do="rename it there")
    return found


def _update(files: Any, target: Path, found: dict[str, Any], record: Path, uri: str, *, keep_others: bool) -> None:
    """Makes the copies here those of what was found. Raises OSError."""
    known = read_json(record) or {}
    stale = {
        name: info
        for name, info in found.items()
        if known.get(name) != _state(info) or info.mtime is None or not (target / name).is_file()
    }
    size = sum(info.size or 0 for info in stale.values())
    free = shutil.disk_usage(record.parent).free
    if size > free:
        raise StorageError(
            "the disk has no room for a copy of what lies in the store",
            got=f"{uri} ({size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free in {record.parent})",
            do="free some, or set ORCHESTRATOR_HOME to a larger disk",
        )
    if size > _WORTH_SAYING:
        logger.warning("copying %s to this machine: %.1f GB", uri, size / 1e9)
    if not keep_others:
        for gone in known.keys() - found.keys():
            (target / gone).unlink(missing_ok=True)
        known = {name: state for name, state in known.items() if name in found}
    for name, info in sorted(stale.items()):
        file = target / name if name else target
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(file) as draft:
            patiently(functools.partial(download, files, info.path, draft), patience_s=_PATIENCE_S)
            if info.size is not None and draft.stat().st_size != info.size:
                raise OSError(f"{info.path} arrived with {draft.stat().st_size} bytes instead of {info.size}")
            draft.replace(file)
        known[name] = _state(info)
        write_json(record, known)


def _state(info: Any) -> list[Any]:
    """Another one after every change, as far as the store tells."""
    return [info.size, None if info.mtime is None else info.mtime.timestamp()]


def _nothing(uri: str, files: Any, prefix: str) -> DataError:
    """Names the nearest folder above that has something, and what is there."""
    from pyarrow.fs import FileSelector

    above, siblings = prefix, list[str]()
    while "/" in above and not siblings:
        above = above.rpartition("/")[0]
        siblings = sorted(one.base_name for one in files.get_file_info(FileSelector(above, allow_not_found=True)))
    shown = ", ".join(siblings[:8]) + (", ..." if len(siblings) > 8 else "")
    return DataError(
        f"nothing lies at {uri}",
        got=f"{above} holds {shown}" if siblings else f"{above} is empty or not there",
        do="check the path; a pattern must match a whole name",
    )


def _unreadable(uri: str, error: OSError) -> StorageError:
    no_access = is_lasting(error) and error.errno is None
    return StorageError(
        "what lies in the store cannot be copied to this machine",
        got=f"{uri} ({one_line(error, most=200)})",
        do="give this machine credentials that may list and read it: the cloud's variables in its environment, a "
        "credentials file, or a role of the instance"
        if no_access
        else "check the connection to it and this disk; the same command then goes on",
    )
