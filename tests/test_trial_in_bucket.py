"""A trial whose machine does not see the driver's folder: both are folders here, the bucket is a real S3 server's."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import FencedError
from orchestrator.runs.attempts import Attempts
from orchestrator.runs.file_exchange import BucketExchange, begin_life, renew
from orchestrator.runs.job import bucket_of
from orchestrator.scheduling.run_folder import fetch_points, forget, life_of, shared, take_up
from orchestrator.scheduling.search import trial as trials
from orchestrator.scheduling.search.run_search import _Desk, _taken_up
from orchestrator.scheduling.search.trial import (
    Ending,
    Reports,
    TrialTask,
    ending_of,
    forget_failure,
    last_reported_step,
    run_to_its_end,
    trial_main,
)
from orchestrator.tracking.tracker import NoTracker
from tests.end_to_end.runs import wait_until
from tests.s3 import BUCKET
from tests.specs import PRETRAIN, spec
from tests.test_trial import trial_of
from tests.training_runs import pretrain

pytestmark = pytest.mark.slow  # a server, and Ray is imported

SEARCH = {"space": {"training.learning_rate": {"grid": [1e-3, 1e-4]}}, "scheduler": "none"}
POINT = '{"key": "train/loss", "value": 2.0, "step": 2, "timestamp_ms": 1}\n'


def task_on(machine: Path, **changes: Any) -> TrialTask:
    """The trial 00 of a search, as a machine has it: a folder of that name in the machine's home."""
    storage = {"checkpoint__storage": f"s3://{BUCKET}/{machine.parent.name}"}
    job = pretrain(machine / "search" / "trials" / "00", **{**storage, **changes})
    return replace(trial_of(job), life="first")


