"""Files -> hashes of what is in them, remembered while they are as they were; hub names -> the commit they stand for.

What a run read is known by these, never by a path or a time: copies agree, and what is replaced under its old name and
time does not.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator import locations
from orchestrator.atomic_file import read_json, write_json
from orchestrator.data.sources import HUB_NAME, Source
from orchestrator.errors import DataError

PIECE_BYTES = 64 << 20
"""A file's hash is that of the hashes of pieces of this size, so that threads share a large one. SHA-256 takes 0.06 s
for 100 MB on one core with its instructions (measured); blake2b takes 0.11."""
_BATCH_BYTES = 16 << 20
"""Small files are given to a thread together: 100,000 of them would else cost seconds of handing over."""
_REMEMBERED_BYTES = 1 << 20
"""Hashing less takes a millisecond."""
_SETTLED_NS = 2_000_000_000
"""A file that changed so lately may change again within one tick of the file system's clock (git's "racy" entries, and
FAT's tick), so its hash is not remembered yet."""
_MOST_ENTRIES = 20_000
_HUB_TIMEOUT_S = 10.0  # A guess: long for a metadata request, short for a person who waits.


@dataclass(frozen=True, kw_only=True)
class _Piece:
    file: int
    """Its number."""
    path: Path
    start: int


def digests(files: Sequence[Path]) -> list[str]:
    """A hash of the content of each file, 64 hex digits; equal for equal content.

    Hashes of large files are kept below the home folder under device, inode, size and both times of the file: the time
    of its last change (ctime) is the system's, and `cp -p` or `touch` cannot set it back.
    Raises DataError when a file cannot be read, or changes meanwhile.
    """
    stats = [_stat(file) for file in files]
    memory = locations.home() / "cache" / "digests.json"
    keys = {number: _key(stat) for number, stat in enumerate(stats) if stat.st_size >= _REMEMBERED_BYTES}
    known = _remembered(memory) if keys else {}
    found = {number: known[key] for number, key in keys.items() if key in known}
    missing = [number for number in range(len(files)) if number not in found]
    began = time.time_ns()
    found |= _hashed({number: files[number] for number in missing}, [stat.st_size for stat in stats])
    for number in missing:
        if _key(_stat(files[number])) != _key(stats[number]):
            raise DataError(f"{files[number]} changes while it is read", do="start again when it is complete")
    settled = {n: key for n, key in keys.items() if n in missing and began - stats[n].st_ctime_ns > _SETTLED_NS}
    if settled:
        _remember(memory, {key: found[number] for number, key in settled.items()})
    return [found[number] for number in range(len(files))]


def contents_of(sources: Sequence[Source]) -> list[Any]:
    """What sources hold, as plain JSON values: a hash of each file; of a hub dataset the name, and the commit where
    known. Raises what `digests` raises."""
    found = [[s.reader, s.split, len(s.files), _on_the_hub(s) if s.reader == "hub" else []] for s in sources]
    return [*found, *digests([file for source in sources for file in source.files])]


def _on_the_hub(source: Source) -> list[str | None]:
    match = HUB_NAME.match(source.location)
    return [source.location, None if match is None else hub_commit(match["name"], "dataset")]


@functools.lru_cache(maxsize=64)
def hub_commit(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """The commit that a hub name stands for: as the hub says, else as it was downloaded; None if neither knows."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not constants.HF_HUB_OFFLINE:
        try:
            info = huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=_HUB_TIMEOUT_S)
            return str(info.sha)
        except Exception:  # The hub's HTTP client, and so the kind of a lost connection, differs by version.
            pass
    reference = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / "main"
    try:
        return reference.read_text().strip() or None
    except OSError:
        return None


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read", got=error.strerror) from error


def _key(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _hashed(files: dict[int, Path], sizes: Sequence[int]) -> dict[int, str]:
    pieces: dict[int, list[bytes]] = {number: [] for number in files}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch, hashes in pool.map(lambda batch: (batch, [_piece_hash(p) for p in batch]), _batches(files, sizes)):
            for piece, each in zip(batch, hashes, strict=True):
                pieces[piece.file].append(each)
    return {number: hashlib.sha256(b"".join(hashes)).hexdigest() for number, hashes in pieces.items()}


def _batches(files: dict[int, Path], sizes: Sequence[int]) -> Iterator[list[_Piece]]:
    """Every piece of every file in order, in batches of about equal work."""
    batch: list[_Piece] = []
    held = 0
    for number, path in files.items():
        for start in range(0, max(1, sizes[number]), PIECE_BYTES):
            batch.append(_Piece(file=number, path=path, start=start))
            held += min(PIECE_BYTES, sizes[number] - start)
            if held >= _BATCH_BYTES:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _piece_hash(piece: _Piece) -> bytes:
    hashed, left = hashlib.sha256(), PIECE_BYTES
    try:
        with piece.path.open("rb", buffering=0) as stream:
            stream.seek(piece.start)
            while left and (chunk := stream.read(min(left, 1 << 20))):
                hashed.update(chunk)
                left -= len(chunk)
    except OSError as error:
        raise DataError(f"{piece.path} cannot be read", got=error.strerror) from error
    return hashed.digest()


def _remembered(memory: Path) -> dict[str, str]:
    try:
        known = read_json(memory)
    except OSError:
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, new: dict[str, str]) -> None:
    """Adds hashes. Of two commands at once one may be forgotten; a home that cannot be written remembers nothing."""
    known = {**_remembered(memory), **new}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, dict(list(known.items())[-_MOST_ENTRIES:]))
    except OSError:
        return
