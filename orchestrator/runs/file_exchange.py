"""The small files of a run whose machines see no common folder: they exchange them through the run's bucket.

Each machine has a copy of the run's folder, and code that reads and writes there need not know of others:

    by the driver   attempts/NNNN.json, attempts/kept.json      who may write, and what attempts have in common
                    outbox/handle.json, ledger/, result.json    for a driver on another machine that takes the run up
    by rank 0       attempts/NNNN.resumed.json, outbox/a*.jsonl, ledger/, rewinds.json, best/, outcome.json, model/

One process at a time writes each of them, so the newer copy is the right one; of points files, which only grow, the
longer one. Checkpoints lie in the same bucket, but are `storage`'s.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator.atomic_file import draft_of
from orchestrator.errors import StorageError, one_line
from orchestrator.object_store import download, open_bucket, patiently, upload

PERIOD_S = 5.0
"""Pause between looks at the bucket while a run lasts: 720 an hour and machine, where a thousand cost half a cent
(S3's price of listing, 2026), and no longer than a curve may be old for someone who watches it (a guess)."""
_SETTLED_S = 1.0
"""Longest from a look at what there is to the end of a small write that follows from it (a guess: 0.1 s is usual)."""
_GROWING = ".jsonl"


class Exchange(Protocol):
    """What a machine does to see what others wrote of a run, and to show them what it wrote."""

    def fetch(self, *parts: str, patience_s: float = 0.0) -> None:
        """Brings files, or all files of folders, given by their names in the run's folder.

        Raises StorageError, where the bucket is away only after so many seconds.
        """

    def send(self, *parts: str, patience_s: float = 0.0) -> None:
        """Shows them, or those that a pattern fits, to the others; what has not changed since is not sent again.

        Raises StorageError, where the bucket is away only after so many seconds.
        """

    def remove(self, part: str) -> None:
        """Removes a file, or a folder with all files in it, for this machine and the others. Raises StorageError."""

    def stands(self, name: str) -> bool:
        """Whether others see a file as this machine has sent it: two may have sent one at the same moment."""

    def forget(self) -> None:
        """Removes all that others see of the run, checkpoints too. Raises StorageError."""


class CommonFolder:
    """Every machine sees the run's folder: there is nothing to exchange."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, *parts: str, patience_s: float = 0.0) -> None:
        """See `Exchange`."""

    def send(self, *parts: str, patience_s: float = 0.0) -> None:
        """See `Exchange`."""

    def remove(self, part: str) -> None:
        """See `Exchange`."""
        _remove(self._folder / part)

    def stands(self, name: str) -> bool:
        """See `Exchange`."""
        return True

    def forget(self) -> None:
        """See `Exchange`."""


class BucketExchange:
    """Copies between a folder on this machine and a prefix in a bucket. Threads may share it."""

    def __init__(self, folder: Path, uri: str) -> None:
        """Raises StorageError when the URI names nothing that can be opened."""
        self._folder, self._uri = folder, uri
        self._files, self._prefix = open_bucket(uri)
        self._fetched: dict[str, tuple[int, datetime]] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def fetch(self, *parts: str, patience_s: float = 0.0) -> None:
        """See `Exchange`: in the order of their names, so that a later points file is not there before an earlier."""
        with self._lock, self._errors("read"):
            for part in parts:
                patiently(partial(self._fetch, part), patience_s=patience_s)

    def send(self, *parts: str, patience_s: float = 0.0) -> None:
        """See `Exchange`."""
        with self._lock, self._errors("written"):
            for part in parts:
                patiently(partial(self._send, part), patience_s=patience_s)

    def remove(self, part: str) -> None:
        """See `Exchange`."""
        _remove(self._folder / part)
        with self._lock, self._errors("removed"):
            for info in self._objects(part):
                self._files.delete_file(info.path)
                self._sent.pop(info.path.removeprefix(f"{self._prefix}/"), None)

    def stands(self, name: str) -> bool:
        """See `Exchange`: looks only after what another has begun to write is there. The last one stands."""
        time.sleep(_SETTLED_S)
        with self._lock, self._errors("read"), self._files.open_input_stream(f"{self._prefix}/{name}") as stream:
            return bytes(stream.read()) == (self._folder / name).read_bytes()

    def forget(self) -> None:
        """See `Exchange`."""
        with self._lock, self._errors("removed"):
            self._files.delete_dir_contents(self._prefix, missing_dir_ok=True)
            with suppress(FileNotFoundError):
                self._files.delete_dir(self._prefix)

    def _fetch(self, part: str) -> None:
        for info in self._objects(part):
            name = info.path.removeprefix(f"{self._prefix}/")
            state = (info.size, info.mtime)
            if self._fetched.get(name) != state:
                self._bring(name, info)
                self._fetched[name] = state

    def _send(self, part: str) -> None:
        for file in _visible_files(self._folder, part):
            name = str(file.relative_to(self._folder))
            state = _state(file)
            if self._sent.get(name) != state:
                key = f"{self._prefix}/{name}"
                upload(self._files, file, key)
                if _state(file) == state and not name.endswith(_GROWING):  # as old as its copy, by one clock
                    _set_time(file, self._files.get_file_info(key).mtime)
                    state = _state(file)
                self._sent[name] = state

    def _objects(self, part: str) -> list[Any]:
        from pyarrow.fs import FileSelector, FileType

        key = f"{self._prefix}/{part}"
        info = self._files.get_file_info(key)
        if info.type == FileType.File:
            return [info]
        found = self._files.get_file_info(FileSelector(key, recursive=True, allow_not_found=True))
        return sorted((each for each in found if each.type == FileType.File), key=lambda each: each.path)

    def _bring(self, name: str, info: Any) -> None:
        target = self._folder / name
        with suppress(FileNotFoundError):
            here = target.stat()
            if here.st_size >= info.size if name.endswith(_GROWING) else here.st_mtime >= info.mtime.timestamp():
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(target) as draft:
            download(self._files, info.path, draft)
            _set_time(draft, info.mtime)
            draft.replace(target)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"what machines of this run tell each other cannot be {doing}",
                got=f"{self._uri} ({one_line(error, most=200)})",
                do="check checkpoint.storage and the credentials of every node; the same command then goes on",
            ) from error


def exchange_at(folder: Path, uri: str | None) -> Exchange:
    """How a machine shares a run's folder with others: through a prefix in a bucket, or, without one, it need not.

    Raises StorageError when the URI names nothing that can be opened.
    """
    return CommonFolder(folder) if uri is None else BucketExchange(folder, uri)


@contextmanager
def following(
    exchange: Exchange,
    *,
    fetch: tuple[str, ...] = (),
    send: tuple[str, ...] = (),
    may_send: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Meanwhile a thread fetches, then sends where it may; what the bucket does not take or give is tried again."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(PERIOD_S):
            with suppress(StorageError):
                exchange.fetch(*fetch)
                if may_send():
                    exchange.send(*send)

    if isinstance(exchange, CommonFolder):
        yield
        return
    thread = threading.Thread(target=follow, name="exchange", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _state(file: Path) -> tuple[int, int]:
    """Another one after every change."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _set_time(file: Path, moment: datetime) -> None:
    os.utime(file, (moment.timestamp(), moment.timestamp()))


def _visible_files(folder: Path, part: str) -> list[Path]:
    """The files of a part in the order of their names; none of those being written."""
    found = folder.glob(f"{part}/**/*" if (folder / part).is_dir() else part)
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
