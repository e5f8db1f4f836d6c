"""Checkpoints on a folder that every rank sees: complete or not there at all, verified before they are used.

    checkpoints/step-00000100/           appears by one atomic rename, when every rank has written
        state/...                        what DeepSpeed writes, one file set per rank
        manifest.json                    sizes and checksums of all files, the loop's state, world size and ZeRO stage
    checkpoints/step-00000200.writing/   in progress or torn: never read, replaced by the next attempt

No torch: the engine writes the files, this module decides which of them count.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError, StorageError
from orchestrator.training.job import LoopState

_MANIFEST = "manifest.json"
_WRITING = ".writing"
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    state: LoopState
    world_size: int
    zero_stage: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest good checkpoint, if any, and what was wrong with newer ones."""

    checkpoint: Checkpoint | None
    rejected: tuple[str, ...]
    """One sentence for each checkpoint that was passed over."""


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step into; call on one rank, then barrier."""
    writing = folder / f"step-{step:08d}{_WRITING}"
    with storage_errors(folder):
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    return writing


def commit(writing: Path, *, state: LoopState, world_size: int, zero_stage: int) -> Path:
    """Makes a written folder a checkpoint: manifest last, then one rename. Call on one rank, after a barrier."""
    final = writing.with_name(writing.name.removesuffix(_WRITING))
    with storage_errors(writing.parent):
        files = {
            str(file.relative_to(writing)): {"bytes": file.stat().st_size, "crc32": _crc32(file)}
            for file in sorted(writing.rglob("*"))
            if file.is_file()
        }
        manifest = {"state": asdict(state), "world_size": world_size, "zero_stage": zero_stage, "files": files}
        _write_synced(writing / _MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        writing.rename(final)
    return final


def newest_good(folder: Path) -> Found:
    """The newest checkpoint whose files are all there with the right sizes and checksums."""
    rejected: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if path.name.endswith(_WRITING):
            continue
        problem, manifest = _verify(path)
        if problem is None:
            checkpoint = Checkpoint(
                path=path,
                state=LoopState(**manifest["state"]),
                world_size=manifest["world_size"],
                zero_stage=manifest["zero_stage"],
            )
            return Found(checkpoint=checkpoint, rejected=tuple(rejected))
        rejected.append(f"checkpoint {path.name} is damaged and was passed over: {problem}")
    return Found(checkpoint=None, rejected=tuple(rejected))


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what torn writes left behind."""
    complete = sorted(p for p in folder.glob("step-*") if not p.name.endswith(_WRITING))
    for old in complete[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for torn in folder.glob(f"step-*{_WRITING}"):
        shutil.rmtree(torn, ignore_errors=True)


def discard_newer(checkpoint: Checkpoint) -> None:
    """Removes those that were passed over for this one: kept, they would push good ones out of the newest `keep`."""
    for path in checkpoint.path.parent.glob("step-*"):
        if path.name > checkpoint.path.name:
            shutil.rmtree(path, ignore_errors=True)


def check_compatible(checkpoint: Checkpoint, *, world_size: int, zero_stage: int) -> None:
    """Refuses to resume sharded states under another shape.

    Raises SpecError when the checkpoint was written by another number of workers or under another ZeRO stage.
    """
    saved, now = (checkpoint.world_size, checkpoint.zero_stage), (world_size, zero_stage)
    if saved != now:
        raise SpecError(
            "the newest checkpoint of this run was written with another shape",
            got=f"{now[0]} workers, ZeRO stage {now[1]}",
            allowed=f"{saved[0]} workers, ZeRO stage {saved[1]}",
            do=f"set resources.workers={saved[0]} deepspeed.zero_stage={saved[1]}, or start over with --fresh",
        )


def _verify(path: Path) -> tuple[str | None, dict[str, Any]]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its manifest cannot be read ({error})", {}
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        try:
            size, checksum = file.stat().st_size, _crc32(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})", {}
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}", {}
        if checksum != expected["crc32"]:
            return f"{name} has another checksum", {}
    return None, manifest


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _write_synced(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns a full or unwritable disk into a StorageError that names the folder and the way out.

    torch reports a failed write as a RuntimeError, so the free space is looked at too.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _is_full(folder)
        if not full and not isinstance(error, OSError):
            raise
        raise StorageError(
            "no space is left for the checkpoint" if full else "the checkpoint cannot be written",
            got=f"{folder} ({' '.join(str(error).split())[:200]})",
            do="free space, lower checkpoint.keep, or set checkpoint.storage to a larger disk; "
            "the same command then goes on from the newest complete checkpoint",
        ) from error


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < 1 << 20
    except OSError:
        return False
