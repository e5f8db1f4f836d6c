from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.tracking import outbox as outbox_module
from orchestrator.tracking.outbox import (
    Metric,
    Outbox,
    assume_shipped,
    count_waiting,
    flush_folder,
    is_empty,
    newest_point_ms,
    note_totals,
    ship_batch,
)


class Store:
    """Takes batches as MLflow does: a row that it has already is dropped. `down` makes it refuse."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, float, int, int], None] = {}
        self.batches: list[int] = []
        self.down = False

    def __call__(self, batch: Sequence[Metric]) -> None:
        if self.down:
            raise ConnectionError("store away")
        self.batches.append(len(batch))
        self.rows.update({(m.key, m.value, m.step, m.timestamp_ms): None for m in batch})

    def curve(self, key: str) -> list[tuple[int, float]]:
        return [(step, value) for name, value, step, _ in self.rows if name == key]


def log(outbox: Outbox, steps: range, *, sign: int = 1) -> None:
    for step in steps:
        outbox.append({"train/loss": sign / step, "train/tokens": 8.0 * step}, step=step)


def write(folder: Path, steps: range, *, attempt: int = 1, resumed_from: int = 0, sign: int = 1) -> None:
    """What one attempt logs; `sign` tells its points from another's."""
    outbox = Outbox(folder, attempt=attempt, resumed_from=resumed_from)
    log(outbox, steps, sign=sign)
    outbox.close()


def expected(steps: range, *, sign: int = 1) -> list[tuple[int, float]]:
    return [(step, sign / step) for step in steps]


def test_every_point_arrives_in_order(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 51))
    assert not is_empty(tmp_path)
    assert flush_folder(tmp_path, store) == 100
    assert is_empty(tmp_path)
    assert store.curve("train/loss") == expected(range(1, 51))


def test_a_batch_has_at_most_1000_points(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 1201))
    assert flush_folder(tmp_path, store) == 2400
    assert store.batches == [1000, 1000, 400]


def test_points_wait_while_the_store_is_away_and_arrive_when_it_is_back(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 11))
    store.down = True
    with pytest.raises(ConnectionError):
        flush_folder(tmp_path, store)
    assert not is_empty(tmp_path)
    assert count_waiting(tmp_path) == 20
    store.down = False
    assert flush_folder(tmp_path, store) == 20
    assert count_waiting(tmp_path) == 0
    assert store.curve("train/loss") == expected(range(1, 11))


def test_steps_repeated_after_a_resume_are_not_sent_again(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 38))
    flush_folder(tmp_path, store)
    write(tmp_path, range(31, 61), attempt=2, resumed_from=30)
    assert flush_folder(tmp_path, store) == 46
    assert store.curve("train/loss") == expected(range(1, 61))


def test_steps_beyond_the_one_a_later_attempt_resumed_from_are_void_unless_sent(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 33))
    flush_folder(tmp_path, store)
    write(tmp_path, range(33, 38))
    write(tmp_path, range(31, 61), attempt=2, resumed_from=30, sign=-1)
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == [*expected(range(1, 33)), *expected(range(33, 61), sign=-1)]
    assert is_empty(tmp_path)


def test_a_worker_of_an_old_attempt_that_writes_on_is_not_heard(tmp_path: Path) -> None:
    store, cut_off = Store(), Outbox(tmp_path, attempt=1)
    log(cut_off, range(1, 11))
    successor = Outbox(tmp_path, attempt=2, resumed_from=5)
    log(cut_off, range(11, 16), sign=-1)
    log(successor, range(6, 21))
    flush_folder(tmp_path, store)
    log(cut_off, range(16, 31), sign=-1)
    log(successor, range(21, 31))
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(1, 31))
    assert is_empty(tmp_path)
    cut_off.close()
    successor.close()


def test_of_many_resumes_the_lowest_decides_what_is_void(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 41), sign=-1)
    write(tmp_path, range(31, 41), attempt=2, resumed_from=30, sign=-1)
    write(tmp_path, range(11, 16), attempt=3, resumed_from=10)
    write(tmp_path, range(16, 41), attempt=4, resumed_from=15)
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == [*expected(range(1, 11), sign=-1), *expected(range(11, 41))]


