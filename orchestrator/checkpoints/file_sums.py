"""What a file of a checkpoint must be, and whether it is. No torch."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from orchestrator.object_store import CHUNK_BYTES


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """What a file must be."""

    bytes: int
    crc32: int
    rank: int = 0
    """Who wrote it."""


def file_problem(file: Path, name: str, expected: FileSum) -> str | None:
    """What is wrong with a file here, read as a whole; None when it is what it must be."""
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            return f"{name} has {size} bytes instead of {expected.bytes}"
        return None if file_crc32(file) == expected.crc32 else f"{name} has another checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def file_crc32(file: Path) -> int:
    """Checksum of a file, in chunks; zlib lets other threads run meanwhile."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
