import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_list

from orchestrator.runs.heartbeat import Heartbeat
from orchestrator.runs.job import Progress
from orchestrator.scheduling.control_channel import DriverChannel, WorkerChannel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(request: pytest.FixtureRequest, clock: Clock) -> Iterator[DriverChannel]:
    channel = DriverChannel(f"run-{request.node.name}", clock=clock)
    yield channel
    channel.clear()


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while not (seen := look()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return seen


def test_the_driver_sees_the_newest_progress(driver: DriverChannel) -> None:
    assert driver.progress() is None
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    for step in range(100):
        worker.post(Progress(step=step, steps=100))
    worker.close()
    seen = driver.progress()
    assert seen is not None
    assert seen["step"] == 99


def test_evaluations_arrive_in_order_and_each_once(driver: DriverChannel) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    worker.report(2, {"eval/loss": 1.0})
    assert eventually(lambda: driver.reports(0)) == [(2, {"eval/loss": 1.0})]
    worker.report(4, {"eval/loss": 0.5})
    worker.report(6, {"eval/loss": 0.25})
    worker.close()
    assert driver.reports(1) == [(4, {"eval/loss": 0.5}), (6, {"eval/loss": 0.25})]
    assert driver.reports(3) == []


def test_a_wish_to_stop_reaches_the_worker(driver: DriverChannel) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    assert not worker.stop_requested()
    driver.ask_to_stop()
    eventually(worker.stop_requested)
    worker.close()


def test_it_works_between_processes(driver: DriverChannel) -> None:
    @ray.remote(num_cpus=1)
    def train(key: str) -> bool:
        channel = WorkerChannel(key, heartbeat=Heartbeat())
        channel.post(Progress(step=7, steps=9))
        deadline = time.monotonic() + 20
        while not channel.stop_requested() and time.monotonic() < deadline:
            time.sleep(0.02)
        channel.close()
        return channel.stop_requested()

    stopped = train.remote(driver.key)
    assert eventually(driver.progress)["step"] == 7
    driver.ask_to_stop()
    assert ray.get(stopped)


def test_clearing_leaves_no_key_behind(driver: DriverChannel) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    worker.post(Progress(step=1, steps=2))
    worker.report(1, {"eval/loss": 1.0})
    driver.ask_to_stop()
    worker.close()
    assert len(_internal_kv_list(driver.key, namespace=b"orchestrator")) == 4
    driver.clear()
    assert _internal_kv_list(driver.key, namespace=b"orchestrator") == []


def sightings(driver: DriverChannel, clock: Clock, *, of: int) -> Any:
    """What the driver knows once it has seen a heartbeat of so many ranks."""

    def look() -> Any:
        clock.now_s += 2.0
        seen = driver.heartbeats(of)
        return seen if len(seen) == of else None

    return eventually(look)


def test_the_driver_sees_where_every_rank_is_and_what_it_does(driver: DriverChannel, clock: Clock) -> None:
    heartbeats = [Heartbeat(), Heartbeat()]
    heartbeats[0].enter("computing", 4)
    heartbeats[1].enter("waiting", 4)
    workers = [
        WorkerChannel(driver.key, heartbeat=heartbeat, rank=rank, world_size=2)
        for rank, heartbeat in enumerate(heartbeats)
    ]
    seen = sightings(driver, clock, of=2)
    assert [seen[rank].beat.phase for rank in range(2)] == ["computing", "waiting"]
    assert seen[1].place.rank == 1
    assert seen[1].place.host == socket.gethostname()
    assert seen[1].place.pid == os.getpid()
    assert seen[1].place.node_id == ray.get_runtime_context().get_node_id()
    for worker in workers:
        worker.close()


def test_a_rank_whose_pulse_stops_is_unseen_for_as_long_as_the_driver_looked(
    driver: DriverChannel, clock: Clock
) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    sightings(driver, clock, of=1)
    worker.close()
    before = sightings(driver, clock, of=1)[0]
    for _ in range(10):
        clock.now_s += 1.5
        driver.heartbeats(1)
    assert driver.heartbeats(1)[0].unseen_s == pytest.approx(before.unseen_s + 15.0)
    assert driver.heartbeats(1)[0].still_s == pytest.approx(before.still_s + 15.0)


def test_a_driver_that_was_held_up_itself_does_not_hold_it_against_the_ranks(
    driver: DriverChannel, clock: Clock
) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    sightings(driver, clock, of=1)
    worker.close()
    clock.now_s += 3600
    assert driver.heartbeats(1)[0].unseen_s < 10


def test_a_living_rank_is_seen_again_and_again(driver: DriverChannel, clock: Clock) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat())
    first = sightings(driver, clock, of=1)[0].beat.still_s
    assert eventually(lambda: sightings(driver, clock, of=1)[0].beat.still_s > first)
    assert eventually(lambda: sightings(driver, clock, of=1)[0].unseen_s == 0.0)
    worker.close()


def test_only_rank_0_speaks_for_the_run(driver: DriverChannel) -> None:
    worker = WorkerChannel(driver.key, heartbeat=Heartbeat(), rank=1, world_size=2)
    worker.post(Progress(step=1, steps=2))
    driver.ask_to_stop()
    worker.close()
    assert driver.progress() is None
    assert not worker.stop_requested()