def exchange_of(task: TrialTask) -> BucketExchange:
    """That of the search, on the task's machine."""
    search = task.folder.parent.parent
    return BucketExchange(search, str(bucket_of(task.prepared.spec, search)))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that Tune is told of, instead of Tune."""
    steps: list[int] = []
    monkeypatch.setattr(trials.tune, "report", lambda report: steps.append(report["training_step"]))
    return steps


def test_before_tune_hears_of_an_evaluation_the_driver_can_see_it_with_its_points(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, driver = task_on(tmp_path / "worker"), task_on(tmp_path / "driver")
    seen: list[int] = []

    def report(_: dict[str, Any]) -> None:
        exchange_of(driver).fetch("trials/*/reports.jsonl", "trials/*/outbox/*")
        seen.append(last_reported_step(driver.folder))

    monkeypatch.setattr(trials.tune, "report", report)
    points = worker.folder / "outbox" / "a0001.00-from-00000000.jsonl"
    points.parent.mkdir()
    points.write_text(POINT)
    Reports(worker).add(2, {"eval/loss": 1.0})
    assert seen == [2]
    assert (driver.folder / "outbox" / points.name).read_text() == POINT


def test_a_trial_begun_anew_on_another_machine_replays_what_it_had_reported(
    s3: Any, tmp_path: Path, told: list[int]
) -> None:
    one, two = task_on(tmp_path / "one"), task_on(tmp_path / "two")
    reports = Reports(one)
    for step in (2, 4):
        reports.add(step, {"eval/loss": 1.0})
    Ending(status="pruned", step=4).write(one.folder)
    reports.exchange.send("ending.json")
    told.clear()
    trial_main({"trial": 0}, tasks=[two])
    assert told == [2, 4]
    assert ending_of(two.folder) == Ending(status="pruned", step=4)


def test_a_failed_trial_is_tried_again_also_where_a_machine_has_kept_how_it_failed(
    s3: Any, tmp_path: Path, told: list[int]
) -> None:
    worker, driver = task_on(tmp_path / "worker"), task_on(tmp_path / "driver")
    begin_life(worker.folder, worker.life)
    Ending(status="failed", step=0, error="why").write(worker.folder)
    Reports(worker).exchange.send("ending.json")
    exchange_of(driver).fetch("trials/*/ending.json")
    assert ending_of(driver.folder) is not None
    for folder in (worker.folder, driver.folder):  # that was some time ago
        os.utime(folder / "ending.json", (1_000_000_000, 1_000_000_000))
    forget_failure(driver, exchange_of(driver))
    trials._arrive(worker)
    assert ending_of(worker.folder) is None


def test_what_a_machine_has_kept_of_a_search_that_was_started_over_does_not_count(s3: Any, tmp_path: Path) -> None:
    run = spec(PRETRAIN, checkpoint__storage=f"s3://{BUCKET}/{tmp_path.name}", search=SEARCH)
    driver, worker = tmp_path / "driver" / "search", tmp_path / "worker" / "search" / "trials" / "00"
    lives = []
    for _ in range(2):
        driver.mkdir(parents=True)
        shared(run, driver)
        lives.append(life_of(driver))
        elsewhere = tmp_path / f"elsewhere-{len(lives)}" / "search"
        take_up(run, elsewhere)
        assert life_of(elsewhere) == lives[-1], "whoever takes it up leads the same life"
        renew(worker, lives[-1])
        (worker / "ending.json").write_text("{}")
        renew(worker, lives[-1])
        assert (worker / "ending.json").exists()
        forget(run, driver)
    assert lives[0] != lives[1]
    renew(worker, lives[1] + "'s next")
    assert not (worker / "ending.json").exists()


def test_a_driver_on_an_empty_machine_takes_up_a_search_with_all_that_its_trials_have_left(
    s3: Any, tmp_path: Path
) -> None:
    worker = task_on(tmp_path / "worker")
    left = ("reports.jsonl", "ending.json", "outcome.json", "model/weights", "outbox/a0001.00-from-00000000.jsonl")
    for name in (*left, "attempts/0001.json", "best/step-00000002.pt", "checkpoints/step-00000002.a1/manifest.json"):
        file = worker.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")
    exchange_of(worker).send("trials")
    (worker.folder.parent.parent / "rungs.json").write_text("{}")
    exchange_of(worker).send("rungs.json")
    search = worker.prepared.spec.model_copy(update={"search": spec(PRETRAIN, search=SEARCH).search})
    folder = tmp_path / "driver" / "search"
    take_up(search, folder)
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found == {"rungs.json", "bucket.json", *(f"trials/00/{name}" for name in (*left, "attempts/0001.json"))}


def test_flush_looks_for_points_of_trials_too(s3: Any, tmp_path: Path) -> None:
    worker = task_on(tmp_path / "worker")
    points = worker.folder / "outbox" / "a0001.00-from-00000000.jsonl"
    points.parent.mkdir()
    points.write_text(POINT)
    Reports(worker).exchange.send("outbox")
    driver = tmp_path / "driver" / "search"
    driver.mkdir(parents=True)
    shared(worker.prepared.spec, driver)
    fetch_points(driver)
    assert (driver / "trials" / "00" / "outbox" / points.name).read_text() == POINT


# -- the driver ------------------------------------------------------------------------------------------------------


def desk_of(task: TrialTask, said: list[str]) -> _Desk:
    """The driver's side of a search of one trial that is not tracked."""
    exchange = exchange_of(task)
    fence = _taken_up(task.folder.parent.parent, exchange)
    return _Desk([task], NoTracker(), exchange, fence, said.append, task.prepared.spec.goal)


TRIAL = SimpleNamespace(config={"trial": 0})
"""What Tune calls it."""


def test_the_driver_learns_from_the_bucket_how_a_trial_ended(s3: Any, tmp_path: Path) -> None:
    worker, driver, said = task_on(tmp_path / "worker"), task_on(tmp_path / "driver"), list[str]()
    Ending(status="failed", step=3, error="why").write(worker.folder)
    Attempts(worker.folder, Reports(worker).exchange).open(workers=1, cause="first start")
    Reports(worker).exchange.send("ending.json")
    desk_of(driver, said).on_trial_complete(0, [], TRIAL)
    assert said == ["trial 00 failed at step 3 (1 of 1)"]
    assert Attempts(driver.folder).newest() == 1


