"""What surviving takes: a restart after a killed worker against the job started anew, and all guards of one step.

Both ways go on from a checkpoint of the same run, under the real command in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SPEC = "configs/pretrain/demo.yaml"
STEPS, SAVE_EVERY = 200, 5
PATIENCE_S = 240.0


def restarts(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds from a killed worker to the first step of the next attempt, and from a new command to its first step."""
    in_place, anew = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="bench-") as home:
            outbox = _Outbox(Path(home))
            first = _start(home)
            try:
                outbox.wait_for(attempt=1, steps=2 * SAVE_EVERY + 2)
                killed = time.time()
                _worker(home).send_signal(signal.SIGKILL)
                in_place.append(outbox.first_step_s(attempt=2) - killed)
                outbox.wait_for(attempt=2, steps=SAVE_EVERY + 2)
            finally:
                _end(first, home)
            started = time.time()
            second = _start(home)
            try:
                anew.append(outbox.first_step_s(attempt=3) - started)
            finally:
                _end(second, home)
    return in_place, anew


def guards_s() -> float:
    """Seconds that one step spends on the drain flag, the spike check, the heartbeat, the work timer and the fence."""
    import torch

    from orchestrator.runs.attempts import Attempts
    from orchestrator.runs.heartbeat import Heartbeat
    from orchestrator.worker.divergence_guard import DivergenceGuard
    from orchestrator.worker.forward_timer import ForwardTimer

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        attempts = Attempts(Path(folder))
        fence = attempts.fence(attempts.open(workers=2, cause="first start"))
        guard, heartbeat, step = DivergenceGuard(samples_per_step=32), Heartbeat(), iter(range(10**9))
        module = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(8)))
        inputs = torch.zeros(1, 1)
        timer = ForwardTimer(module, on_gpu=False)

        def guarded() -> None:
            number = next(step)
            heartbeat.enter("computing", number)
            with timer.running():
                module(inputs)
            heartbeat.enter("waiting", number)
            fence.holds()
            guard.judge(number, loss=3.0 + 0.01 * (number % 7), grad_norm=1.0)
            heartbeat.computed(timer.seconds())
            fence.holds()

        watched = _typical_s(guarded)
        timer.close()
        return watched - _typical_s(lambda: module(inputs))


def _typical_s(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(2000):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.fmean(sorted(taken)[: -len(taken) // 100])  # without what the scheduler took


def _start(home: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator", "run", SPEC, "training.tokens=null", f"training.steps={STEPS}"]
    changes = [f"checkpoint.every_steps={SAVE_EVERY}", "training.eval_every_steps=null", "tracking.enabled=false"]
    return subprocess.Popen(
        [*command, *changes, "data.max_validation_examples=1"],
        env={**os.environ, "ORCHESTRATOR_HOME": home},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _family(home: str) -> list[psutil.Process]:
    """Every process that has this state folder in its environment: the command, its Ray and its workers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ORCHESTRATOR_HOME") == home:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _worker(home: str) -> psutil.Process:
    return next(process for process in _family(home) if "RayTrainWorker" in " ".join(process.cmdline()[:1]))


def _end(command: subprocess.Popen[bytes], home: str) -> None:
    command.kill()
    command.wait()
    for process in _family(home):
        process.kill()


class _Outbox:
    """The points files of the one run below a state folder."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def first_step_s(self, *, attempt: int) -> float:
        """Unix time of an attempt's first step."""
        return self.wait_for(attempt=attempt, steps=1)[0]

    def wait_for(self, *, attempt: int, steps: int) -> list[float]:
        """Unix times of an attempt's steps, once there are so many."""
        deadline = time.monotonic() + PATIENCE_S
        while len(times := self._times(attempt)) < steps:
            assert time.monotonic() < deadline, f"attempt {attempt} has not taken {steps} steps"
            time.sleep(0.1)
        return times

    def _times(self, attempt: int) -> list[float]:
        lines = [
            line
            for file in self._home.glob(f"runs/*/outbox/a{attempt:04d}.*.jsonl")
            for line in file.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        points = map(json.loads, lines)
        return [point["timestamp_ms"] / 1000 for point in points if point["key"] == "train/loss"]
