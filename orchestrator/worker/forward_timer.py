"""What a rank's own work takes, measured in the model: for `heartbeat`, which says whether the rank still works."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TIMED_LAYERS = 8
"""Enough to stand for a model, too few for a step to notice (a guess)."""


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