def test_that_a_trial_was_taken_away_is_known_to_whichever_machine_asks(
    s3: Any, tmp_path: Path, told: list[int]
) -> None:
    worker, driver, another = (task_on(tmp_path / name) for name in ("worker", "driver", "another"))
    said: list[str] = []
    for step in (2, 4):
        Reports(worker).add(step, {"eval/loss": 1.0})
    desk_of(driver, said).on_trial_complete(0, [], TRIAL)
    assert said == ["trial 00 pruned at step 4 (1 of 1)"]
    trials._arrive(another)
    assert ending_of(another.folder) == Ending(status="pruned", step=4)


def test_a_driver_whose_search_another_has_taken_up_begins_no_trial_and_says_of_none_how_it_ended(
    s3: Any, tmp_path: Path
) -> None:
    one, two = task_on(tmp_path / "one"), task_on(tmp_path / "two")
    old = desk_of(one, [])
    old.on_trial_start(0, [], TRIAL)
    desk_of(two, [])
    for call in (old.on_trial_start, old.on_trial_complete):
        with pytest.raises(FencedError, match="taken this run over"):
            call(0, [], TRIAL)
    assert ending_of(one.folder) is None


# -- processes -------------------------------------------------------------------------------------------------------


def run_trial(task: TrialTask, report_s: float) -> None:
    """What a trial's process does, with Tune taking so long to hear a report."""
    trials.tune.report = lambda report: time.sleep(report_s)
    trials._arrive(task)
    run_to_its_end(task, Reports(task))


def started(task: TrialTask, *, report_s: float = 0.0) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=run_trial, args=(task, report_s))
    process.start()
    return process


def objects(s3: Any, tmp_path: Path) -> dict[str, str]:
    """Everything in the search's prefix, by name, with what it is known by."""
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{tmp_path.name}/search/").get("Contents", ())
    return {each["Key"]: each["ETag"] for each in found if not each["Key"].endswith("/")}


def test_a_cut_off_process_that_comes_back_writes_nothing_over_what_another_machine_wrote(
    s3: Any, tmp_path: Path
) -> None:
    changes = {"training__steps": 40, "training__eval_every_steps": 8, "checkpoint__every_steps": 7}
    one, two, driver = (task_on(tmp_path / name, **changes) for name in ("one", "two", "driver"))
    old = started(one, report_s=6.0)

    def is_seen() -> bool:
        exchange_of(driver).fetch("trials/00/reports.jsonl")
        is_saved = any(name.endswith("/manifest.json") for name in objects(s3, tmp_path))
        return is_saved and last_reported_step(driver.folder) >= 8

    try:
        wait_until(is_seen, within_s=200)
        time.sleep(2)  # what is on its way when it is stopped would arrive: a window of one upload
        os.kill(old.pid or 0, signal.SIGSTOP)
        new = started(two)
        new.join(200)
        assert new.exitcode == 0
        before = objects(s3, tmp_path)
        os.kill(old.pid or 0, signal.SIGCONT)
        old.join(60)
        assert old.exitcode == 0
    finally:
        old.kill()
    after = objects(s3, tmp_path)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    own = {name for name in changed if re.search(r"/checkpoints/step-\d+\.a1/|/outbox/a0001\.", name)}
    assert changed == own, "what has its attempt's number in its name, which counts no more"
    exchange_of(driver).fetch(*(f"trials/00/{part}" for part in ("ending.json", "reports.jsonl", "attempts", "model")))
    ending = ending_of(driver.folder)
    assert ending is not None
    assert (ending.status, ending.step) == ("finished", 40), ending.error
    steps = [json.loads(line)["step"] for line in (driver.folder / "reports.jsonl").read_text().splitlines()]
    assert steps == list(range(8, 41, 8)), "each evaluation once"
    resumed = Attempts(driver.folder).resumed_step(2)
    assert resumed is not None
    assert resumed >= 3, "from a checkpoint"
    assert set(Attempts(driver.folder).told()) == {1, 2}
    assert (driver.folder / "model" / "model.safetensors").is_file()
