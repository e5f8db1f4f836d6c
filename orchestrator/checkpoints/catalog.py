"""Which checkpoints count: complete ones whose files are what their manifest says and whose attempt is not void.

    checkpoints/step-00000100/               appears by one atomic rename, when every rank has written
        state/...                            what DeepSpeed writes, one file set per rank
        rank-N.json                          sizes and checksums of rank N's files, which the manifest gathers
        manifest.json                        the files, the loop's state, and the shape of what wrote it
    checkpoints/step-00000200.a2.writing/    attempt 2 is writing it, or died: never read, swept by the next attempt

`storage` has the same for an object store. No torch: `async_writer` writes the files, this module decides which count.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from orchestrator.atomic_file import is_full
from orchestrator.checkpoints.file_sums import FileSum
from orchestrator.checkpoints.storage import Entry, Storage, is_in_progress, open_storage
from orchestrator.errors import StorageError, one_line
from orchestrator.runs.job import LoopState

_READERS = max(2, min(8, os.cpu_count() or 2))
"""Threads that read files to verify them: checksums run in parallel, and one disk is busy with a few (a guess)."""

Place = str | Path | Storage
"""A folder, a URI, or an opened storage."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    """Its folder; of one in an object store, the folder that `fetch` fills."""
    state: LoopState
    world_size: int
    zero_stage: int
    attempt: int = 0
    """The attempt that wrote it."""
    micro_batch: int | None = None
    """Samples per worker and forward pass when it was written."""
    files: Mapping[str, FileSum] = field(default_factory=dict, repr=False)
    """What it consists of, by path below its folder."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest good checkpoint, if any, and what was wrong with newer ones."""

    checkpoint: Checkpoint | None
    rejected: tuple[str, ...]
    """One sentence for each checkpoint that was passed over."""


def manifest(checkpoint: Checkpoint) -> str:
    """A checkpoint as the text that makes it complete."""
    fields = ("world_size", "zero_stage", "attempt", "micro_batch")
    return json.dumps(
        {name: getattr(checkpoint, name) for name in fields}
        | {"state": asdict(checkpoint.state), "files": {n: asdict(f) for n, f in sorted(checkpoint.files.items())}},
        indent=1,
    )


def never_void(attempt: int, step: int) -> bool:
    """Every attempt's checkpoints count."""
    return False


