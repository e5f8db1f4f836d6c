"""How fast a run was, from the times of its steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

WARM_STEPS = 5
"""Steps left out of a throughput: allocators and caches fill."""


def steps_alone(steps: int) -> list[str]:
    """What makes the demo's training one of so many steps, without evaluations and checkpoints on the way."""
    return [
        "training.tokens=null",
        f"training.steps={steps}",
        "training.eval_every_steps=null",
        "checkpoint.every_steps=null",
        "data.max_validation_examples=1",
    ]


def loss_times(outbox: Path) -> list[float]:
    """Seconds since the epoch at which each step's loss was logged, from the run's own metric log."""
    times: dict[int, float] = {}
    for file in outbox.rglob("*.jsonl"):
        for line in file.read_text().splitlines():
            item = json.loads(line)
            if item["key"] == "train/loss":
                times[item["step"]] = item["timestamp_ms"] / 1000
    return [times[step] for step in sorted(times)]


def steps_per_second(ends: Sequence[float]) -> float:
    """Of the steps after the warm ones, from the times at which all of them ended."""
    return (len(ends) - 1 - WARM_STEPS) / (ends[-1] - ends[WARM_STEPS])
