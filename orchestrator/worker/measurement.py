"""What a run takes, measured beside what its plan predicted: the metrics that `tracking.past_runs` learns from.

Comes in: every step's seconds and tokens. Goes out: `figures`, logged once, at the end of a run.
"""

from __future__ import annotations

import ctypes
import resource
import statistics
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

from orchestrator.planning.run_plan import DatasetCounts, RunPlan
from orchestrator.planning.throughput import STARTUP_SECONDS

WARMUP_STEPS = 3
"""First steps of an attempt, left out where others follow: allocations, caches, kernels being chosen (a guess)."""
_MOST_STEPS = 10_000
"""The median is that of so many last steps, so that a long run's memory stays small."""
_PROCESS = Path("/proc/self")


class Pace:
    """Seconds and tokens of one attempt's steps, and the pauses between them."""

    def __init__(self) -> None:
        self._taken = 0
        self._steps: deque[tuple[float, int]] = deque(maxlen=_MOST_STEPS)
        self._step_seconds = self._pause_seconds = self._pausing = 0.0

    def add_step(self, *, seconds: float, tokens: int) -> None:
        """One optimizer step was taken; tokens are those of all workers, without padding."""
        if self._taken == WARMUP_STEPS:  # what came before was warm-up
            self._steps.clear()
            self._step_seconds = self._pause_seconds = 0.0
        self._taken += 1
        self._steps.append((seconds, tokens))
        self._step_seconds += seconds
        self._pause_seconds += self._pausing
        self._pausing = 0.0

    def add_pause(self, seconds: float) -> None:
        """The run was evaluated or saved; that counts if another step follows."""
        self._pausing += seconds

    @property
    def steps(self) -> int:
        """Steps behind the medians; 0 when this attempt took none."""
        return len(self._steps)

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(seconds for seconds, _ in self._steps)

    @property
    def goodput(self) -> float:
        """Share of the time from the first step to the last that was spent in steps."""
        return self._step_seconds / (self._step_seconds + self._pause_seconds)

    @property
    def tokens_per_second(self) -> float:
        """From the first step to the last: the median over steps, less the pauses."""
        return self.goodput * statistics.median(tokens / seconds for seconds, tokens in self._steps)


def figures(
    plan: RunPlan, pace: Pace, *, counts: DatasetCounts, step: int, gpu_hours: float, peak_gib: float
) -> dict[str, float]:
    """Metrics of a run that has taken `step` optimizer steps and `gpu_hours` device hours, at least one of them now.

    What was predicted is scaled to the steps done, so that a run that its budget ended compares too.
    """
    assert plan.steps is not None, "the plan has met its dataset"
    assert plan.gpu_hours is not None
    start_hours = plan.workers * STARTUP_SECONDS.mid / 3600
    hours_per_step = (plan.gpu_hours.mid - start_hours) / plan.steps
    speeds = {
        "predicted/tokens_per_second": plan.tokens_per_step * plan.workers / (3600 * hours_per_step),
        "measured/tokens_per_second": pace.tokens_per_second,
    }
    return {
        **({} if plan.flops_once else speeds),  # a head's steps say nothing of how fast a device reads tokens
        "predicted/gpu_hours": start_hours + hours_per_step * step,
        "measured/gpu_hours": gpu_hours,
        "predicted/peak_gib": plan.peak_gib.mid,
        "measured/peak_gib": peak_gib,
        "measured/step_s": pace.step_s,
        "measured/goodput": pace.goodput,
        "measured/steps": float(pace.steps),
        "data/train_samples": float(counts.train_samples),
        "data/train_tokens": float(counts.train_tokens),
    }


def reset_host_peak() -> None:
    """Forgets how much memory this process held before; where that is not possible, it stays in the peak."""
    with suppress(OSError, AttributeError):  # glibc's: it keeps what an earlier trial in this process has freed
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # man 5 proc: resets the high-water mark


def host_peak_gib() -> float:
    """Most resident memory that this process held since the last reset."""
    with suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    # Systems without /proc: the most since the process began, in bytes on macOS and KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