def test_a_rewind_voids_what_was_logged_beyond_it(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    log(outbox, range(1, 11))
    log(outbox, range(11, 15), sign=-1)
    outbox.rewind(10)
    log(outbox, range(11, 21))
    outbox.close()
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(1, 21))


def test_a_file_that_has_grown_large_is_followed_by_another_and_nothing_becomes_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "_LARGEST_BYTES", 1000)
    write(tmp_path, range(1, 21))
    write(tmp_path, range(11, 31), attempt=2, resumed_from=10)
    sizes = [file.stat().st_size for file in tmp_path.glob("a*.jsonl")]
    assert len(sizes) > 4
    assert max(sizes) < 1300
    store = Store()
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(1, 31))
    assert store.curve("train/tokens") == [(step, 8.0 * step) for step in range(1, 31)]


def test_what_another_machine_has_shipped_is_not_sent_and_what_this_one_knows_stands(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    assume_shipped(tmp_path, {"train/loss": 3})
    store = Store()
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(4, 6))
    assert len(store.curve("train/tokens")) == 5
    assume_shipped(tmp_path, {})
    write(tmp_path, range(5, 8), attempt=2, resumed_from=4)
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(4, 8))


def test_no_two_processes_write_one_file_even_as_the_same_attempt(tmp_path: Path) -> None:
    one, two = Outbox(tmp_path, attempt=3), Outbox(tmp_path, attempt=3)
    log(one, range(1, 3))
    log(two, range(1, 3))
    assert len(list(tmp_path.glob("a*.jsonl"))) == 2
    one.close()
    two.close()


def test_a_batch_sent_but_not_noted_is_sent_again_as_it_was_even_if_void_by_then(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 38))

    def send_and_die(batch: Sequence[Metric]) -> None:
        store(batch)
        raise KeyboardInterrupt  # killed between the store's answer and the note

    with pytest.raises(KeyboardInterrupt):
        ship_batch(tmp_path, send_and_die)
    write(tmp_path, range(31, 61), attempt=2, resumed_from=30, sign=-1)
    assert not is_empty(tmp_path)
    flush_folder(tmp_path, store)
    assert store.batches == [74, 74, 46]
    assert store.curve("train/loss") == [*expected(range(1, 38)), *expected(range(38, 61), sign=-1)]


def test_a_damaged_note_makes_everything_be_sent_again_with_the_same_timestamps(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 6))
    flush_folder(tmp_path, store)
    (tmp_path / "shipped.json").write_text('{"offsets": {}, "hig')
    time.sleep(0.01)
    flush_folder(tmp_path, store)
    assert store.batches == [10, 10]
    assert len(store.rows) == 10


def test_totals_all_stand_and_the_newest_is_at_the_highest_step(tmp_path: Path) -> None:
    store = Store()
    for step, restarts in ((30, 1), (30, 2), (20, 3)):
        note_totals(tmp_path, {"recovery/restarts": restarts}, step=step)
    flush_folder(tmp_path, store)
    assert store.curve("recovery/restarts") == [(30, 1.0), (30, 2.0), (30, 3.0)]
    assert is_empty(tmp_path)


def test_a_torn_line_is_skipped_and_what_follows_is_kept(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 3))
    (file,) = tmp_path.glob("a*.jsonl")
    for torn in (file, tmp_path / "totals.jsonl"):
        with torn.open("a") as stream:
            stream.write('{"key": "train/loss", "val')
    assert count_waiting(tmp_path) == 4
    note_totals(tmp_path, {"recovery/restarts": 1}, step=2)
    write(tmp_path, range(3, 5), attempt=2, resumed_from=2)
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(1, 5))
    assert store.curve("recovery/restarts") == [(2, 1.0)]
    assert is_empty(tmp_path)


