"""Brings prepared data to nodes that do not see the driver's cache, through Ray's object store."""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.errors import StorageError

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A folder as references into the object store."""

    folder: Path
    files: tuple[tuple[str, tuple[Any, ...]], ...]
    """(name below the folder, references to its pieces in order)."""


def pack(folders: Sequence[Path]) -> tuple[Parcel, ...]:
    """Each folder's files in the object store, or nothing on a single node, which sees the folders itself."""
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return ()
    return tuple(
        Parcel(folder=folder, files=tuple((name, _pieces(folder / name)) for name in _names(folder)))
        for folder in folders
    )


def unpack(parcel: Parcel) -> None:
    """Writes the folder where it is not there yet; several workers of a node may race, and one of them wins."""
    if parcel.folder.is_dir():
        return
    temporary = parcel.folder.with_name(f".{parcel.folder.name}.{uuid.uuid4().hex[:8]}.arriving")
    try:
        for name, pieces in parcel.files:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as stream:
                for piece in pieces:
                    stream.write(ray.get(piece))
        temporary.rename(parcel.folder)
    except OSError as error:
        if not parcel.folder.is_dir():  # else another worker of this node was first
            raise StorageError(
                "the prepared data cannot be written on a worker's node",
                got=f"{socket.gethostname()}:{parcel.folder} ({error.strerror})",
                do="free space there, or set ORCHESTRATOR_HOME to a folder on another disk",
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _pieces(file: Path) -> tuple[Any, ...]:
    references = []
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            references.append(ray.put(piece))
    return tuple(references)
