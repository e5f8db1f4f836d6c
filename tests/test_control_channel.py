import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_list

from orchestrator.runs.heartbeat import Pulse
from orchestrator.runs.job import Progress
from orchestrator.scheduling.control_channel import DriverBoard, WorkerBoard

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
def driver(request: pytest.FixtureRequest, clock: Clock) -> Iterator[DriverBoard]:
    board = DriverBoard(f"run-{request.node.name}", clock=clock)
    yield board
    board.clear()


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while not (seen := look()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return seen


def test_the_driver_sees_the_newest_progress(driver: DriverBoard) -> None:
    assert driver.progress() is None
    worker = WorkerBoard(driver.key, pulse=Pulse())
    for step in range(100):
        worker.post(Progress(step=step, steps=100))
    worker.close()
    seen = driver.progress()
    assert seen is not None
    assert seen["step"] == 99


def test_evaluations_arrive_in_order_and_each_once(driver: DriverBoard) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse())
    worker.report(2, {"eval/loss": 1.0})
    assert eventually(lambda: driver.reports(0)) == [(2, {"eval/loss": 1.0})]
    worker.report(4, {"eval/loss": 0.5})
    worker.report(6, {"eval/loss": 0.25})
    worker.close()
    assert driver.reports(1) == [(4, {"eval/loss": 0.5}), (6, {"eval/loss": 0.25})]
    assert driver.reports(3) == []


def test_a_wish_to_stop_reaches_the_worker(driver: DriverBoard) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse())
    assert not worker.stop_requested()
    driver.ask_to_stop()
    eventually(worker.stop_requested)
    worker.close()


def test_it_works_between_processes(driver: DriverBoard) -> None:
    @ray.remote(num_cpus=1)
    def train(key: str) -> bool:
        board = WorkerBoard(key, pulse=Pulse())
        board.post(Progress(step=7, steps=9))
        deadline = time.monotonic() + 20
        while not board.stop_requested() and time.monotonic() < deadline:
            time.sleep(0.02)
        board.close()
        return board.stop_requested()

    stopped = train.remote(driver.key)
    assert eventually(driver.progress)["step"] == 7
    driver.ask_to_stop()
    assert ray.get(stopped)


def test_clearing_leaves_no_key_behind(driver: DriverBoard) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse())
    worker.post(Progress(step=1, steps=2))
    worker.report(1, {"eval/loss": 1.0})
    driver.ask_to_stop()
    worker.close()
    assert len(_internal_kv_list(driver.key, namespace=b"orchestrator")) == 4
    driver.clear()
    assert _internal_kv_list(driver.key, namespace=b"orchestrator") == []


def sightings(driver: DriverBoard, clock: Clock, *, of: int) -> Any:
    """What the driver knows once it has seen a pulse of so many ranks."""

    def look() -> Any:
        clock.now_s += 2.0
        seen = driver.pulses(of)
        return seen if len(seen) == of else None

    return eventually(look)


def test_the_driver_sees_where_every_rank_is_and_what_it_does(driver: DriverBoard, clock: Clock) -> None:
    pulses = [Pulse(), Pulse()]
    pulses[0].enter("computing", 4)
    pulses[1].enter("waiting", 4)
    workers = [WorkerBoard(driver.key, pulse=pulse, rank=rank, world_size=2) for rank, pulse in enumerate(pulses)]
    seen = sightings(driver, clock, of=2)
    assert [seen[rank].beat.phase for rank in range(2)] == ["computing", "waiting"]
    assert seen[1].place.rank == 1
    assert seen[1].place.host == socket.gethostname()
    assert seen[1].place.pid == os.getpid()
    assert seen[1].place.node_id == ray.get_runtime_context().get_node_id()
    for worker in workers:
        worker.close()


def test_a_rank_whose_pulse_stops_is_unseen_for_as_long_as_the_driver_looked(driver: DriverBoard, clock: Clock) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse())
    sightings(driver, clock, of=1)
    worker.close()
    before = sightings(driver, clock, of=1)[0]
    for _ in range(10):
        clock.now_s += 1.5
        driver.pulses(1)
    assert driver.pulses(1)[0].unseen_s == pytest.approx(before.unseen_s + 15.0)
    assert driver.pulses(1)[0].still_s == pytest.approx(before.still_s + 15.0)


def test_a_driver_that_was_held_up_itself_does_not_hold_it_against_the_ranks(driver: DriverBoard, clock: Clock) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse())
    sightings(driver, clock, of=1)
    worker.close()
    clock.now_s += 3600
    assert driver.pulses(1)[0].unseen_s < 10


def test_a_living_rank_is_seen_again_and_again(driver: DriverBoard, clock: Clock) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse())
    first = sightings(driver, clock, of=1)[0].beat.still_s
    assert eventually(lambda: sightings(driver, clock, of=1)[0].beat.still_s > first)
    assert eventually(lambda: sightings(driver, clock, of=1)[0].unseen_s == 0.0)
    worker.close()


def test_only_rank_0_speaks_for_the_run(driver: DriverBoard) -> None:
    worker = WorkerBoard(driver.key, pulse=Pulse(), rank=1, world_size=2)
    worker.post(Progress(step=1, steps=2))
    driver.ask_to_stop()
    worker.close()
    assert driver.progress() is None
    assert not worker.stop_requested()
