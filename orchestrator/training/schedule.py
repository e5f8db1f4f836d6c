"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from orchestrator.spec import TrainingSpec


def learning_rate(training: TrainingSpec, *, step: int, steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`.

    Warm-up rises linearly and reaches the peak at its last step; then cosine (Loshchilov & Hutter 2017, one cycle)
    or linear decay reaches the final fraction at the last step of the run.
    """
    peak = training.learning_rate
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if training.schedule == "constant":
        return peak
    done = (step - warmup_steps + 1) / max(1, steps - warmup_steps)
    shape = 1.0 - done if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    floor = training.final_learning_rate_fraction
    return peak * (floor + (1.0 - floor) * shape)
