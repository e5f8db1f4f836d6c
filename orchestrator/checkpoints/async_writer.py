"""One rank's checkpoints, written behind the training: the steps wait for a copy to host memory and no longer.

    all ranks, in `save`             copy the state to the host                            the training waits
    a thread of every rank           write, sync and checksum its files, hand them in      the training goes on
    rank 0's thread                  all notes there, fence still up: publish, then prune

No thread takes part in a collective; what one has met is asked for at every step and agreed on by the loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.catalog import Checkpoint, Place
from orchestrator.checkpoints.file_sums import FileSum
from orchestrator.checkpoints.storage import fenced_out, open_storage
from orchestrator.errors import StorageError
from orchestrator.runs.job import LoopState

_NOTES_DEADLINE_S = 1800.0
"""Longest that rank 0 waits for the slowest rank's files: as long as a collective may take (a guess)."""
_FIRST_POLL_S, _SLOWEST_POLL_S = 0.01, 0.5
_WRITER_NICENESS = 10
"""Of the writing thread alone: where cores are short, the training goes first."""
_CLOSING_S = 5.0
"""Longest that giving up may take; the thread does not keep the process alive (a guess)."""
_CHUNK_BYTES = 4 << 20
"""Written and summed at a time, and how much is written at most after giving up."""


class Source(Protocol):
    """What is saved; the engine."""

    @property
    def micro_batch(self) -> int:
        """Samples per worker and forward pass."""

    def snapshot(self) -> dict[str, Any]:
        """This rank's files as state in host memory, by path; every rank calls it. Valid until the next call."""


@dataclass(frozen=True, kw_only=True)
class SaveTimes:
    """What one checkpoint has cost this rank."""

    step: int
    blocked_s: float
    """Seconds that the training stood still, `waited_s` among them."""
    waited_s: float
    """Seconds of those that went by until this rank had written the checkpoint before."""
    writing_s: float
    """Seconds of writing behind the training; on rank 0 until the checkpoint was complete."""
    bytes: int
    """Of this rank's files."""


@dataclass(kw_only=True)
class _Handover:
    """One checkpoint on its way from the training to the disk."""

    state: LoopState
    files: Mapping[str, Any]
    serial: int
    """Counts the saves of an attempt, the same on all ranks: tells notes from those of an earlier try at a step."""
    blocked_s: float
    waited_s: float
    before: threading.Thread | None
    """Writes the checkpoint before."""
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's files are done with, one way or the other: their buffers may be used again."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who writes: one rank of an attempt."""

    rank: int = 0
    world_size: int = 1
    zero_stage: int = 0
    attempt: int = 0


