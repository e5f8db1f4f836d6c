"""Reaching an object store: opened by its URI, and patience with one that is away."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import SpecError, StorageError, one_line

CHUNK_BYTES = 4 << 20
"""Of a file, read at a time."""
PATIENCE_S = 300.0
"""How long a training bears a bucket that is away, mostly behind its steps (a guess: outages of minutes happen)."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_LASTING = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
"""In the messages of pyarrow's S3 errors: the names of those that waiting does not mend."""

T = TypeVar("T")


def open_bucket(uri: str) -> tuple[Any, str]:
    """pyarrow's file system for a URI, and the path in it.

    Raises StorageError when it names nothing that can be opened.
    """
    from pyarrow.fs import FileSystem

    try:
        files, prefix = FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise StorageError(
            "the object store cannot be opened",
            got=f"{uri} ({one_line(error, most=200)})",
            allowed="a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or another URI of pyarrow.fs",
            do="check checkpoint.storage and the credentials of every node",
        ) from error
    return files, prefix


def check_bucket(uri: str) -> None:
    """Refuses a bucket that is not there; one that may not be asked for is found out by whoever writes to it.

    Raises SpecError, and StorageError when the URI names nothing that can be opened.
    """
    from pyarrow.fs import FileType

    files, prefix = open_bucket(uri)
    bucket = prefix.partition("/")[0]
    with suppress(OSError):
        if files.get_file_info(bucket).type == FileType.NotFound:
            raise SpecError(
                "there is no such bucket",
                got=f"{bucket}, in {uri}",
                do="create it, or set checkpoint.storage to one that every node can write",
            )


def upload(files: Any, source: Path, key: str) -> None:
    """Puts a file of this machine into a bucket; raises OSError."""
    with source.open("rb") as stream, files.open_output_stream(key) as target:
        shutil.copyfileobj(stream, target, CHUNK_BYTES)


def download(files: Any, key: str, target: Path) -> None:
    """Puts an object into a file of this machine, in a folder that exists; raises OSError."""
    with files.open_input_stream(key) as source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream, CHUNK_BYTES)


def patiently(action: Callable[[], T], *, patience_s: float) -> T:
    """Does something with a bucket, again and again for some seconds where the bucket is away.

    Raises the OSError that it met last, and at once what waiting does not mend: no access, no such file, a full disk.
    """
    pause_s, deadline = _FIRST_PAUSE_S, time.monotonic() + patience_s
    while True:
        try:
            return action()
        except OSError as error:
            is_local = error.errno is not None  # pyarrow's errors of a bucket have none
            if is_local or any(word in str(error) for word in _LASTING) or time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
