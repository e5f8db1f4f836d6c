"""Where checkpoints are kept: a folder that every node sees, or an object store. One seam, two kinds.

A checkpoint in progress is named by (step, attempt), so two attempts never write to the same place. Its ranks hand in
files, each with a note; publishing makes it complete:

    folder          step-00000100.a2.writing/ is renamed to step-00000100/
    object store    step-00000100.a2/manifest.json is uploaded, last

No torch, and plain OSErrors: `catalog` and `async_writer` translate them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from orchestrator.checkpoints.file_sums import FileSum, file_problem
from orchestrator.errors import StorageError
from orchestrator.object_store import PATIENCE_S, download, open_bucket, patiently, upload

MANIFEST = "manifest.json"
_COMPLETE = re.compile(r"step-(\d{8})(?:\.a(\d+))?(\.replaced)?")
_REMOVING = ".removing"
_WRITING = ".writing"
_IN_PROGRESS = re.compile(rf"step-\d{{8}}\.a(\d+){re.escape(_WRITING)}")
T = TypeVar("T")
P = ParamSpec("P")


def is_in_progress(path: object) -> bool:
    """Whether a path, such as that of an OSError, is or lies in a folder whose checkpoint is not published yet."""
    return any(_IN_PROGRESS.fullmatch(part) for part in Path(str(path)).parts)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint by its name alone: published, but not looked into."""

    name: str
    step: int


class Storage(Protocol):
    """What a place for checkpoints can do. Everything raises OSError where the place cannot be read or written."""

    def begin(self, step: int, attempt: int) -> Path:
        """A folder on this machine for the files of this rank."""

    def hand_in(self, step: int, attempt: int, names: Collection[str]) -> None:
        """Makes files below `begin`'s folder visible to all ranks."""

    def write_note(self, step: int, attempt: int, name: str, text: str) -> None:
        """A small file beside them, whole or not there at all."""

    def notes(self, step: int, attempt: int) -> set[str]:
        """The names of those that are there."""

    def read_note(self, step: int, attempt: int, name: str) -> str:
        """The text of one that is there."""

    def publish(self, step: int, attempt: int, manifest: str) -> str:
        """Makes the checkpoint complete, in one atomic act, and says where it is.

        Raises StorageError when a newer attempt has published the same step.
        """

    def entries(self) -> list[Entry]:
        """What has been published, newest first."""

    def read_manifest(self, entry: Entry) -> str:
        """The text that `publish` was given."""

    def problem(self, entry: Entry, name: str, expected: FileSum) -> str | None:
        """What is wrong with a file, as far as the place can tell without moving it."""

    def fetch(self, entry: Entry, files: Mapping[str, FileSum]) -> Path:
        """A folder on this machine that holds the files. Raises StorageError when one arrives damaged."""

    def local(self, entry: Entry) -> Path:
        """The folder that `fetch` gives."""

    def location(self, entry: Entry) -> str:
        """What `publish` said of it."""

    def remove(self, entry: Entry) -> None:
        """Takes a checkpoint away; a kill in between leaves no half of it that looks complete."""

    def sweep(self, attempt: int) -> None:
        """Removes what earlier attempts and half-done removals left behind."""


def open_storage(place: str | Path | Storage, *, scratch: Path | None = None) -> Storage:
    """The storage at a path or URI; a storage passes unchanged.

    What moves files to or from an object store needs `scratch`, a folder on this machine that its owner removes in the
    end; processes may share it. Whoever only looks needs none.
    """
    if isinstance(place, Path):
        return FolderStorage(place)
    if isinstance(place, str):
        if "://" not in place:
            return FolderStorage(Path(place))
        return ObjectStorage(place, scratch=scratch)
    return place


