"""Control channel: workers publish progress and heartbeats, the driver publishes stop requests.

It lives in Ray's internal key-value store, so it costs no process and crosses hosts; it is advisory: what must not be
lost goes to MLflow's outbox and to checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_put,
    internal_kv_get_gcs_client,
)

from orchestrator.runs.heartbeat import Beat, Heartbeat, posting_period_s
from orchestrator.runs.job import Progress
from orchestrator.runs.out_of_memory import kernel_kills
from orchestrator.scheduling.decisions.liveness import Place, Sighting

_NAMESPACE = b"orchestrator"
_PERIOD_S = 0.25
"""How often rank 0 posts and looks; a stop is seen within this time plus one step."""
_LOST_LOOKS = 2.0
"""Between two looks at the heartbeats at most so many periods count: a driver that was itself held up blames nobody."""


class DriverChannel:
    """The driver's side: reads progress and heartbeats, asks for a stop."""

    def __init__(self, key: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.key = key
        self._clock = clock
        self._posts: dict[int, bytes] = {}
        self._sightings: dict[int, Sighting] = {}
        self._looked_at: float | None = None
        self.clear()

    def progress(self) -> dict[str, Any] | None:
        """The newest `Progress` as a mapping, or None before the first."""
        raw = _internal_kv_get(f"{self.key}/progress".encode(), namespace=_NAMESPACE)
        return None if raw is None else json.loads(raw)

    def reports(self, already: int) -> list[tuple[int, dict[str, float]]]:
        """Evaluation reports beyond the first `already`, as (step, metrics)."""
        raw = _internal_kv_get(f"{self.key}/reports".encode(), namespace=_NAMESPACE)
        return [] if raw is None else [(step, metrics) for step, metrics in json.loads(raw)[already:]]

    def heartbeats(self, world_size: int) -> Mapping[int, Sighting]:
        """What is known of each rank that ever posted a heartbeat. Looks once a posting period, however often it is
        called; where Ray's store does not answer, nobody grows older."""
        now, period_s = self._clock(), posting_period_s(world_size)
        if self._looked_at is not None and now - self._looked_at < period_s:
            return self._sightings
        keys = {f"{self.key}/heartbeat/{rank}".encode(): rank for rank in range(world_size)}
        since_s = 0.0 if self._looked_at is None else min(now - self._looked_at, _LOST_LOOKS * period_s)
        self._looked_at = now
        with contextlib.suppress(RayError):
            found = internal_kv_get_gcs_client().internal_kv_multi_get(list(keys), namespace=_NAMESPACE)
            self._take({keys[key]: raw for key, raw in found.items()}, since_s)
        return self._sightings

    def last_seen(self) -> Mapping[int, Sighting]:
        """What the last look at the heartbeats has shown."""
        return self._sightings

    def _take(self, posts: Mapping[int, bytes], since_s: float) -> None:
        """Keeps what is new; what is not has been unseen for longer."""
        unseen_s = {rank: seen.unseen_s + since_s for rank, seen in self._sightings.items()}
        for rank, raw in posts.items():
            if raw != self._posts.get(rank):
                self._posts[rank], unseen_s[rank] = raw, 0.0
        self._sightings = {rank: _sighting(self._posts[rank], unseen_s[rank]) for rank in self._posts}

    def ask_to_stop(self) -> None:
        """The training saves and ends after its current step."""
        _internal_kv_put(f"{self.key}/stop".encode(), b"1", namespace=_NAMESPACE)

    def clear(self) -> None:
        """Forgets everything under this key."""
        _internal_kv_del(f"{self.key}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)


def _sighting(raw: bytes, unseen_s: float) -> Sighting:
    post = json.loads(raw)
    return Sighting(
        place=Place(**post["place"]),
        beat=Beat(**post["beat"]),
        unseen_s=unseen_s,
        kernel_kills=post["kernel_kills"],
    )


class WorkerChannel:
    """A rank's side: a thread posts what is new and looks for a stop, so that a step pays nothing.

    Every rank posts its heartbeat; only rank 0 has progress and reports to post, and looks for a wish to stop.
    """

    def __init__(self, key: str, *, heartbeat: Heartbeat, rank: int = 0, world_size: int = 1) -> None:
        self._key = key
        self._heartbeat = heartbeat
        self._leads = rank == 0
        self._pulse_period_s = posting_period_s(world_size)
        self._place = Place(
            rank=rank,
            host=socket.gethostname(),
            node_ip=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
        )
        self._posts = 0
        self._posted_at = float("-inf")
        self._newest: Progress | None = None
        self._posted: Progress | None = None
        self._reports: list[tuple[int, dict[str, float]]] = []
        self._reported = 0
        self._stop = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notice-channel", daemon=True)
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
        period_s = _PERIOD_S if self._leads else self._pulse_period_s
        last_round = False
        while not last_round:
            last_round = self._closed.wait(period_s)
            with contextlib.suppress(RayError):  # Ray's store is away: the next round tries again
                self._exchange()

    def _exchange(self) -> None:
        self._post_pulse()
        if not self._leads:
            return
        newest, reports = self._newest, len(self._reports)
        if newest is not None and newest is not self._posted:
            self._put("progress", newest.to_dict())
            self._posted = newest
        if reports > self._reported:
            self._put("reports", self._reports[:reports])
            self._reported = reports
        if _internal_kv_get(f"{self._key}/stop".encode(), namespace=_NAMESPACE) is not None:
            self._stop.set()

    def _post_pulse(self) -> None:
        now = time.monotonic()
        if now - self._posted_at < self._pulse_period_s:
            return
        self._posted_at = now
        self._posts += 1  # so that no two posts are the same
        news = {
            "number": self._posts,
            "place": asdict(self._place),
            "beat": asdict(self._heartbeat.beat()),
            "kernel_kills": kernel_kills(),
        }
        self._put(f"heartbeat/{self._place.rank}", news)

    def _put(self, part: str, value: Any) -> None:
        _internal_kv_put(f"{self._key}/{part}".encode(), json.dumps(value).encode(), namespace=_NAMESPACE)