def test_a_line_still_being_written_waits_for_its_end(tmp_path: Path) -> None:
    store, line = Store(), '{"key": "train/loss", "value": 1.0, "step": 1, "timestamp_ms": 5}\n'
    with (tmp_path / "a0001.00-from-00000000.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        assert flush_folder(tmp_path, store) == 0
        file.write(line[20:])
    assert flush_folder(tmp_path, store) == 1


def test_infinite_and_undefined_values_reach_the_sender(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    outbox.append({"train/loss": float("inf")}, step=1)
    outbox.append({"train/loss": float("nan")}, step=2)
    outbox.close()
    flush_folder(tmp_path, store)
    assert [str(value) for _, value in store.curve("train/loss")] == ["inf", "nan"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run's folder.*\n.*file"):
        Outbox(tmp_path / "file" / "metrics")


def test_a_full_disk_is_an_error_of_storage_and_logging_goes_on_once_there_is_room(tmp_path: Path) -> None:
    code = FULL_DISK.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no space is left for the run's metrics" in done.stdout
    store = Store()
    flush_folder(tmp_path, store)
    steps = [step for step, _ in store.curve("train/loss")]
    assert 200 in steps
    assert steps[:-1] == list(range(1, len(steps))), "all that was logged before the disk was full"


FULL_DISK = """
import resource, signal
from pathlib import Path
from orchestrator.errors import StorageError
from orchestrator.tracking.outbox import Outbox

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))  # bytes of a file
outbox, step = Outbox(Path("{folder}")), 0
try:
    for step in range(1, 200):
        outbox.append({{"train/loss": 1 / step}}, step=step)
except StorageError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
outbox.append({{"train/loss": 1 / 200}}, step=200)
"""


def test_the_newest_point_has_a_time(tmp_path: Path) -> None:
    assert newest_point_ms(tmp_path / "nothing") is None
    before_ms = time.time() * 1000
    write(tmp_path, range(1, 3))
    assert before_ms - 2000 < (newest_point_ms(tmp_path) or 0) < before_ms + 60_000


KILLED_WRITER = """
import os, sys, time
from pathlib import Path
from orchestrator.tracking.outbox import Outbox, ship_batch

def send(batch):  # a store that survives: one line a point, and it drops rows it has
    lines = "".join(f"{m.key} {m.step} {m.value} {m.timestamp_ms}\\n" for m in batch)
    os.write(sink, lines.encode())

sink = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
first_step = int(sys.argv[4])
outbox = Outbox(Path(sys.argv[1]), attempt=int(sys.argv[3]), resumed_from=first_step - 1)
for step in range(first_step, 100_000):
    outbox.append({"train/loss": 1 / step}, step=step)
    if step % 7 == 0:
        ship_batch(Path(sys.argv[1]), send)
    print(step, flush=True)
    time.sleep(0.001)
"""


def test_a_writer_killed_in_mid_logging_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    folder, sink = tmp_path / "outbox", tmp_path / "sink"
    last_step = 0
    for attempt in (1, 2, 3):
        resume_at = max(1, last_step - 20)  # as after a checkpoint 20 steps before
        command = [sys.executable, "-c", KILLED_WRITER, str(folder), str(sink), str(attempt), str(resume_at)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                last_step = int(line)
                if last_step >= resume_at + 150:
                    writer.send_signal(signal.SIGKILL)
                    break
    store = Store()
    flush_folder(folder, store)
    for line in sink.read_text().splitlines():
        key, step, value, timestamp_ms = line.split()
        store.rows[(key, float(value), int(step), int(timestamp_ms))] = None
    curve = sorted(store.curve("train/loss"))
    assert len(curve) >= last_step
    assert curve == expected(range(1, len(curve) + 1))


def test_the_note_of_what_was_shipped_names_offsets_at_line_ends(tmp_path: Path) -> None:
    store = Store()
    write(tmp_path, range(1, 4))
    flush_folder(tmp_path, store)
    (file,) = tmp_path.glob("a*.jsonl")
    note = json.loads((tmp_path / "shipped.json").read_text())
    assert note["offsets"] == {file.name: os.path.getsize(file)}
    assert note["highest_step"] == {"train/loss": 3, "train/tokens": 3}
    assert note["sending"] is None
