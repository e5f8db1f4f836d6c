"""Encodes text on all cores of a Ray cluster. Texts and ids travel through the object store, so that no other node
needs to see a file. `prepare` takes `encode_on_ray` where it would take `encode_here`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from orchestrator.errors import CapacityError, TransientError, one_line
from orchestrator.samples.patience import LOOK_S, go_on
from orchestrator.samples.tokenization import Chunk
from orchestrator.scheduling.session import free_shape, live_shape

T = TypeVar("T")

_IN_FLIGHT_PER_CPU = 2  # One running, one waiting on its node; more only fills the object store.
_COMES_S = 60.0
"""What a node takes to come, at the least (a guess: cloud instances with GPUs take minutes)."""


def _encode(function: Callable[[Chunk], Any], chunk: Chunk) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The task has one core; threads would take its neighbours'.
    return function(chunk)


def encode_on_ray(
    function: Callable[[Chunk], T], chunks: Iterable[Chunk], *, pause: Callable[[], None] = go_on
) -> Iterator[T]:
    """Results of a pure function on chunks, in their order, from tasks of one CPU each. Ray must be running.

    Where no core is free, this process computes them itself: all of them where no more cores can come, since a driver
    that waited here would not come to the queue, where it can say for whom it waits; else for as long as a node takes
    to come, so that short texts are done before, and the nodes that the training needs are asked for together.

    `pause` is called between two and while one is waited for, and what it raises ends the tasks, in their midst too.
    Raises CapacityError when the cluster has no CPU, TransientError when Ray gave up on a task, and whatever
    `function` raises.
    """
    cluster = live_shape()
    cpus = max(shape.cpus for shape in cluster.reachable)  # tasks that wait for cores make an autoscaler add them
    if cpus < 1:
        raise CapacityError("no node gives Ray a CPU to encode text on", do="start a node with --num-cpus 1 or more")
    chunks = iter(chunks)
    if free_shape(held={}).cpus < 1:
        until_s = time.monotonic() + _COMES_S if cpus > cluster.cpus else float("inf")
        for chunk in chunks:
            pause()
            yield function(chunk)
            if time.monotonic() > until_s:
                break
        else:
            return
    encode = ray.remote(num_cpus=1)(_encode)
    shared = ray.put(function)
    pending: deque[ray.ObjectRef] = deque()
    try:
        for chunk in chunks:
            if len(pending) >= _IN_FLIGHT_PER_CPU * cpus:
                yield _result(pending, pause)
            pending.append(encode.remote(shared, chunk))
        while pending:
            yield _result(pending, pause)
    finally:
        for task in pending:
            ray.cancel(task, force=True)  # else a long one would be computed to its end


def _result(pending: deque[ray.ObjectRef], pause: Callable[[], None]) -> Any:
    pause()
    while not ray.wait(list(pending)[:1], timeout=LOOK_S)[0]:
        pause()
    task = pending.popleft()
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise TransientError("a task that encodes text was lost", got=one_line(error)) from error
