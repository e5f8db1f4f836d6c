"""Files that are there whole or not at all, whatever ends the writer: written beside their place, then renamed.

A disk that fails or was full may still leave one torn: `read_json` takes that for absent, for what can be made anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError

logger = logging.getLogger(__name__)


def write_json(path: Path, value: Any, *, new: bool = False, durable: bool = False, private: bool = False) -> None:
    """Puts JSON into a file, in place of what is there.

    `new` refuses to replace a file, `durable` also outlasts a crash of the machine, `private` lets only the owner read
    it. Raises FileExistsError when `new` finds the name taken, OSError when it cannot be written.
    """
    with draft_of(path) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(json.dumps(value, indent=1))
            if durable:
                stream.flush()
                os.fsync(descriptor)
        if new:
            os.link(draft, path)  # unlike a rename it fails when the name is taken
        else:
            draft.replace(path)


def read_json(path: Path) -> Any:
    """The JSON of a file; None when there is no file or it is torn, which the log says.

    Raises OSError when it is there and cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:  # no JSON, or not UTF-8
        logger.warning("%s is damaged and passed over (%s)", path, error)
        return None


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the share of it that a user may take, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def damaged(what: str, file: Path, error: Exception) -> StorageError:
    """The error for a torn file of a run that nothing can make anew."""
    return StorageError(
        f"{what} is damaged", got=f"{file} ({error})", do="bring it back from a backup, or start over with --fresh"
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for its turn at a file that is there for this alone; raises OSError when it cannot be made."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file closes, also when the process dies
        yield


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A new hidden name beside a file, for what is to replace it; gone afterwards, also where that failed."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)
