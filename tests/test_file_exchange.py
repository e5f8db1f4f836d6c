"""Machines that see no common folder, each a folder here; the bucket between them is a real S3 server's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.verify_resume import read_points
from orchestrator.errors import FencedError, StorageError
from orchestrator.runs import file_exchange as exchanges
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.file_exchange import BucketExchange, CommonFolder, following
from tests import training_runs
from tests.s3 import BUCKET

pytestmark = pytest.mark.slow  # a server

Machine = Callable[[str], BucketExchange]


@pytest.fixture
def machine(s3: Any, tmp_path: Path) -> Machine:
    """A machine's part in the exchange, by the machine's name."""
    return lambda name: BucketExchange(tmp_path / name, f"s3://{BUCKET}/{tmp_path.name}/run")


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def keys(s3: Any, tmp_path: Path) -> list[str]:
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{tmp_path.name}/").get("Contents", ())
    names = (each["Key"].removeprefix(f"{tmp_path.name}/run/") for each in found)
    return sorted(name for name in names if name and not name.endswith("/"))  # pyarrow leaves the folder above


def test_what_one_machine_sends_the_others_fetch_and_drafts_stay_at_home(machine: Machine, tmp_path: Path) -> None:
    for name in ("rewinds.json", "model/config.json", "model/parts/weights", "model/.draft", "other.json"):
        write(tmp_path / "worker" / name, name)
    machine("worker").send("rewinds.json", "model", "missing.json", "missing")
    machine("driver").fetch("rewinds.json", "model", "missing.json", "missing")
    there = {str(path.relative_to(tmp_path / "driver")): path for path in (tmp_path / "driver").rglob("*")}
    assert {name for name, path in there.items() if path.is_file()} == {
        "rewinds.json",
        "model/config.json",
        "model/parts/weights",
    }
    assert there["model/parts/weights"].read_text() == "model/parts/weights"


def test_of_files_that_a_pattern_does_not_fit_nothing_leaves_the_machine(
    machine: Machine, s3: Any, tmp_path: Path
) -> None:
    for name in ("a0001.00-from-00000000.jsonl", "desired.json", "totals.jsonl"):
        write(tmp_path / "worker" / "outbox" / name, "{}\n")
    machine("worker").send("outbox/a*.jsonl")
    assert keys(s3, tmp_path) == ["outbox/a0001.00-from-00000000.jsonl"]


def test_what_is_removed_is_gone_here_and_for_the_others(machine: Machine, s3: Any, tmp_path: Path) -> None:
    for name in ("best/step-00000002.pt", "best/step-00000004.pt", "other.json"):
        write(tmp_path / "worker" / name, name)
    worker = machine("worker")
    worker.send("best", "other.json")
    worker.remove("best/step-00000002.pt")
    assert keys(s3, tmp_path) == ["best/step-00000004.pt", "other.json"]
    worker.remove("best")
    worker.remove("missing")
    assert keys(s3, tmp_path) == ["other.json"]
    assert [path.name for path in (tmp_path / "worker").iterdir()] == ["other.json"]
    write(tmp_path / "worker/best/step-00000004.pt", "again")
    worker.send("best")
    assert "best/step-00000004.pt" in keys(s3, tmp_path), "that it was sent before is forgotten"


def test_a_file_that_grows_is_never_replaced_by_a_shorter_copy(machine: Machine, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "worker/outbox/a.jsonl", tmp_path / "driver/outbox/a.jsonl"
    worker, driver = machine("worker"), machine("driver")
    write(mine, "1\n")
    worker.send("outbox")
    write(mine, "1\n2\n")
    worker.fetch("outbox")
    assert mine.read_text() == "1\n2\n", "its writer is ahead of the bucket"
    driver.fetch("outbox")
    assert theirs.read_text() == "1\n"
    worker.send("outbox")
    driver.fetch("outbox")
    assert theirs.read_text() == "1\n2\n"


def test_the_newer_of_two_copies_stands_whoever_wrote_it(machine: Machine, tmp_path: Path) -> None:
    worker, driver = machine("worker"), machine("driver")
    mine, theirs = tmp_path / "worker/ledger/run.entry", tmp_path / "driver/ledger/run.entry"
    write(theirs, "stale")
    os.utime(theirs, (1_000_000_000, 1_000_000_000))
    write(mine, "by the worker")
    worker.send("ledger")
    driver.fetch("ledger")
    assert theirs.read_text() == "by the worker"
    write(theirs, "settled")
    os.utime(theirs, (time.time() + 5, time.time() + 5))  # S3 tells whole seconds
    driver.fetch("ledger")
    assert theirs.read_text() == "settled"


def test_what_has_not_changed_moves_once(machine: Machine, s3: Any, tmp_path: Path) -> None:
    worker, driver = machine("worker"), machine("driver")
    write(tmp_path / "worker/attempts/0001.json", "{}")
    worker.send("attempts")
    driver.fetch("attempts")
    (tmp_path / "driver/attempts/0001.json").unlink()
    driver.fetch("attempts")
    assert not (tmp_path / "driver/attempts/0001.json").exists()
    s3.delete_object(Bucket=BUCKET, Key=f"{tmp_path.name}/run/attempts/0001.json")
    worker.send("attempts")
    assert keys(s3, tmp_path) == []


def test_a_machine_that_has_sent_a_file_does_not_fetch_it(machine: Machine, tmp_path: Path) -> None:
    weights = tmp_path / "both" / "model" / "weights"
    write(weights, "large")
    os.utime(weights, (1_000_000_000, 1_000_000_000))
    machine("both").send("model")
    before = weights.stat().st_ino
    machine("both").fetch("model")  # as the driver does, where rank 0 was on its machine
    assert weights.stat().st_ino == before


def test_a_forgotten_run_leaves_nothing_in_the_bucket_and_its_neighbours_alone(
    machine: Machine, s3: Any, tmp_path: Path
) -> None:
    for run in ("run", "run-2"):
        for name in ("attempts/0001.json", "checkpoints/step-00000010.a1/manifest.json"):
            s3.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{run}/{name}", Body=b"{}")
    machine("driver").forget()
    machine("driver").forget()  # also where there is nothing
    left = [key for key in keys(s3, tmp_path) if not key.endswith("/")]  # an empty object stands for the folder above
    assert len(left) == 2
    assert all("/run-2/" in key for key in left)


def test_a_bucket_that_does_not_answer_is_a_storage_error_with_the_remedy(s3: Any, tmp_path: Path) -> None:
    nowhere = BucketExchange(tmp_path, f"s3://no-such-{BUCKET}/run")
    write(tmp_path / "attempts/0001.json", "{}")
    with pytest.raises(StorageError, match=rf"(?s)no-such-{BUCKET}.*checkpoint.storage"):
        nowhere.send("attempts")


def test_whoever_was_fenced_out_while_the_bucket_was_away_writes_over_nothing(
    machine: Machine, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        write(tmp_path / name / "ending.json", name)
    uploaded, fenced = exchanges.upload, threading.Event()

    def away_once(*args: Any) -> None:
        if not fenced.is_set():
            fenced.set()
            monkeypatch.setattr(exchanges, "upload", uploaded)
            machine("new").send("ending.json")
            raise OSError("the bucket is away")
        uploaded(*args)

    monkeypatch.setattr(exchanges, "upload", away_once)
    machine("old").send("ending.json", patience_s=20, may_send=lambda: not fenced.is_set())
    assert fenced.is_set()
    machine("driver").fetch("ending.json")
    assert (tmp_path / "driver" / "ending.json").read_text() == "new"


def test_a_file_that_is_replaced_while_it_is_fetched_arrives_whole(
    machine: Machine, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, download = tmp_path / "worker" / "attempts" / "0001.told.json", exchanges.download
    worker, driver, later = machine("worker"), machine("driver"), ["[1, 2, 3]", "[]"]
    write(file, "[1]")
    worker.send("attempts")

    def replaced_meanwhile(files: Any, key: str, target: Path) -> None:
        with files.open_input_stream(key) as stream:
            if later:
                write(file, later.pop(0))
                worker.send("attempts")
            target.write_bytes(stream.read())

    monkeypatch.setattr(exchanges, "download", replaced_meanwhile)
    driver.fetch("attempts")
    assert (tmp_path / "driver" / "attempts" / "0001.told.json").read_text() == "[]"
    monkeypatch.setattr(exchanges, "download", download)


def test_patterns_fit_part_by_part_and_fetch_nothing_else(machine: Machine, tmp_path: Path) -> None:
    names = (
        "trials/00/ending.json",
        "trials/01/ending.json",
        "trials/00/model/ending.json",
        "trials/00/outbox/a1.jsonl",
    )
    for name in (*names, "trials/00/outbox/handle.json", "ending.json"):
        write(tmp_path / "worker" / name, name)
    machine("worker").send("trials", "ending.json")
    machine("driver").fetch("trials/*/ending.json", "trials/*/outbox/a*.jsonl", "none/*/ending.json")
    there = {str(file.relative_to(tmp_path / "driver")) for file in (tmp_path / "driver").rglob("*.json*")}
    assert there == {names[0], names[1], names[3]}


def test_a_follower_shows_and_sees_what_is_written_meanwhile_and_outlives_an_outage(
    machine: Machine, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchanges, "PERIOD_S", 0.05)
    worker, driver = machine("worker"), machine("driver")
    fails = threading.Event()
    fails.set()
    send = worker.send

    def failing_send(*parts: str, may_send: Callable[[], bool]) -> None:
        if fails.is_set():
            raise StorageError("the bucket is away")
        send(*parts, may_send=may_send)

    monkeypatch.setattr(worker, "send", failing_send)
    write(tmp_path / "worker/outbox/a.jsonl", "1\n")
    with following(worker, send=("outbox",)), following(driver, fetch=("outbox",)):
        time.sleep(0.3)
        assert not (tmp_path / "driver/outbox").exists()
        fails.clear()
        deadline = time.monotonic() + 20
        while not (tmp_path / "driver/outbox/a.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    write(tmp_path / "worker/outbox/b.jsonl", "2\n")
    with following(worker, send=("outbox",), may_send=lambda: False):
        time.sleep(0.3)
    driver.fetch("outbox")
    assert not (tmp_path / "driver/outbox/b.jsonl").exists(), "one that was fenced out shows nothing any more"
    with following(CommonFolder(tmp_path), send=("outbox",)):
        assert "exchange" not in {thread.name for thread in threading.enumerate()}


# -- attempts of machines that see no common folder ------------------------------------------------------------------


def test_a_worker_elsewhere_sees_its_attempt_and_is_fenced_out_by_the_next(machine: Machine, tmp_path: Path) -> None:
    driver = Attempts(tmp_path / "driver", machine("driver"))
    worker = Attempts(tmp_path / "worker", machine("worker"))
    first = driver.open(workers=2, cause="first start")
    worker.check_seen(first, within_s=0)
    fence = worker.fence(first)
    assert fence.holds(now=True)
    driver.open(workers=1, cause="a node was lost", after=first)
    assert not fence.holds(now=True)


def test_what_rank_0_went_on_from_is_known_to_the_driver_and_to_the_next_rank_0(
    machine: Machine, tmp_path: Path
) -> None:
    driver = Attempts(tmp_path / "driver", machine("driver"))
    driver.open(workers=2, cause="first start")
    second = driver.open(workers=2, cause="a worker died")
    Attempts(tmp_path / "worker", machine("worker")).note_resumed(second, 30)
    driver.refresh()
    assert driver.resumed_step(second) == 30
    another = Attempts(tmp_path / "another", machine("another"))
    another.refresh()
    assert [another.is_void(1, step) for step in (30, 31)] == [False, True]


def test_of_two_machines_that_take_a_run_up_at_the_same_moment_one_is_told_so(machine: Machine, tmp_path: Path) -> None:
    """Both have looked, both have seen nothing, and both write attempt 1."""
    both_looked = threading.Barrier(2)
    outcomes: list[int | str] = []

    def take_up(name: str) -> None:
        attempts = Attempts(tmp_path / name, machine(name))
        newest = attempts.newest
        attempts.newest = lambda: (newest(), both_looked.wait(20))[0]  # type: ignore[method-assign]
        try:
            outcomes.append(attempts.open(workers=1, cause="first start"))
        except FencedError as error:
            outcomes.append(error.what)

    threads = [threading.Thread(target=take_up, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, outcomes)) == ["1", "another command has taken this run over"]


# -- a training whose machines see no common folder ------------------------------------------------------------------


def test_a_training_that_loses_its_machine_goes_on_elsewhere_with_every_step_once(
    machine: Machine, s3: Any, tmp_path: Path
) -> None:
    length = {"training__steps": 30, "checkpoint__every_steps": 2}
    changes = {**length, "checkpoint__storage": f"s3://{BUCKET}/{tmp_path.name}"}
    whole = training_runs.pretrain(tmp_path / "whole", **length)
    training_runs.run(whole)
    driver = Attempts(tmp_path / "driver", machine("driver"))

    def attempt(name: str, **events: int) -> None:
        """In a process on a machine of its own."""
        job = training_runs.pretrain(tmp_path / name / "run", **changes)
        uri = f"s3://{BUCKET}/{tmp_path.name}/run"
        group = training_runs.Workers(1)
        try:
            group.run(
                replace(job, attempt=driver.open(workers=1, cause="x"), exchanged_at=uri),
                training_runs.Events(**events),
            )
        finally:
            group.end()

    with pytest.raises(training_runs.WorkerDied):
        attempt("one", kill_at=27)
    driver.refresh()
    machine("driver").fetch("outbox")
    saved = max(int(key.split("step-")[1][:8]) for key in keys(s3, tmp_path) if key.endswith("manifest.json"))
    assert 2 <= saved <= 26, "the last ones were still on their way, or not"
    assert set(range(1, saved + 1)) <= set(losses(tmp_path / "driver")), "a checkpoint comes after its points"

    attempt("two")
    driver.refresh()
    assert driver.resumed_step(2) == saved
    machine("driver").fetch("outbox", "model", "outcome.json")
    assert list(losses(tmp_path / "driver").values()) == training_runs.curve(whole)
    assert (tmp_path / "driver" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "driver" / "outcome.json").is_file()


def losses(run_folder: Path) -> dict[int, float]:
    """By step, as it was taken last."""
    return {step: value for step, key, value in read_points(run_folder) if key == "train/loss"}