class FolderStorage:
    """A folder on a disk or network file system that every node sees."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def begin(self, step: int, attempt: int) -> Path:
        """See `Storage`."""
        folder = self._writing(step, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def hand_in(self, step: int, attempt: int, names: Collection[str]) -> None:
        """See `Storage`: they are where everyone looks; their names must outlive a power cut too."""
        folder = self._writing(step, attempt)
        for parent in {(folder / name).parent for name in names}:
            _sync_folder(parent)

    def write_note(self, step: int, attempt: int, name: str, text: str) -> None:
        """See `Storage`."""
        file = self._writing(step, attempt) / name
        draft = file.with_suffix(".draft")
        _write_synced(draft, text)
        draft.rename(file)

    def notes(self, step: int, attempt: int) -> set[str]:
        """See `Storage`. Listing makes an NFS client look again, where it remembers that a file was missing."""
        return {name for name in os.listdir(self._writing(step, attempt)) if name.endswith(".json")}

    def read_note(self, step: int, attempt: int, name: str) -> str:
        """See `Storage`."""
        return (self._writing(step, attempt) / name).read_text()

    def publish(self, step: int, attempt: int, manifest: str) -> str:
        """See `Storage`. An older attempt's checkpoint of this step is moved aside, and still found if we die there."""
        writing, final = self._writing(step, attempt), self._root / _name(step)
        _write_synced(writing / MANIFEST, manifest)
        _sync_folder(writing)
        aside = final.with_name(f"{final.name}.a{attempt}.replaced")
        if final.exists():
            self._refuse_newer(final, attempt)
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            try:
                self._refuse_newer(aside, attempt)  # it may have been published since we looked
            except StorageError:
                aside.rename(final)
                raise
        writing.rename(final)
        _sync_folder(self._root)
        shutil.rmtree(aside, ignore_errors=True)
        return str(final)

    def entries(self) -> list[Entry]:
        """See `Storage`."""
        found = []
        for path in self._root.glob("step-*"):
            match = _COMPLETE.fullmatch(path.name)
            if match is not None:
                # One that was moved aside stands behind the one that takes its place.
                found.append((int(match[1]), match[3] is None, path.name))
        return [Entry(name=name, step=step) for step, _, name in sorted(found, reverse=True)]

    def read_manifest(self, entry: Entry) -> str:
        """See `Storage`."""
        return (self._root / entry.name / MANIFEST).read_text()

    def problem(self, entry: Entry, name: str, expected: FileSum) -> str | None:
        """See `Storage`: the whole file is read."""
        return file_problem(self._root / entry.name / name, name, expected)

    def fetch(self, entry: Entry, files: Mapping[str, FileSum]) -> Path:
        """See `Storage`: nothing moves, and `problem` has read them."""
        return self.local(entry)

    def local(self, entry: Entry) -> Path:
        """See `Storage`."""
        return self._root / entry.name

    def location(self, entry: Entry) -> str:
        """See `Storage`."""
        return str(self.local(entry))

    def remove(self, entry: Entry) -> None:
        """See `Storage`."""
        dying = self._root / f"{entry.name}{_REMOVING}"
        with contextlib.suppress(OSError):  # another process removes it, or the disk is read-only: then it stays
            (self._root / entry.name).rename(dying)
        shutil.rmtree(dying, ignore_errors=True)

    def sweep(self, attempt: int) -> None:
        """See `Storage`."""
        for path in self._root.glob("step-*"):
            torn = _IN_PROGRESS.fullmatch(path.name)
            replaced = path.name.endswith(".replaced") and (self._root / path.name[: len(_name(0))]).exists()
            if (torn and int(torn[1]) < attempt) or path.name.endswith(_REMOVING) or replaced:
                shutil.rmtree(path, ignore_errors=True)

    def _writing(self, step: int, attempt: int) -> Path:
        """Made by `begin` alone: what a newer attempt has swept must not come back half-empty."""
        return self._root / f"{_name(step)}.a{attempt}{_WRITING}"

    def _refuse_newer(self, path: Path, attempt: int) -> None:
        try:
            newer = json.loads((path / MANIFEST).read_text()).get("attempt", 0) > attempt
        except (OSError, ValueError):
            return  # damaged: nobody will miss it
        if newer:
            raise fenced_out(attempt)