class Saver:
    """Saves one rank's share of a training, from its first to its last checkpoint within an attempt."""

    def __init__(
        self,
        engine: Source,
        place: Place,
        *,
        writer: Writer,
        keep: int,
        holds: Callable[[], bool],
        before_publishing: Callable[[LoopState], None] = lambda state: None,
    ) -> None:
        """The writing thread calls both: `holds` says whether this attempt is still the newest one, and rank 0's
        `before_publishing` brings to safety what must not be lost once a run goes on from the checkpoint."""
        self._engine, self._storage = engine, open_storage(place)
        self._writer, self._rank, self._attempt = writer, writer.rank, writer.attempt
        self._keep, self._holds = keep, holds
        self._before_publishing = before_publishing
        self._thread: threading.Thread | None = None
        self._handover: _Handover | None = None
        self._abandoned = threading.Event()
        self._failure: StorageError | None = None
        self._newest: str | None = None
        self._times: list[SaveTimes] = []
        # The manifest has its own, and torch's costs three times as much as zlib's (160 MB: 1.0 s against 0.3 s).
        self._torch_checksums = get_crc32_options()
        set_crc32_options(False)

    def save(self, state: LoopState) -> None:
        """Copies the state to the host and has it written; every rank calls it, and none raises what only it has met.

        Waits until this rank has written the checkpoint before, whose buffers it takes; not for other ranks, which may
        have failed and stand in the copy's collectives. After a failure nothing more is written.
        """
        started = time.monotonic()
        last = self._handover
        if last is not None:
            last.written.wait()
        waited_s = time.monotonic() - started
        files = self._engine.snapshot()
        if self._failure is not None:
            return
        self._handover = _Handover(
            state=state,
            files=files,
            serial=1 if last is None else last.serial + 1,
            blocked_s=time.monotonic() - started,
            waited_s=waited_s,
            before=self._thread,
        )
        self._thread = threading.Thread(target=self._write, args=(self._handover,), name="checkpoint", daemon=True)
        self._thread.start()

    def failure(self) -> StorageError | None:
        """What writing on this rank has met so far; cheap."""
        return self._failure

    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk; on rank 0, that of any rank."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> str | None:
        """Returns when what was handed over is written; on rank 0, complete: then it says where the newest one is.

        Raises StorageError when it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._newest

    def finished(self) -> list[SaveTimes]:
        """The times of those that were finished since the last call, oldest first."""
        done = self._times[:]
        del self._times[: len(done)]
        return done

    def close(self) -> None:
        """Gives up what is not complete yet, without waiting for other ranks."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_S)
        set_crc32_options(self._torch_checksums)

    # -- behind the training -----------------------------------------------------------------------------------

    def _write(self, handover: _Handover) -> None:
        started = time.monotonic()
        try:
            if sys.platform == "linux":  # where a thread's niceness is its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _WRITER_NICENESS)
            with catalog.storage_errors(str(self._storage)):
                sums = self._write_files(handover)
                handover.written.set()
                if handover.before is not None:
                    handover.before.join()
                if self._rank == 0 and self._failure is None:
                    self._complete(handover)
        except StorageError as error:
            # A newer attempt sweeps away what this one was writing: then that is what happened.
            self._fail(handover, error if self._holds() else fenced_out(self._attempt))
        except Exception as error:  # it would end with the thread, unseen
            failure = StorageError("the checkpoint cannot be written", got=f"{self._storage} ({error!r})")
            failure.__cause__ = error
            self._fail(handover, failure)
        else:
            self._times.append(
                SaveTimes(
                    step=handover.state.step,
                    blocked_s=handover.blocked_s,
                    waited_s=handover.waited_s,
                    writing_s=time.monotonic() - started,
                    bytes=sum(each.bytes for each in sums.values()),
                )
            )
        finally:
            handover.written.set()

    def _fail(self, handover: _Handover, failure: StorageError) -> None:
        """Keeps it for the loop, and tells rank 0 where that is possible, so that it waits no longer."""
        self._failure = self._failure or failure
        with contextlib.suppress(OSError):
            self._write_note(handover, {"failed": failure.what})

    def _write_files(self, handover: _Handover) -> dict[str, FileSum]:
        step = handover.state.step
        folder = self._storage.begin(step, self._attempt)
        sums = {}
        for name, content in handover.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with _CheckedFile(folder / name, self._abandoned) as stream:
                torch.save(content, stream)
                stream.sync()
            sums[name] = FileSum(bytes=stream.bytes, crc32=stream.crc32, rank=self._rank)
        self._storage.hand_in(step, self._attempt, sums)
        self._write_note(handover, {"files": {name: asdict(each) for name, each in sums.items()}})
        return sums

    def _write_note(self, handover: _Handover, news: Mapping[str, Any]) -> None:
        text = json.dumps({"serial": handover.serial, **news}, indent=1)
        self._storage.write_note(handover.state.step, self._attempt, _note_name(self._rank), text)

    def _complete(self, handover: _Handover) -> None:
        """Rank 0: one manifest of all ranks' notes makes it a checkpoint, and older ones are no longer needed."""
        step = handover.state.step
        files = self._gather(step, handover.serial)
        self._before_publishing(handover.state)
        if not self._holds():
            raise fenced_out(self._attempt)
        checkpoint = Checkpoint(
            path=Path(),
            state=handover.state,
            world_size=self._writer.world_size,
            zero_stage=self._writer.zero_stage,
            attempt=self._attempt,
            micro_batch=self._engine.micro_batch,
            files=files,
        )
        self._newest = self._storage.publish(step, self._attempt, catalog.manifest(checkpoint))
        if self._holds():
            catalog.prune(self._storage, keep=self._keep, newest=step, attempt=self._attempt)

    def _gather(self, step: int, serial: int) -> dict[str, FileSum]:
        """All ranks' files, as their notes come in."""
        missing, files = set(range(self._writer.world_size)), {}
        deadline, pause_s = time.monotonic() + _NOTES_DEADLINE_S, _FIRST_POLL_S
        while True:
            there = self._storage.notes(step, self._attempt)
            for rank in [rank for rank in missing if _note_name(rank) in there]:
                note = json.loads(self._storage.read_note(step, self._attempt, _note_name(rank)))
                if note["serial"] != serial:
                    continue
                if "failed" in note:
                    raise StorageError(f"rank {rank} has not written its part of the checkpoint: {note['failed']}")
                files.update({name: FileSum(**each) for name, each in note["files"].items()})
                missing.remove(rank)
            if not missing:
                return files
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the checkpoint of step {step} is not complete: "
                    f"ranks {sorted(missing)} have not written their part in {_NOTES_DEADLINE_S:g} s",
                    got=self._storage,
                    do="check that every node sees checkpoint.storage; the same command goes on from the one before",
                )
            if not self._holds():
                raise fenced_out(self._attempt)
            if self._abandoned.wait(pause_s):
                raise _given_up()
            pause_s = min(2 * pause_s, _SLOWEST_POLL_S)


class _CheckedFile(RawIOBase):
    """A file that knows the size and checksum of what was written to it."""

    def __init__(self, path: Path, abandoned: threading.Event) -> None:
        self._file = path.open("wb", buffering=0)
        self._abandoned = abandoned
        self.bytes = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        """Writes all of it; torch calls this once for each tensor."""
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _CHUNK_BYTES):
            if self._abandoned.is_set():
                raise _given_up()
            rest = whole[start : start + _CHUNK_BYTES]
            self.crc32 = zlib.crc32(rest, self.crc32)
            while rest:
                rest = rest[self._file.write(rest) :]
        self.bytes += len(whole)
        return len(whole)

    def sync(self) -> None:
        """Returns when the disk has it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes it."""
        self._file.close()
        super().close()


def _note_name(rank: int) -> str:
    return f"rank-{rank}.json"


def _given_up() -> StorageError:
    return StorageError("the training ended before its checkpoint was written")
