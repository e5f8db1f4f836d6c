"""A rank's sign of life: what it does, since when, and how long its own work takes.

The training loop marks a `Pulse`; the board's thread reads it; `scheduling.health` judges what all ranks' pulses say.
No torch here unless the loop asks for it, so that a driver stays light.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["starting", "loading", "computing", "waiting", "evaluating", "saving", "exporting"]

_RECENT_STEPS = 20
"""The usual time of a step is the median of so many recent ones."""
_STRETCH_S = 1.0
"""Own work is averaged over stretches of at least one step and so long: a short step falls between two time slices of a
shared core, a second holds hundreds of them."""
_STRETCHES = 16
"""Own work is known after so many stretches, and is that of the most recent ones (a guess)."""
_LONGEST_GAP_S = 15.0
"""Counted at most between two looks: a process that was itself stopped did not see that long a standstill."""
_TIMED_LAYERS = 8
"""Enough to stand for a model, too few for a step to notice (a guess)."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a pulse says at one moment. Durations only, by this rank's own clock: hosts' clocks differ."""

    phase: Phase
    step: int
    """Optimizer steps done before this phase."""
    still_s: float
    """Seconds since anything moved: a mark by the loop, or a collective that was begun."""
    collectives: int
    """Collective operations begun by this process; the rank that holds up the others has begun fewer."""
    usual_step_s: float | None = None
    """Median seconds of this attempt's recent steps, None before it has taken two."""
    own_low_s: float | None = None
    """Seconds of own work a step: three quarters of the recent 16 stretches, each of a second or a step, took longer.
    None before there are so many, and where own work is not measured."""
    own_high_s: float | None = None
    """As `own_low_s`, but one quarter took longer."""


def _none_begun() -> int:
    return 0


class Pulse:
    """Marked by one thread (0.3 us a mark), read by another; a mark is one assignment, so neither needs a lock."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._collectives: Callable[[], int] = _none_begun
        self._mark: tuple[Phase, int] = ("starting", 0)
        self._step_began: tuple[int, float] | None = None
        self._steps_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._own_s: deque[float] = deque(maxlen=_STRETCHES)
        self._stretch: list[float] = []
        self._stretch_began = clock()
        self._seen: tuple[tuple[Phase, int], int] = (self._mark, 0)
        self._looked, self._still_s = clock(), 0.0

    def enter(self, phase: Phase, step: int) -> None:
        """The loop begins a phase, or a new part of it, after `step` optimizer steps."""
        self._mark = (phase, step)
        if phase == "computing":
            self._begin_step(step)

    def computed(self, own_s: float) -> None:
        """A step took so many seconds of this rank's own work, waiting for others left out."""
        self._stretch.append(own_s)
        now = self._clock()
        if now - self._stretch_began >= _STRETCH_S:
            self._own_s.append(statistics.fmean(self._stretch))
            self._stretch, self._stretch_began = [], now

    def count(self, collectives: Callable[[], int]) -> None:
        """From now on `collectives()` says how many collective operations this process has begun."""
        self._collectives = collectives

    def beat(self) -> Beat:
        """What it says now. Called by one thread, regularly: standing still is what it saw between its looks."""
        now, mark, collectives = self._clock(), self._mark, self._collectives()
        if mark is self._seen[0] and collectives == self._seen[1]:
            self._still_s += min(now - self._looked, _LONGEST_GAP_S)
        else:
            self._seen, self._still_s = (mark, collectives), 0.0
        self._looked = now
        steps_s, own_s = list(self._steps_s), sorted(self._own_s)
        is_known = len(own_s) == _STRETCHES
        return Beat(
            phase=mark[0],
            step=mark[1],
            still_s=self._still_s,
            collectives=collectives,
            usual_step_s=statistics.median(steps_s) if steps_s else None,
            own_low_s=own_s[_STRETCHES // 4] if is_known else None,
            own_high_s=own_s[-1 - _STRETCHES // 4] if is_known else None,
        )

    def _begin_step(self, step: int) -> None:
        now = self._clock()
        if self._step_began is not None and step == self._step_began[0] + 1:
            self._steps_s.append(now - self._step_began[1])
        self._step_began = (step, now)


def collectives_begun() -> int:
    """Collective operations that this process has begun in all its process groups: their own sequence numbers."""
    from torch.distributed import distributed_c10d

    return sum(group._get_sequence_number_for_group() for group in list(distributed_c10d._world.pg_map))


class ForwardTimer:
    """Times the forward pass of a model's largest layers, in which no rank waits for another under any ZeRO stage.

    Built after DeepSpeed has hooked the module: ZeRO-3 then has a layer's weights before the clock starts. On a GPU
    the times are the device's, between events that are read once the step is over.
    """

    def __init__(self, module: Any, *, on_gpu: bool) -> None:
        self._moment = _event if on_gpu else time.perf_counter
        self._on_gpu = on_gpu
        self._running = False
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[Any] = []
        for layer in _largest_layers(module):
            self._hooks.append(layer.register_forward_pre_hook(self._begin))
            self._hooks.append(layer.register_forward_hook(self._end, prepend=True))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the forward pass of a step's first micro-batch; what was timed before is forgotten."""
        self._spans, self._running = [], True
        try:
            yield
        finally:
            self._running = False

    def seconds(self) -> float:
        """Seconds of the newest timed forward pass; on a GPU, called when the step is over."""
        if self._on_gpu:
            return sum(float(began.elapsed_time(ended)) for began, ended in self._spans) / 1e3
        return float(sum(ended - began for began, ended in self._spans))

    def close(self) -> None:
        """Takes its hooks off the module."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._spans = [], []

    def _begin(self, *_: Any) -> None:
        if self._running:
            self._began = self._moment()

    def _end(self, *_: Any) -> None:
        if self._running:
            self._spans.append((self._began, self._moment()))


def _event() -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _largest_layers(module: Any) -> list[Any]:
    """Modules without children, by their weights; look-ups of embeddings do no work to speak of."""
    sizes = {
        layer: sum(getattr(weight, "ds_numel", weight.numel()) for weight in layer.parameters(recurse=False))
        for layer in module.modules()
        if next(layer.children(), None) is None and "Embedding" not in type(layer).__name__
    }
    return sorted((layer for layer in sizes if sizes[layer]), key=lambda layer: -sizes[layer])[:_TIMED_LAYERS]


def posting_period_s(world_size: int) -> float:
    """How often each rank posts its pulse, so that all of them together write at most 100 times a second."""
    return max(1.0, world_size / 100)
