from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest

from orchestrator.runs.heartbeat import Heartbeat, posting_period_s
from orchestrator.worker.forward_timer import ForwardTimer, collectives_begun


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_new_pulse_is_starting() -> None:
    beat = Heartbeat().beat()
    assert (beat.phase, beat.step, beat.collectives) == ("starting", 0, 0)
    assert beat.usual_step_s is None
    assert beat.own_low_s is None


def test_a_rank_stands_still_from_its_mark_on(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    heartbeat.enter("waiting", 3)
    heartbeat.beat()
    clock.now_s += 2
    heartbeat.beat()
    clock.now_s += 3
    beat = heartbeat.beat()
    assert (beat.phase, beat.step, beat.still_s) == ("waiting", 3, 5.0)


def test_the_same_phase_entered_again_is_a_movement(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    for _ in range(3):
        heartbeat.enter("evaluating", 3)
        heartbeat.beat()
        clock.now_s += 4
    assert heartbeat.beat().still_s == 4.0


def test_a_collective_that_was_begun_is_a_movement(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    begun = [7]
    heartbeat.count(lambda: begun[0])
    heartbeat.beat()
    clock.now_s += 4
    assert heartbeat.beat().still_s == 4.0
    begun[0] = 8
    beat = heartbeat.beat()
    assert (beat.still_s, beat.collectives) == (0.0, 8)


def test_a_process_that_was_stopped_does_not_count_all_of_it_as_standstill(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    heartbeat.beat()
    clock.now_s += 3600
    assert heartbeat.beat().still_s < 60


def test_the_usual_step_is_the_median_and_leaves_out_a_pause(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    heartbeat.enter("computing", 0)
    assert heartbeat.beat().usual_step_s is None
    for step, seconds in enumerate([2.0, 2.0, 50.0, 3.0], start=1):
        clock.now_s += seconds
        heartbeat.enter("computing", step)
    assert heartbeat.beat().usual_step_s == 2.5


def test_steps_taken_again_after_a_rewind_are_not_timed_across_it(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    for step, seconds in [(5, 0.0), (6, 1.0), (2, 40.0)]:
        clock.now_s += seconds
        heartbeat.enter("computing", step)
    assert heartbeat.beat().usual_step_s == 1.0


def test_own_work_is_known_after_sixteen_stretches_as_what_most_of_them_took(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    for stretch in range(16):
        assert heartbeat.beat().own_low_s is None
        clock.now_s += 1.0
        heartbeat.computed(float(stretch))
    assert (heartbeat.beat().own_low_s, heartbeat.beat().own_high_s) == (4.0, 11.0)
    clock.now_s += 1.0
    heartbeat.computed(500.0)
    assert (heartbeat.beat().own_low_s, heartbeat.beat().own_high_s) == (5.0, 12.0)


def test_short_steps_are_averaged_over_a_second(clock: Clock) -> None:
    heartbeat = Heartbeat(clock=clock)
    for _ in range(16 * 10):
        clock.now_s += 0.1000001
        heartbeat.computed(0.04)
    assert heartbeat.beat().own_low_s == pytest.approx(0.04)


def test_a_mark_costs_less_than_a_microsecond() -> None:
    heartbeat, steps = Heartbeat(), itertools.count()
    rounds = timeit.repeat(lambda: heartbeat.enter("waiting", next(steps)), number=1000, repeat=20)
    assert min(rounds) / 1000 < 1e-6


def test_all_ranks_together_post_at_most_a_hundred_times_a_second() -> None:
    for world_size in (1, 2, 100, 512, 4096):
        assert world_size / posting_period_s(world_size) <= 100.001
    assert posting_period_s(2) == 1.0


# -- two real processes under DeepSpeed -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_slow_rank_shows_in_its_own_work_and_a_stuck_one_in_its_collectives_though_zero_3_couples_them() -> None:
    with Ranks() as ranks:
        ranks.wait_until(lambda beats: all(beat["usual_step_s"] for beat in beats))
        with ranks.slowed(1, stopped_share=0.7):
            first, second = ranks.wait_until(lambda beats: all(beat["own_low_s"] for beat in beats))
        assert second["own_low_s"] > 1.5 * first["own_low_s"]
        assert second["usual_step_s"] == pytest.approx(first["usual_step_s"], rel=0.2)

        ranks.hold_up(1)
        first, second = ranks.wait_until(lambda beats: all(beat["still_s"] > 2 for beat in beats))
        assert first["step"] == second["step"]
        assert first["collectives"] > second["collectives"] > 0


class Ranks:
    """Two processes that train a few large layers under ZeRO-3 and send what their heartbeats say."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_train, args=(there, rank, port), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def wait_until(self, seen: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The first beats of both for which `seen` holds."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            beats = [pipe.recv() for pipe in self._pipes]
            if seen(beats):
                return beats
        raise AssertionError("never seen")

    @contextmanager
    def slowed(self, rank: int, *, stopped_share: float) -> Iterator[None]:
        """Stops a rank for a share of every 20 ms."""
        over = threading.Event()

        def brake() -> None:
            while not over.is_set():
                os.kill(self._processes[rank].pid, signal.SIGSTOP)
                time.sleep(0.02 * stopped_share)
                os.kill(self._processes[rank].pid, signal.SIGCONT)
                time.sleep(0.02 * (1 - stopped_share))

        thread = threading.Thread(target=brake, daemon=True)
        thread.start()
        yield
        over.set()
        thread.join()

    def hold_up(self, rank: int) -> None:
        """From its next step on it sleeps."""
        self._pipes[rank].send("sleep")


def _train(pipe: Connection, rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    os.environ.update(GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(6)])
    config = {
        "train_micro_batch_size_per_gpu": 128,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    heartbeat, timer = Heartbeat(), ForwardTimer(engine.module, on_gpu=False)
    heartbeat.count(collectives_begun)

    def tell() -> None:
        while True:
            pipe.send(vars(heartbeat.beat()))
            time.sleep(0.25)

    threading.Thread(target=tell, daemon=True).start()
    for step in itertools.count():
        heartbeat.enter("computing", step)
        if pipe.poll():
            time.sleep(3600)
        with timer.running():
            loss = engine(torch.randn(128, 512)).square().mean()
        engine.backward(loss)
        engine.step()
        heartbeat.computed(timer.seconds())