def _patient(method: Callable[Concatenate[ObjectStorage, P], T]) -> Callable[Concatenate[ObjectStorage, P], T]:
    """The method, done patiently: it may begin anew after any part of it."""

    @functools.wraps(method)
    def patient(self: ObjectStorage, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(lambda: method(self, *args, **kwargs), patience_s=self._patience_s)

    return patient


class ObjectStorage:
    """A bucket or a prefix in one: any URI that `pyarrow.fs` takes. `AWS_ENDPOINT_URL` names another S3 server.
    With a scratch folder it serves a training, which outlives a bucket that is away for a while (`patiently`)."""

    def __init__(self, uri: str, *, scratch: Path | None) -> None:
        """Opens it. Raises StorageError when the URI names nothing that can be opened."""
        self._files, self._prefix = open_bucket(uri)
        self._patience_s = 0.0 if scratch is None else PATIENCE_S
        self._uri = uri.rstrip("/")
        self._own_scratch: Path | None = None
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
            self._own_scratch = Path(tempfile.mkdtemp(dir=scratch))

    @property
    def _scratch(self) -> Path:
        assert self._own_scratch is not None, "files are moved through a scratch folder"
        return self._own_scratch

    def __str__(self) -> str:
        return self._uri

    def begin(self, step: int, attempt: int) -> Path:
        """See `Storage`."""
        folder = self._scratch / f"{_name(step)}.a{attempt}{_WRITING}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @_patient
    def hand_in(self, step: int, attempt: int, names: Collection[str]) -> None:
        """See `Storage`: uploads them, each freeing its space here."""
        folder = self.begin(step, attempt)
        for name in names:
            if not (folder / name).exists():  # it is there since the last try
                continue
            upload(self._files, folder / name, f"{self._prefix}/{_name(step)}.a{attempt}/{name}")
            (folder / name).unlink()
        shutil.rmtree(folder)

    @_patient
    def write_note(self, step: int, attempt: int, name: str, text: str) -> None:
        """See `Storage`."""
        with self._files.open_output_stream(f"{self._prefix}/{_name(step)}.a{attempt}/{name}") as stream:
            stream.write(text.encode())

    @_patient
    def notes(self, step: int, attempt: int) -> set[str]:
        """See `Storage`."""
        return {name for name in self._list(f"{self._prefix}/{_name(step)}.a{attempt}") if name.endswith(".json")}

    @_patient
    def read_note(self, step: int, attempt: int, name: str) -> str:
        """See `Storage`."""
        return self._read(f"{_name(step)}.a{attempt}/{name}")

    def publish(self, step: int, attempt: int, manifest: str) -> str:
        """See `Storage`. Attempts have keys of their own, so nothing of another's can be overwritten."""
        self.write_note(step, attempt, MANIFEST, manifest)
        return f"{self._uri}/{_name(step)}.a{attempt}"

    @_patient
    def entries(self) -> list[Entry]:
        """See `Storage`: those with a manifest."""
        return [
            Entry(name=name, step=step)
            for step, _, name in sorted(self._all(), reverse=True)
            if self._size(f"{name}/{MANIFEST}") is not None
        ]

    @_patient
    def read_manifest(self, entry: Entry) -> str:
        """See `Storage`."""
        return self._read(f"{entry.name}/{MANIFEST}")

    @_patient
    def problem(self, entry: Entry, name: str, expected: FileSum) -> str | None:
        """See `Storage`: by its size; its checksum is compared where it arrives."""
        size = self._size(f"{entry.name}/{name}")
        if size is None:
            return f"{name} is missing"
        return None if size == expected.bytes else f"{name} has {size} bytes instead of {expected.bytes}"

    @_patient
    def fetch(self, entry: Entry, files: Mapping[str, FileSum]) -> Path:
        """See `Storage`."""
        folder = self.local(entry)
        for name, expected in files.items():
            file = folder / name
            if file_problem(file, name, expected) is None:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            download(self._files, f"{self._prefix}/{entry.name}/{name}", file)
            problem = file_problem(file, name, expected)
            if problem is not None:
                raise StorageError(f"checkpoint {entry.name} arrived damaged: {problem}", got=self._uri)
        return folder

    def local(self, entry: Entry) -> Path:
        """See `Storage`."""
        return self._scratch / entry.name

    def location(self, entry: Entry) -> str:
        """See `Storage`."""
        return f"{self._uri}/{entry.name}"

    @_patient
    def remove(self, entry: Entry) -> None:
        """See `Storage`: the manifest goes first."""
        self._files.delete_file(f"{self._prefix}/{entry.name}/{MANIFEST}")
        self._files.delete_dir(f"{self._prefix}/{entry.name}")

    @_patient
    def sweep(self, attempt: int) -> None:
        """See `Storage`."""
        for _, writer, name in self._all():
            if writer < attempt and self._size(f"{name}/{MANIFEST}") is None:
                self._files.delete_dir(f"{self._prefix}/{name}")

    def _all(self) -> list[tuple[int, int, str]]:
        """(step, attempt, name) of everything that was begun."""
        matches = (_COMPLETE.fullmatch(name) for name in self._list(self._prefix))
        return [(int(match[1]), int(match[2]), match[0]) for match in matches if match and match[2]]

    def _list(self, prefix: str) -> list[str]:
        """Names right below a prefix."""
        from pyarrow.fs import FileSelector

        return [info.base_name for info in self._files.get_file_info(FileSelector(prefix, allow_not_found=True))]

    def _size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        size: int | None = self._files.get_file_info(f"{self._prefix}/{key}").size
        return size

    def _read(self, key: str) -> str:
        with self._files.open_input_stream(f"{self._prefix}/{key}") as stream:
            return bytes(stream.read()).decode()


def fenced_out(attempt: int) -> StorageError:
    """What stops a worker of an attempt that is over."""
    return StorageError(f"a newer attempt of this run has started: attempt {attempt} writes no more checkpoints")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_synced(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
