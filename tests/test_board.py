import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_list

from orchestrator.scheduling.board import DriverBoard, WorkerBoard
from orchestrator.training.job import Progress

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def driver(request: pytest.FixtureRequest) -> Iterator[DriverBoard]:
    board = DriverBoard(f"run-{request.node.name}")
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
    worker = WorkerBoard(driver.key)
    for step in range(100):
        worker.post(Progress(step=step, steps=100))
    worker.close()
    seen = driver.progress()
    assert seen is not None
    assert seen["step"] == 99


def test_evaluations_arrive_in_order_and_each_once(driver: DriverBoard) -> None:
    worker = WorkerBoard(driver.key)
    worker.report(2, {"eval/loss": 1.0})
    assert eventually(lambda: driver.reports(0)) == [(2, {"eval/loss": 1.0})]
    worker.report(4, {"eval/loss": 0.5})
    worker.report(6, {"eval/loss": 0.25})
    worker.close()
    assert driver.reports(1) == [(4, {"eval/loss": 0.5}), (6, {"eval/loss": 0.25})]
    assert driver.reports(3) == []


def test_a_wish_to_stop_reaches_the_worker(driver: DriverBoard) -> None:
    worker = WorkerBoard(driver.key)
    assert not worker.stop_requested()
    driver.ask_to_stop()
    eventually(worker.stop_requested)
    worker.close()


def test_it_works_between_processes(driver: DriverBoard) -> None:
    @ray.remote(num_cpus=1)
    def train(key: str) -> bool:
        board = WorkerBoard(key)
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
    worker = WorkerBoard(driver.key)
    worker.post(Progress(step=1, steps=2))
    worker.report(1, {"eval/loss": 1.0})
    driver.ask_to_stop()
    worker.close()
    assert len(_internal_kv_list(driver.key, namespace=b"orchestrator")) == 3
    driver.clear()
    assert _internal_kv_list(driver.key, namespace=b"orchestrator") == []
