"""A cluster's job server over HTTP: the only part here that reaches it, and that turns what Ray's client raises into
errors which name the remedy."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from orchestrator.doctor.ray_address import GET_TOKEN, token_source
from orchestrator.errors import ClusterError, SpecError, one_line
from orchestrator.planning.growth import live_node, shape_of
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.submission.address import SERVER

CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 15.0
"""A host that is there takes a connection within milliseconds, and one behind a firewall never does; a busy dashboard
answers within a second or two, and one that hangs never does (guesses)."""
_STATE_TIMEOUT_S = 20
"""Of Ray's state API; a cluster of a thousand nodes answers in a second or two (a guess)."""
_RECONNECT_S = 60.0
"""How long a lost connection to a log is tried again: a laptop's change of networks (a guess)."""
_TOO_LARGE = "status code 413"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of the list."""

    submission_id: str
    status: str
    """Ray's word in small letters: `pending`, `running`, `stopped`, `succeeded`, `failed`."""
    entrypoint: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    started_s: float | None = None
    """Unix time."""
    ended_s: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ("stopped", "succeeded", "failed")


class _Written:
    """What of a log was given on, so that it is not given twice when the log is read from its beginning again."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._length, self._last = write, 0, "\n"

    def take(self, part: str, at: int) -> None:
        """A part of the log that begins at a character of it."""
        new = part[max(0, self._length - at) :]
        if new:
            self._write(new)
            self._length, self._last = at + len(part), new[-1]

    def end_line(self) -> None:
        """Ends the last line."""
        if self._last != "\n":
            self._write("\n")


class JobServer:
    """What can be asked of it. Every method raises ClusterError when it does not answer, or wants a token."""

    def __init__(self, address: str) -> None:
        """Connects. Raises ClusterError in seconds when nobody answers there."""
        self.address = address
        _check_answers(address)
        # Ray's client takes the address from these variables before that which it is given.
        os.environ[SERVER] = address
        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with _translated(address):
            self._client = JobSubmissionClient(address)

    def shape(self) -> ClusterShape:
        """The nodes that are up now."""
        with _translated(self.address):
            nodes = list_nodes(address=self.address, timeout=_STATE_TIMEOUT_S, limit=10_000)
        return shape_of([live_node(node.resources_total) for node in nodes if node.state == "ALIVE"])

    def jobs(self) -> list[Job]:
        """Jobs that were submitted to this cluster, the newest first."""
        with _translated(self.address):
            found = [_job(one) for one in self._client.list_jobs() if one.submission_id]
        return sorted(found, key=lambda job: job.started_s or 0.0, reverse=True)

    def job(self, submission_id: str) -> Job:
        """One of them, as it is now."""
        with _translated(self.address):
            return _job(self._client.get_job_info(submission_id))

    def submit(
        self,
        entrypoint: str,
        *,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
        submission_id: str,
    ) -> None:
        """Sends the working directory of a runtime environment and starts the entrypoint in it.

        Raises SpecError when that directory is too large.
        """
        with _translated(self.address):
            self._client.submit_job(
                entrypoint=entrypoint,
                runtime_env=dict(runtime_env),
                metadata=dict(metadata),
                submission_id=submission_id,
            )

    def stop(self, submission_id: str) -> None:
        """Asks a job to stop; it ends when it has saved its work."""
        with _translated(self.address):
            self._client.stop_job(submission_id)

    def log(self, submission_id: str) -> str:
        """All that a job has written."""
        try:
            with _translated(self.address):
                return str(self._client.get_job_logs(submission_id))
        except ClusterError:
            if self.job(submission_id).status == "pending":
                return ""
            raise

    def follow(self, submission_id: str, write: Callable[[str], None]) -> None:
        """Gives what a job writes as it comes, from its beginning to its end, where a line ends too."""
        written = _Written(write)
        lost_s: float | None = None
        while True:
            try:
                asyncio.run(self._tail(submission_id, written))
                lost_s = None
                if self.job(submission_id).is_over:
                    written.end_line()
                    return
            except BrokenPipeError:
                raise  # whoever read what is written here is gone
            except (aiohttp.ClientError, RuntimeError, OSError, ClusterError) as error:
                lost_s = lost_s or time.monotonic()
                if time.monotonic() - lost_s > _RECONNECT_S:
                    raise ClusterError(
                        "the connection to the job's log is lost; the job goes on",
                        got=one_line(error),
                        do=f"orchestrator logs {submission_id} --follow --address {self.address}",
                    ) from error
            time.sleep(1.0)

    async def _tail(self, submission_id: str, written: _Written) -> None:
        at = 0
        async for part in self._client.tail_job_logs(submission_id):
            written.take(part, at)
            at += len(part)

    def wait(self, submission_id: str, *, within_s: float) -> Job:
        """The job once it is over, or as it is when the time is."""
        until = time.monotonic() + within_s
        while not (job := self.job(submission_id)).is_over and time.monotonic() < until:
            time.sleep(0.5)
        return job


def _job(details: Any) -> Job:
    return Job(
        submission_id=details.submission_id,
        status=JobStatus(details.status).value.lower(),
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
        message=details.message or "",
        started_s=None if not details.start_time else details.start_time / 1000,
        ended_s=None if not details.end_time else details.end_time / 1000,
    )


def _check_answers(address: str) -> None:
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _silent(address, error) from error
    try:  # Ray's client waits for ever
        requests.get(f"{address}/api/version", timeout=ANSWER_TIMEOUT_S)
    except requests.exceptions.RequestException as error:
        raise _silent(address, error) from error


def _silent(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"no job server answers at {address}",
        got=one_line(error),
        do="start the cluster (`ray up cluster/FILE.yaml`), let `ray dashboard cluster/FILE.yaml` lead its port here, "
        "or give its URL: --address, or RAY_API_SERVER_ADDRESS",
    )


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """Raises what Ray's client raises as an error of ours."""
    try:
        yield
    except AuthenticationError as error:
        raise _locked(address, str(error)) from error
    except RayStateApiException as error:
        if isinstance(error.__cause__, AuthenticationError):
            raise _locked(address, str(error.__cause__)) from error
        raise ClusterError(
            f"{address} does not tell its nodes", got=one_line(error), do="look at it in a browser"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise _silent(address, error) from error
    except RuntimeError as error:
        text = one_line(error)
        if _TOO_LARGE in text:
            raise SpecError(
                "the job server does not take so large a package", got=text, do="put data elsewhere"
            ) from error
        raise ClusterError(
            f"the job server at {address} refuses", got=text, do="see that it is a Ray dashboard"
        ) from error


def _locked(address: str, said: str) -> ClusterError:
    if "invalid" in said.lower():
        return ClusterError(f"the cluster at {address} does not know this token", got=token_source(), do=GET_TOKEN)
    mode = os.environ.get("RAY_AUTH_MODE") or "not set"
    return ClusterError(
        f"the cluster at {address} wants a token", got=f"none was sent: RAY_AUTH_MODE is {mode}", do=GET_TOKEN
    )
