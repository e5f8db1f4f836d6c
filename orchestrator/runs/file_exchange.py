"""The small files of a run whose machines see no common folder: they exchange them through the run's bucket.

Each machine has a copy of the run's folder, and code that reads and writes there need not know of others:

    by the driver   attempts/NNNN.json, attempts/kept.json      who may write, and what attempts have in common
                    outbox/handle.json, ledger/, result.json    for a driver on another machine that takes the run up
                    rungs.json                                  of a search: what its trials were compared by
    by rank 0       attempts/NNNN.resumed.json, outbox/a*.jsonl, ledger/, rewinds.json, best/, outcome.json, model/
    by a trial      reports.jsonl, ending.json, and what a training's driver writes of attempts

One process at a time writes each of them, so the newer copy is the right one; of points and reports, which only grow,
the longer one. What several machines write at the same time, the ledger of a search, has no copies: it is written to
the bucket and read from there (`put`, `texts`). Checkpoints lie in the same bucket, but are `storage`'s.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from orchestrator.atomic_file import draft_of, locked, read_json, write_json
from orchestrator.errors import StorageError, one_line
from orchestrator.object_store import download, open_bucket, patiently, upload

PERIOD_S = 5.0
"""Pause between looks at the bucket while a run lasts: 720 an hour and machine, where a thousand cost half a cent
(S3's price of listing, 2026), and no longer than a curve may be old for someone who watches it (a guess)."""
_SETTLED_S = 1.0
"""Longest from a look at what there is to the end of a small write that follows from it (a guess: 0.1 s is usual)."""
_TORN_READS = 5
"""So often a file is read that is replaced whenever it is (a guess: one that is replaced every second, once). pyarrow
asks for its size first, cuts a longer successor there and fills a shorter one up
(findings/pyarrow-s3-replaced-while-read.sh)."""
_GROWING = ".jsonl"
_LIFE = "life.json"
"""In a copy of a run's folder on a worker's machine: which life of the run it is of (`renew`)."""


def _always() -> bool:
    return True


class Exchange(Protocol):
    """What a machine does to see what others wrote of a run, and to show them what it wrote."""

    period_s: float
    """Pause between what is told to others again and again: 0 where that costs nothing."""

    def fetch(self, *parts: str, patience_s: float = 0.0) -> None:
        """Brings files, all files of folders, or those that a pattern fits, by their names in the run's folder.

        Raises StorageError, where the bucket is away only after so many seconds.
        """

    def send(self, *parts: str, patience_s: float = 0.0, may_send: Callable[[], bool] = _always) -> None:
        """Shows them to the others; what has not changed since is not sent again. `may_send` is asked before each file
        and again after each failure: whoever was fenced out while the bucket was away writes over nothing, but for the
        one file that was on its way when this process was stopped, say, and arrives when it goes on.

        Raises StorageError, where the bucket is away only after so many seconds.
        """

    def put(self, name: str, value: Mapping[str, Any], *, patience_s: float = 0.0) -> None:
        """Writes JSON into a small file; every machine's `texts` has it from here on.

        Raises StorageError, where the bucket is away only after so many seconds, and OSError of this machine's disk.
        """

    def texts(self, part: str, *, without: Collection[str] = (), patience_s: float = 0.0) -> dict[str, str]:
        """What `put` has written into the files of a folder, but for some, by their names there; as it is at this
        moment. Raises as `put` does."""

    def remove(self, part: str) -> None:
        """Removes a file, or a folder with all files in it, for this machine and the others. Raises StorageError."""

    def stands(self, name: str) -> bool:
        """Whether others see a file as this machine has sent it: two may have sent one at the same moment."""

    def forget(self) -> None:
        """Removes all that others see of the run, checkpoints too. Raises StorageError."""


class CommonFolder:
    """Every machine sees the run's folder: there is nothing to exchange."""

    period_s = 0.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, *parts: str, patience_s: float = 0.0) -> None:
        """See `Exchange`."""

    def send(self, *parts: str, patience_s: float = 0.0, may_send: Callable[[], bool] = _always) -> None:
        """See `Exchange`."""

    def put(self, name: str, value: Mapping[str, Any], *, patience_s: float = 0.0) -> None:
        """See `Exchange`."""
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)

    def texts(self, part: str, *, without: Collection[str] = (), patience_s: float = 0.0) -> dict[str, str]:
        """See `Exchange`."""
        folder = self._folder / part
        names = os.listdir(folder) if folder.is_dir() else ()
        return {name: (folder / name).read_text() for name in names if not name.startswith(".") and name not in without}

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

    period_s = PERIOD_S

    def __init__(self, folder: Path, uri: str) -> None:
        """Raises StorageError when the URI names nothing that can be opened."""
        self._folder, self._uri = folder, uri
        self._files, self._prefix = open_bucket(uri)
        self._fetched: dict[str, tuple[int, datetime]] = {}
        self._sent: dict[str, tuple[int, int]] = {}
        self._fetching, self._sending = threading.Lock(), threading.Lock()  # who looks waits for no upload

    def fetch(self, *parts: str, patience_s: float = 0.0) -> None:
        """See `Exchange`: in the order of their names, so that a later points file is not there before an earlier."""
        with self._fetching, self._errors("read"):
            listed: dict[str, list[Any]] = {}
            for part in parts:
                patiently(partial(self._fetch, part, listed), patience_s=patience_s)

    def send(self, *parts: str, patience_s: float = 0.0, may_send: Callable[[], bool] = _always) -> None:
        """See `Exchange`."""
        with self._sending, self._errors("written"):
            for part in parts:
                patiently(partial(self._send, part, may_send), patience_s=patience_s)

    def put(self, name: str, value: Mapping[str, Any], *, patience_s: float = 0.0) -> None:
        """See `Exchange`: an object store that is read after a write has been answered gives what was written."""
        text = json.dumps(value, indent=1)

        def write() -> None:
            with self._files.open_output_stream(f"{self._prefix}/{name}") as stream:
                stream.write(text.encode())

        with self._errors("written"):
            patiently(write, patience_s=patience_s)

    def texts(self, part: str, *, without: Collection[str] = (), patience_s: float = 0.0) -> dict[str, str]:
        """See `Exchange`: what is read is what lies there, whatever its time says, which S3 tells in whole seconds."""

        def read() -> dict[str, str]:
            found = {info.path.removeprefix(f"{self._prefix}/{part}/"): info for info in self._objects(part)}
            return {name: self._whole_text(info.path) for name, info in found.items() if name not in without}

        with self._errors("read"):
            return patiently(read, patience_s=patience_s)

    def remove(self, part: str) -> None:
        """See `Exchange`."""
        _remove(self._folder / part)
        from pyarrow.fs import FileType

        key = f"{self._prefix}/{part}"
        with self._sending, self._errors("removed"):
            kind = self._files.get_file_info(key).type
            if kind == FileType.File:
                self._files.delete_file(key)
            elif kind == FileType.Directory:
                self._files.delete_dir(key)
            for name in [name for name in self._sent if name == part or name.startswith(f"{part}/")]:
                del self._sent[name]

    def stands(self, name: str) -> bool:
        """See `Exchange`: looks only after what another has begun to write is there. The last one stands."""
        time.sleep(_SETTLED_S)
        with self._errors("read"):
            return self._text(f"{self._prefix}/{name}") == (self._folder / name).read_text()

    def forget(self) -> None:
        """See `Exchange`."""
        with self._errors("removed"):
            self._files.delete_dir_contents(self._prefix, missing_dir_ok=True)
            with suppress(FileNotFoundError):
                self._files.delete_dir(self._prefix)

    def _fetch(self, part: str, listed: dict[str, list[Any]]) -> None:
        """`listed` keeps what was found below folders that patterns of one call have in common."""
        for info in self._fitting(part, listed) if "*" in part else self._objects(part):
            name = info.path.removeprefix(f"{self._prefix}/")
            state = (info.size, info.mtime)
            if self._fetched.get(name) != state:
                self._bring(name, info)
                self._fetched[name] = state

    def _send(self, part: str, may_send: Callable[[], bool]) -> None:
        for file in _visible_files(self._folder, part):
            try:
                if not self._send_file(file, may_send):
                    return
            except FileNotFoundError:
                if file.exists():
                    raise
                # else its writer has removed it meanwhile, as weights that are the best no more

    def _send_file(self, file: Path, may_send: Callable[[], bool]) -> bool:
        """Whether more may be sent."""
        name, state = str(file.relative_to(self._folder)), _state(file)
        if self._sent.get(name) == state:
            return True
        if not may_send():
            return False
        key = f"{self._prefix}/{name}"
        upload(self._files, file, key)
        if _state(file) == state and not name.endswith(_GROWING):  # as old as its copy, by one clock
            _set_time(file, self._files.get_file_info(key).mtime)
            state = _state(file)
        self._sent[name] = state
        return True

    def _objects(self, part: str) -> list[Any]:
        from pyarrow.fs import FileSelector, FileType

        key = f"{self._prefix}/{part}"
        info = self._files.get_file_info(key)
        if info.type == FileType.File:
            return [info]
        found = self._files.get_file_info(FileSelector(key, recursive=True, allow_not_found=True))
        return sorted((each for each in found if each.type == FileType.File), key=lambda each: each.path)

    def _fitting(self, pattern: str, listed: dict[str, list[Any]]) -> list[Any]:
        """Objects whose names a pattern fits, part by part."""
        wanted = pattern.split("/")
        above = "/".join(wanted[: next(place for place, each in enumerate(wanted) if "*" in each)])
        if above not in listed:
            listed[above] = self._objects(above)
        found = []
        for info in listed[above]:
            parts = info.path.removeprefix(f"{self._prefix}/").split("/")
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                found.append(info)
        return found

    def _whole_text(self, key: str) -> str:
        """Of JSON that may be replaced meanwhile."""
        for _ in range(_TORN_READS):
            text = self._text(key)
            with suppress(ValueError):
                json.loads(text)
                break
        return text

    def _text(self, key: str) -> str:
        with self._files.open_input_stream(key) as stream:
            return bytes(stream.read()).decode(errors="replace")

    def _bring(self, name: str, info: Any) -> None:
        target = self._folder / name
        with suppress(FileNotFoundError):
            here = target.stat()
            if here.st_size >= info.size if name.endswith(_GROWING) else here.st_mtime >= info.mtime.timestamp():
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(target) as draft:
            for _ in range(_TORN_READS):
                download(self._files, info.path, draft)
                if name.endswith(_GROWING) or draft.stat().st_size == self._files.get_file_info(info.path).size:
                    break
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


def renew(folder: Path, life: str) -> None:
    """A worker's machine takes part in a life of a run: what it has kept of the run from before it was started over
    (`--fresh`) is removed. Raises OSError when it cannot be.

    The driver's own folder is of the newest life (`begin_life`); workers on its machine find it so.
    """
    if read_json(folder / _LIFE) == life:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock"):  # ranks of this machine do it once
        if read_json(folder / _LIFE) != life:
            shutil.rmtree(folder, ignore_errors=True)
            begin_life(folder, life)


def begin_life(folder: Path, life: str) -> None:
    """Says of a folder which life of its run it is of; raises OSError when it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _LIFE, life)


@contextmanager
def following(
    exchange: Exchange,
    *,
    fetch: tuple[str, ...] = (),
    send: tuple[str, ...] = (),
    may_send: Callable[[], bool] = _always,
) -> Iterator[None]:
    """Meanwhile a thread fetches, then sends where it may; what the bucket does not take or give is tried again."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(PERIOD_S):
            with suppress(StorageError):
                exchange.fetch(*fetch)
                if may_send():
                    exchange.send(*send, may_send=may_send)

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
