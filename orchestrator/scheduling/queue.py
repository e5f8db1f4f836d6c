"""The queue of a shared cluster: an entry for each driver in Ray's key-value store, where all of them see it.

An entry ends with its driver: those of dead jobs are passed over and removed. On a private Ray there is one driver, and
no queue.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Literal

import ray
from ray._private.state import state as _state
from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_list,
    _internal_kv_put,
    internal_kv_get_gcs_client,
)

from orchestrator.provenance import carried, own_user
from orchestrator.scheduling.decisions.queueing import Entry

_NAMESPACE = b"orchestrator-queue"


class Place:
    """A driver's own place in the queue."""

    def __init__(self, name: str) -> None:
        self._job = ray.get_runtime_context().get_job_id()
        self._name = name
        submitted = carried(os.environ)
        self._owner = (own_user() if submitted is None else submitted.user) or "unknown"
        self._entry: Entry | None = None

    def take(self, cpus: float, gpus: float, *, state: Literal["waiting", "starting"] = "waiting") -> Entry:
        """The driver's entry for so much; the time it came first is kept."""
        since_s = time.time() if self._entry is None else self._entry.since_s
        return self._keep(
            Entry(
                job=self._job,
                name=self._name,
                owner=self._owner,
                since_s=since_s,
                state=state,
                cpus=cpus,
                gpus=gpus,
            )
        )

    def others_wait(self) -> bool:
        """Whether another driver waits for the resource that this one has."""
        mine = self._entry
        return mine is not None and any(
            other.wants == mine.wants and other.state == "waiting" for other in self.others()
        )

    def has_workers(self) -> None:
        """What it waited for is its own now."""
        if self._entry is not None:
            self._keep(replace(self._entry, state="running"))

    def others(self) -> tuple[Entry, ...]:
        """All other drivers that live, in no order; those of dead drivers are removed."""
        keys = [key for key in _internal_kv_list(b"", namespace=_NAMESPACE) if key != self._job.encode()]
        if not keys:
            return ()
        dead = {row["JobID"] for row in _state.job_table() if row["IsDead"]}
        found = internal_kv_get_gcs_client().internal_kv_multi_get(keys, namespace=_NAMESPACE)
        entries = []
        for key, raw in found.items():
            if key.decode() in dead:
                _internal_kv_del(key, namespace=_NAMESPACE)
            else:
                entries.append(Entry(**json.loads(raw)))
        return tuple(entries)

    def leave(self) -> None:
        """The driver wants nothing any more."""
        with suppress(RayError):  # the entry ends with the driver at the latest
            _internal_kv_del(self._job.encode(), namespace=_NAMESPACE)
        self._entry = None

    def _keep(self, entry: Entry) -> Entry:
        if entry != self._entry:
            _internal_kv_put(self._job.encode(), json.dumps(asdict(entry)).encode(), namespace=_NAMESPACE)
            self._entry = entry
        return entry
