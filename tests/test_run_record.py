from __future__ import annotations

import itertools
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import ClusterError, StorageError
from orchestrator.tracking import run_record
from orchestrator.tracking.run_record import DesiredRun, StoredRun


def wanted(name: str = "tiny", *, parent: str | None = None) -> DesiredRun:
    handle = run_record.new_handle(uri="sqlite:////db", experiment="exp", name=name, parent=parent)
    return DesiredRun(handle=handle, tags={"a": "1", "b": None}, artifacts={"spec.yaml": "x"}, trials=("t",))


def test_what_was_put_is_read_again_and_only_its_owner_may(tmp_path: Path) -> None:
    run = wanted()
    assert run_record.read(tmp_path) is None
    run_record.put(tmp_path, run)
    assert run_record.read(tmp_path) == run
    assert stat.S_IMODE((tmp_path / "outbox" / "desired.json").stat().st_mode) == 0o600
    run_record.put(tmp_path, None)
    assert run_record.read(tmp_path) is None


def test_the_digest_tells_any_change_and_nothing_else(tmp_path: Path) -> None:
    run = wanted()
    run_record.put(tmp_path, run)
    again = run_record.read(tmp_path)
    assert again is not None
    assert again.digest() == run.digest()
    assert replace(run, status="finished").digest() != run.digest()


def test_nothing_is_changed_of_a_run_that_is_not_tracked(tmp_path: Path) -> None:
    assert run_record.change(tmp_path, lambda run: run) is None
    assert list(tmp_path.iterdir()) == []


def test_changes_made_at_once_are_all_kept(tmp_path: Path) -> None:
    run_record.put(tmp_path, wanted())

    def tag(number: int) -> None:
        for part in range(10):
            new = {f"{number}.{part}": "x"}
            run_record.change(tmp_path, lambda run, new=new: run_record.with_tags(run, new))

    threads = [threading.Thread(target=tag, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run = run_record.read(tmp_path)
    assert run is not None
    assert len(run.tags) == 2 + 40


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    run_record.put(tmp_path, wanted())
    file = tmp_path / "outbox" / "desired.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(StorageError, match=r"is damaged\n.*desired.json"):
        run_record.read(tmp_path)


def fill(file: Path) -> None:
    """Takes all that is left of a disk."""
    with file.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        stream.writelines(itertools.repeat(bytes(4096)))


def test_how_a_run_ended_is_written_on_a_disk_that_has_filled_up(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:  # no rights to mount: the room is there to be given back all the same
        run_record.put(tmp_path, wanted())
        assert (tmp_path / "outbox" / "reserve").stat().st_size >= 100_000
        return
    try:
        run_record.put(tmp_path, wanted())
        fill(tmp_path / "ballast")
        run_record.change(
            tmp_path, lambda run: run_record.ended(run, "failed", tags={"error": "disk full"}, ended_ms=1)
        )
        run = run_record.read(tmp_path)
        assert run is not None
        assert run.status == "failed"
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_runs_are_found_below_themselves_their_search_and_their_storage(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "search", tmp_path / "search" / "trials" / "00"]
    for folder in folders:
        run_record.put(folder, wanted())
    assert run_record.find_runs(tmp_path) == folders
    assert run_record.find_runs(tmp_path / "search") == folders[1:]
    assert run_record.find_runs(folders[2]) == [folders[2]]


def test_a_run_set_aside_keeps_what_is_to_be_sent_and_gives_its_name_free(tmp_path: Path) -> None:
    search, trial = tmp_path / "search", tmp_path / "search" / "trials" / "00"
    run_record.put(search, wanted())
    run_record.put(trial, wanted(parent="../.."))
    run_record.write_stored_run(search, StoredRun(run_id="r", experiment_id="1", uri="sqlite:////db"))
    for heavy in (search / "result.json", trial / "model" / "weights"):
        heavy.parent.mkdir(exist_ok=True)
        heavy.touch()
    aside = run_record.set_aside(search)
    assert not search.exists()
    assert run_record.find_runs(tmp_path) == [aside, aside / "trials" / "00"]
    assert run_record.stored_run(aside) is not None
    assert not list(aside.rglob("result.json")) + list(aside.rglob("weights"))


# -- who drives ------------------------------------------------------------------------------------------------------

DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.tracking.run_record import driving
with driving(Path(sys.argv[1])):
    print("driving", flush=True)
    time.sleep(600)
"""


@contextmanager
def driver_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that drives the run of a folder until SIGKILL at the end of the block."""
    command = [sys.executable, "-c", DRIVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def test_a_driver_lives_until_it_is_killed(tmp_path: Path) -> None:
    run_record.put(tmp_path, wanted())
    run_record.put(tmp_path / "trials" / "00", wanted(parent="../.."))
    assert not run_record.driver_lives(tmp_path)
    with driver_process(tmp_path) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "driving\n"
        assert run_record.driver_lives(tmp_path)
        assert run_record.driver_lives(tmp_path / "trials" / "00")
        with pytest.raises(ClusterError, match=rf"another command drives[\s\S]*process {driver.pid} on"):
            run_record.driving(tmp_path).__enter__()
        driver.send_signal(signal.SIGSTOP)
        assert run_record.driver_lives(tmp_path), "it may wake up"
    assert not run_record.driver_lives(tmp_path)
    assert not run_record.driver_lives(tmp_path / "trials" / "00")
    with run_record.driving(tmp_path):
        assert run_record.driver_lives(tmp_path)
    assert not run_record.driver_lives(tmp_path)


def test_a_stage_that_goes_on_below_another_whole_is_driven_by_itself(tmp_path: Path) -> None:
    run_record.put(tmp_path / "stage", wanted(parent="../earlier-whole"))
    with run_record.driving(tmp_path / "stage"):
        assert run_record.driver_lives(tmp_path / "stage")
    assert not run_record.driver_lives(tmp_path / "stage")
