"""Saving in real processes: killed before every single file operation, stopped, starved of disk, overtaken."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoints import catalog
from orchestrator.checkpoints.async_writer import Saver, Writer
from orchestrator.checkpoints.storage import Storage
from orchestrator.errors import StorageError
from orchestrator.runs.job import LoopState

pytestmark = pytest.mark.slow  # torch, and processes that are killed

_DEADLINE_S = 60.0


class Weights:
    """State of a training whose every number is the step that it was saved at."""

    micro_batch = 4

    def __init__(self, *, rank: int = 0, elements: int = 1000) -> None:
        self._rank = rank
        self.tensor = torch.zeros(elements)

    def set(self, value: int) -> None:
        self.tensor.fill_(value)

    def snapshot(self) -> dict[str, Any]:
        files = {f"state/zero_pp_rank_{self._rank}.pt": {"moments": self.tensor.clone()}}
        return files | ({} if self._rank else {"state/model.pt": {"weights": self.tensor.clone()}})


def saver(weights: Weights, folder: Path | Storage, *, attempt: int = 1, world_size: int = 1, **more: Any) -> Saver:
    writer = Writer(rank=weights._rank, world_size=world_size, zero_stage=2, attempt=attempt)
    values: dict[str, Any] = {"keep": 1, "holds": lambda: True, **more}
    return Saver(weights, folder, writer=writer, **values)


def save(folder: Path, step: int, *, weights: Weights | None = None, **more: Any) -> str | None:
    """One checkpoint, waited for."""
    weights = weights or Weights()
    weights.set(step)
    saving = saver(weights, folder, **more)
    try:
        saving.save(LoopState(step=step))
        return saving.wait()
    finally:
        saving.close()


def newest_step(folder: Path) -> int | None:
    """The step of the newest good checkpoint, whose every number must be that step."""
    found = catalog.newest_good(folder).checkpoint
    if found is None:
        return None
    for name in found.files:
        for tensor in torch.load(found.path / name).values():
            assert tensor.unique().tolist() == [found.state.step]
    return found.state.step


def forked(work: Callable[[], Any]) -> int:
    """The process id of a child that does the work and ends with 0, or with 1 when it raises."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def ended(child: int) -> int:
    """A child's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def eventually(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.002)


# -- one process -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_values_of_its_step_and_not_later_ones(tmp_path: Path) -> None:
    weights, written = Weights(), threading.Event()
    saving = saver(weights, tmp_path, holds=written.wait)
    weights.set(5)
    saving.save(LoopState(step=5))
    weights.set(6)
    written.set()
    assert saving.wait() == str(tmp_path / "step-00000005")
    assert newest_step(tmp_path) == 5
    saving.close()


def test_training_goes_on_while_a_checkpoint_waits_to_be_complete(tmp_path: Path) -> None:
    weights, complete = Weights(), threading.Event()
    saving = saver(weights, tmp_path, holds=complete.wait)
    for step in (1, 2, 3):
        weights.set(step)
        saving.save(LoopState(step=step))
    assert (newest_step(tmp_path), saving.finished(), saving.failure()) == (None, [], None)
    complete.set()
    saving.wait()
    assert [times.step for times in saving.finished()] == [1, 2, 3]
    assert newest_step(tmp_path) == 3
    saving.close()


def test_what_a_checkpoint_cost_is_told(tmp_path: Path) -> None:
    saving = saver(Weights(), tmp_path)
    saving.save(LoopState(step=1))
    path = saving.wait()
    [times] = saving.finished()
    assert path is not None
    assert times.bytes == sum(file.stat().st_size for file in Path(path, "state").iterdir())
    assert 0 <= times.waited_s <= times.blocked_s
    assert times.writing_s > 0
    assert saving.finished() == []
    saving.close()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_an_attempt_that_is_over_publishes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(StorageError, match="attempt 1 writes no more checkpoints"):
        save(tmp_path, 10, holds=lambda: False)
    assert newest_step(tmp_path) == 5


def test_after_a_failure_nothing_more_is_written_and_saving_still_does_not_raise(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.write_text("a file where a folder should be")
    saving = saver(Weights(), folder)
    saving.save(LoopState(step=1))
    eventually(lambda: saving.failure() is not None)
    folder.unlink()
    saving.save(LoopState(step=2))
    with pytest.raises(StorageError, match="cannot be written"):
        saving.wait()
    assert not folder.exists()
    saving.close()


def test_closing_does_not_wait_for_other_ranks(tmp_path: Path) -> None:
    saving = saver(Weights(), tmp_path, world_size=2)
    saving.save(LoopState(step=1))
    started = time.monotonic()
    saving.close()
    assert time.monotonic() - started < 5
    assert newest_step(tmp_path) is None


# -- killed ----------------------------------------------------------------------------------------------------------


def killed_before(operation: int, folder: Path, work: Callable[[], Any]) -> int:
    """Ends a child by SIGKILL before its n-th operation on a file below the folder; its exit code."""

    def armed() -> None:
        left = [operation]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event.startswith(("open", "os.", "shutil.")) and str(folder) in str(arguments[:2]):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return ended(forked(armed))


def every_kill(tmp_path: Path, prepare: Callable[[Path], Any], work: Callable[[Path], Any]) -> list[int | None]:
    """What is the newest good step after a kill before the first, second, ... file operation, until none is left."""
    newest: list[int | None] = []
    while True:
        folder = tmp_path / f"run-{len(newest)}"
        prepare(folder)
        code = killed_before(len(newest), folder, lambda folder=folder: work(folder))  # type: ignore[misc]
        newest.append(newest_step(folder))
        save(folder, 20, attempt=3)
        assert [path.name for path in folder.iterdir()] == ["step-00000020"], "the next attempt cleans up"
        if code == 0:
            return newest
        assert code == -signal.SIGKILL


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    newest = every_kill(tmp_path, lambda folder: save(folder, 5), lambda folder: save(folder, 10))
    assert set(newest) == {5, 10}
    assert newest == sorted(newest, key=lambda step: step or 0)
    assert newest.count(5) > 5
    assert newest.count(10) > 3, "pruning was killed too"


def test_a_kill_while_one_takes_the_place_of_an_older_attempts_leaves_one_of_them(tmp_path: Path) -> None:
    newest = every_kill(tmp_path, lambda folder: save(folder, 10), lambda folder: save(folder, 10, attempt=2))
    assert set(newest) == {10}


def test_a_kill_in_the_middle_of_a_file_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    child = forked(lambda: save(tmp_path, 10, weights=Weights(elements=50_000_000)))  # 200 MB
    eventually(lambda: any(f.stat().st_size > 1 << 20 for f in tmp_path.glob("*.writing/state/*")))
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert newest_step(tmp_path) == 5


# -- several ranks ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_complete_when_the_slowest_rank_has_written(tmp_path: Path) -> None:
    fast = saver(Weights(), tmp_path, world_size=2)
    fast.save(LoopState(step=0))
    time.sleep(0.1)
    assert newest_step(tmp_path) is None
    assert ended(forked(lambda: save(tmp_path, 0, weights=Weights(rank=1), world_size=2))) == 0
    fast.wait()
    assert newest_step(tmp_path) == 0
    found = catalog.newest_good(tmp_path).checkpoint
    assert found is not None
    assert {name: file.rank for name, file in found.files.items()} == {
        "state/model.pt": 0,
        "state/zero_pp_rank_0.pt": 0,
        "state/zero_pp_rank_1.pt": 1,
    }
    fast.close()


def test_a_rank_without_disk_is_named_by_rank_0_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def starved() -> None:
        # The kernel refuses to let any file grow beyond 64 KiB, as a full disk would.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        with pytest.raises(StorageError, match="cannot be written"):
            save(tmp_path, 10, weights=Weights(rank=1, elements=1_000_000), world_size=2)

    child = forked(starved)
    with pytest.raises(StorageError, match="rank 1 has not written its part of the checkpoint"):
        save(tmp_path, 10, world_size=2)
    assert ended(child) == 0
    assert newest_step(tmp_path) == 5


def test_a_note_of_an_earlier_try_at_a_step_does_not_count(tmp_path: Path) -> None:
    other = saver(Weights(rank=1), tmp_path, world_size=2)
    for step in (5, 10):
        other.save(LoopState(step=step))
    other.wait()
    saving = saver(Weights(), tmp_path, world_size=2)
    saving.save(LoopState(step=10))  # its first one, and the note that lies there is of the other's second
    time.sleep(0.2)
    assert newest_step(tmp_path) is None
    for each in (saving, other):
        each.close()


# -- split brain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fenced", [True, False], ids=["fence seen", "fence not seen"])
def test_an_attempt_that_was_stopped_and_overtaken_destroys_nothing(tmp_path: Path, fenced: bool) -> None:
    folder, asking, go_on = tmp_path / "checkpoints", tmp_path / "asking", tmp_path / "go-on"
    save(folder, 5)

    def holds() -> bool:
        """Holds the writer where it is about to publish; the process is stopped meanwhile."""
        asking.touch()
        eventually(go_on.exists)
        return not fenced

    def zombie() -> None:
        with pytest.raises(StorageError, match="a newer attempt" if fenced else "cannot be written"):
            save(folder, 10, attempt=1, holds=holds, keep=9)

    child = forked(zombie)
    eventually(asking.exists)
    os.kill(child, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    go_on.touch()
    save(folder, 10, attempt=2, keep=9)
    os.kill(child, signal.SIGCONT)
    assert ended(child) == 0
    assert newest_step(folder) == 10
    found = catalog.newest_good(folder).checkpoint
    assert found is not None
    assert found.attempt == 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000010"]