def newest_good(
    place: Place, *, void: Callable[[int, int], bool] = never_void, without: Collection[Path] = ()
) -> Found:
    """The newest checkpoint whose files are all there with the right sizes and checksums.

    `void(attempt, step)` says what does not count; `without` are paths of checkpoints that proved to be damaged. An
    object store is asked for sizes only: `fetch` compares the checksums.
    """
    storage = open_storage(place)
    rejected: list[str] = []
    for entry in storage.entries():
        try:
            checkpoint = _parse(storage, entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            rejected.append(_passed_over(entry, f"its manifest cannot be read ({error})"))
            continue
        if void(checkpoint.attempt, entry.step):
            continue
        problem = "a rank could not load it" if checkpoint.path in without else _problem(storage, entry, checkpoint)
        if problem is None:
            return Found(checkpoint=checkpoint, rejected=tuple(rejected))
        rejected.append(_passed_over(entry, problem))
    return Found(checkpoint=None, rejected=tuple(rejected))


def steps(place: Place, *, void: Callable[[int, int], bool] = never_void) -> list[int]:
    """The steps of all complete checkpoints that count, oldest first; their files are not read."""
    return sorted({entry.step for entry in _counting(open_storage(place), void)})


def newest_location(place: Place, *, void: Callable[[int, int], bool] = never_void) -> str | None:
    """Where the newest complete checkpoint that counts is; its files are not read.

    Raises StorageError or OSError when the place cannot be looked at.
    """
    storage = open_storage(place)
    newest = next(_counting(storage, void), None)
    return None if newest is None else storage.location(newest)


def _counting(storage: Storage, void: Callable[[int, int], bool]) -> Iterator[Entry]:
    """The complete checkpoints that count, newest first, by their manifests alone."""
    for entry in storage.entries():
        with suppress(OSError, ValueError, AttributeError):  # a damaged manifest is no checkpoint
            if not void(json.loads(storage.read_manifest(entry)).get("attempt", 0), entry.step):
                yield entry


def fetch(place: Place, checkpoint: Checkpoint, *, needed: Callable[[str], bool]) -> Path:
    """A folder on this machine with those files of a checkpoint that are needed, by their names.

    Raises StorageError when one cannot be read or arrives damaged.
    """
    files = {name: expected for name, expected in checkpoint.files.items() if needed(name)}
    with storage_errors(checkpoint.path, doing="read"):
        return open_storage(place).fetch(_entry(checkpoint), files)


def prune(place: Place, keep: int, *, newest: int, attempt: int) -> None:
    """Removes all but the `keep` newest up to step `newest`, and what earlier attempts left torn."""
    storage = open_storage(place)
    steps = sorted({entry.step for entry in storage.entries() if entry.step <= newest}, reverse=True)
    for entry in storage.entries():
        if entry.step in steps[keep:]:
            storage.remove(entry)
    storage.sweep(attempt)


def discard_newer(place: Place, step: int) -> None:
    """Removes what lies behind a step that a run goes on from: kept, it would be in the way of what is written again.

    Call on one rank, before the others write.
    """
    storage = open_storage(place)
    for entry in storage.entries():
        if entry.step > step:
            storage.remove(entry)


def _parse(storage: Storage, entry: Entry) -> Checkpoint:
    told = json.loads(storage.read_manifest(entry))
    return Checkpoint(
        path=storage.local(entry),
        state=LoopState(**told["state"]),
        world_size=told["world_size"],
        zero_stage=told["zero_stage"],
        attempt=told.get("attempt", 0),
        micro_batch=told.get("micro_batch"),
        files={name: FileSum(**expected) for name, expected in told["files"].items()},
    )


def _problem(storage: Storage, entry: Entry, checkpoint: Checkpoint) -> str | None:
    with ThreadPoolExecutor(_READERS) as readers:
        problems = readers.map(lambda item: storage.problem(entry, *item), checkpoint.files.items())
        return next((problem for problem in problems if problem is not None), None)


def _passed_over(entry: Entry, problem: str) -> str:
    return f"checkpoint {entry.name} is damaged and was passed over: {problem}"


def _entry(checkpoint: Checkpoint) -> Entry:
    return Entry(name=checkpoint.path.name, step=checkpoint.state.step)


@contextmanager
def storage_errors(place: Path | str, *, what: str = "the checkpoint", doing: str = "written") -> Iterator[None]:
    """Turns a full or unwritable disk into a StorageError that names the folder and the way out.

    torch reports a failed write as a RuntimeError, so the free space is looked at too; safetensors gives the number of
    the system's error in its text alone.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = is_full(error) or f"(os error {errno.ENOSPC})" in str(error) or _has_no_space(place)
        if not full and not isinstance(error, OSError):
            raise
        swept = is_in_progress(getattr(error, "filename", None)) and Path(place).exists()  # by a newer attempt
        if isinstance(error, FileNotFoundError) and not swept:
            raise StorageError(
                "the folder of the run is gone",
                got=f"{error.filename or place} is not there any more",
                do="do not delete or unmount it while the run goes on; the same command starts it anew",
            ) from error
        raise StorageError(
            f"no space is left for {what}" if full else f"{what} cannot be {doing}",
            got=f"{place} ({one_line(error, most=200)})",
            do="free space, lower checkpoint.keep, or set checkpoint.storage to a larger disk; "
            "the same command then goes on from the newest complete checkpoint",
        ) from error


def _has_no_space(place: Path | str) -> bool:
    try:
        return shutil.disk_usage(place).free < 1 << 20
    except OSError:
        return False
