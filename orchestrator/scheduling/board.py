"""A notice board between a running training and its driver: progress one way, a wish to stop the other.

It lives in Ray's internal key-value store, so it costs no process and crosses hosts; it is advisory: what must not be
lost goes to MLflow's outbox and to checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from orchestrator.training.job import Progress

_NAMESPACE = b"orchestrator"
_PERIOD_S = 0.25
"""How often a worker posts and looks; a stop is seen within this time plus one step."""


class DriverBoard:
    """The driver's side: reads progress, asks for a stop."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.clear()

    def progress(self) -> dict[str, Any] | None:
        """The newest `Progress` as a mapping, or None before the first."""
        raw = _internal_kv_get(f"{self.key}/progress".encode(), namespace=_NAMESPACE)
        return None if raw is None else json.loads(raw)

    def reports(self, already: int) -> list[tuple[int, dict[str, float]]]:
        """Evaluation reports beyond the first `already`, as (step, metrics)."""
        raw = _internal_kv_get(f"{self.key}/reports".encode(), namespace=_NAMESPACE)
        return [] if raw is None else [(step, metrics) for step, metrics in json.loads(raw)[already:]]

    def ask_to_stop(self) -> None:
        """The training saves and ends after its current step."""
        _internal_kv_put(f"{self.key}/stop".encode(), b"1", namespace=_NAMESPACE)

    def clear(self) -> None:
        """Forgets everything under this key."""
        for part in ("progress", "reports", "stop"):
            _internal_kv_del(f"{self.key}/{part}".encode(), namespace=_NAMESPACE)


class WorkerBoard:
    """Rank 0's side: a thread posts the newest progress and looks for a stop, so that a step pays nothing."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._newest: Progress | None = None
        self._posted: Progress | None = None
        self._reports: list[tuple[int, dict[str, float]]] = []
        self._reported = 0
        self._stop = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notice-board", daemon=True)
        self._thread.start()

    def post(self, progress: Progress) -> None:
        """Replaces the newest progress."""
        self._newest = progress

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds an evaluation report."""
        self._reports.append((step, dict(metrics)))

    def stop_requested(self) -> bool:
        """Whether the driver asked for a stop."""
        return self._stop.is_set()

    def close(self) -> None:
        """Posts what is new and ends the thread."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        last_round = False
        while not last_round:
            last_round = self._closed.wait(_PERIOD_S)
            with contextlib.suppress(RayError):  # Ray's store is away: the next round tries again
                self._exchange()

    def _exchange(self) -> None:
        newest, reports = self._newest, len(self._reports)
        if newest is not None and newest is not self._posted:
            self._put("progress", newest.to_dict())
            self._posted = newest
        if reports > self._reported:
            self._put("reports", self._reports[:reports])
            self._reported = reports
        if _internal_kv_get(f"{self._key}/stop".encode(), namespace=_NAMESPACE) is not None:
            self._stop.set()

    def _put(self, part: str, value: Any) -> None:
        _internal_kv_put(f"{self._key}/{part}".encode(), json.dumps(value).encode(), namespace=_NAMESPACE)
