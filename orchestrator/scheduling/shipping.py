"""Brings prepared data to nodes that do not see the driver's cache, through Ray's object store."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A folder as references into the object store."""

    folder: Path
    files: tuple[tuple[str, tuple[Any, ...]], ...]
    """(name below the folder, references to its pieces in order)."""


def pack(folder: Path) -> Parcel | None:
    """The folder's files in the object store, or None on a single node, which sees the folder itself."""
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return None
    return Parcel(folder=folder, files=tuple((name, _pieces(folder / name)) for name in _names(folder)))


def unpack(parcel: Parcel) -> None:
    """Writes the folder where it is not there yet; several workers of a node may race, and one of them wins."""
    if parcel.folder.is_dir():
        return
    temporary = parcel.folder.with_name(f"{parcel.folder.name}.{os.getpid()}.arriving")
    for name, pieces in parcel.files:
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:
            for piece in pieces:
                stream.write(ray.get(piece))
    try:
        temporary.rename(parcel.folder)
    except OSError:  # another worker of this node was first
        if not parcel.folder.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def _pieces(file: Path) -> tuple[Any, ...]:
    references = []
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            references.append(ray.put(piece))
    return tuple(references)
