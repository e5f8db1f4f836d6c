from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.tracking.outbox import Metric, Outbox, count_waiting, find_outboxes, flush_folder


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


def log(outbox: Outbox, steps: range) -> None:
    for step in steps:
        outbox.append({"train/loss": 1.0 / step, "train/tokens": 8.0 * step}, step=step)


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, 1.0 / step) for step in steps]


def test_every_point_arrives_in_order(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    outbox.start(store, delay_s=0)
    log(outbox, range(1, 51))
    assert outbox.close() == 0
    assert store.curve("train/loss") == expected(range(1, 51))


def test_a_batch_has_at_most_1000_points(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    log(outbox, range(1, 1201))
    outbox.close()
    assert flush_folder(tmp_path, store) == 2400
    assert store.batches == [1000, 1000, 400]


def test_points_wait_while_the_store_is_away_and_arrive_when_it_is_back(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    store.down = True
    outbox.start(store, delay_s=0)
    log(outbox, range(1, 11))
    time.sleep(0.2)
    assert store.rows == {}
    assert count_waiting(tmp_path) == 20
    store.down = False
    assert outbox.close(timeout_s=10) == 0
    assert store.curve("train/loss") == expected(range(1, 11))


def test_close_counts_what_still_waits_and_does_not_outstay_its_time(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    store.down = True
    outbox.start(store, delay_s=0)
    log(outbox, range(1, 4))
    started = time.monotonic()
    assert outbox.close(timeout_s=0.3) == 6
    assert time.monotonic() - started < 2


def test_append_never_waits_for_a_store_that_hangs(tmp_path: Path) -> None:
    hang, outbox = threading.Event(), Outbox(tmp_path)

    def send(batch: Sequence[Metric]) -> None:
        hang.wait(30)

    outbox.start(send, delay_s=0)
    started = time.monotonic()
    log(outbox, range(1, 1001))
    assert time.monotonic() - started < 2
    hang.set()
    outbox.close()


def test_steps_repeated_after_a_resume_are_not_sent_again(tmp_path: Path) -> None:
    store, first = Store(), Outbox(tmp_path)
    first.start(store, delay_s=0)
    log(first, range(1, 38))
    first.close()
    resumed = Outbox(tmp_path)  # from the checkpoint at step 30
    resumed.start(store, delay_s=0)
    log(resumed, range(31, 61))
    assert resumed.close() == 0
    assert store.curve("train/loss") == expected(range(1, 61))


def test_two_writers_of_one_folder_make_one_curve(tmp_path: Path) -> None:
    store, cut_off, successor = Store(), Outbox(tmp_path), Outbox(tmp_path)
    log(cut_off, range(1, 11))
    log(successor, range(6, 21))
    log(cut_off, range(11, 31))
    cut_off.close()
    successor.close()
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(1, 31))


def test_a_batch_sent_but_not_noted_is_sent_again_with_the_same_timestamps(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    log(outbox, range(1, 6))
    outbox.close()
    flush_folder(tmp_path, store)
    (tmp_path / "shipped.json").write_text('{"offset": 0, "hig')
    time.sleep(0.01)
    flush_folder(tmp_path, store)
    assert store.batches == [10, 10]
    assert len(store.rows) == 10


def test_a_torn_last_line_is_skipped_and_what_follows_is_kept(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    log(outbox, range(1, 3))
    outbox.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"key": "train/loss", "val')
    assert count_waiting(tmp_path) == 4
    again = Outbox(tmp_path)
    log(again, range(3, 5))
    again.close()
    flush_folder(tmp_path, store)
    assert store.curve("train/loss") == expected(range(1, 5))


def test_a_line_still_being_written_waits_for_its_end(tmp_path: Path) -> None:
    store, line = Store(), '{"key": "train/loss", "value": 1.0, "step": 1, "timestamp_ms": 5}\n'
    with (tmp_path / "metrics.jsonl").open("a") as file:
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_an_error_of_storage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    outbox = Outbox(tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        outbox.append({"train/loss": 1.0}, step=1)


def test_outboxes_are_found_below_a_root(tmp_path: Path) -> None:
    for name in ("b", "a"):
        Outbox(tmp_path / name / "metrics").close()
    assert find_outboxes(tmp_path) == [tmp_path / "a" / "metrics", tmp_path / "b" / "metrics"]


KILLED_WRITER = """
import os, sys, time
from pathlib import Path
from orchestrator.tracking.outbox import Outbox

def send(batch):  # a store that survives: one line a point, and it drops rows it has
    lines = "".join(f"{m.key} {m.step} {m.value} {m.timestamp_ms}\\n" for m in batch)
    os.write(sink, lines.encode())

sink = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

outbox = Outbox(Path(sys.argv[1]))
outbox.start(send, delay_s=0)
for step in range(int(sys.argv[3]), 100_000):
    outbox.append({"train/loss": 1 / step}, step=step)
    print(step, flush=True)
    time.sleep(0.001)
"""


def test_a_writer_killed_in_mid_logging_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    folder, sink = tmp_path / "outbox", tmp_path / "sink"
    last_step = 0
    for _ in range(3):
        resume_at = max(1, last_step - 20)  # as after a checkpoint 20 steps before
        command = [sys.executable, "-c", KILLED_WRITER, str(folder), str(sink), str(resume_at)]
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


def test_the_shipped_note_names_an_offset_at_a_line_end(tmp_path: Path) -> None:
    store, outbox = Store(), Outbox(tmp_path)
    log(outbox, range(1, 4))
    outbox.close()
    flush_folder(tmp_path, store)
    note = json.loads((tmp_path / "shipped.json").read_text())
    assert note["offset"] == (tmp_path / "metrics.jsonl").stat().st_size
    assert note["highest_step"] == {"train/loss": 3, "train/tokens": 3}
