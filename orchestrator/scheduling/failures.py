"""What a failed attempt died of: errors of workers as they arrive here -> the one error that explains them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

import ray
import ray.train
from ray.exceptions import RayError, RayTaskError

from orchestrator.errors import (
    CapacityError,
    ClusterError,
    MemoryExhaustedError,
    OrchestratorError,
    TransientError,
    one_line,
)
from orchestrator.runs.out_of_memory import is_out_of_memory, kernel_kills
from orchestrator.scheduling.decisions.liveness import Sighting
from orchestrator.scheduling.nodes import ask_nodes

_BROKEN = ("connection closed by peer", "connection reset", "broken pipe", "nccl", "timed out waiting")
"""What gloo, NCCL and the rendezvous say when a peer is gone."""

_ASKING_S = 3.0
"""Longest that machines are asked whether memory ran out there (an answer took 0.1 to 2 s)."""

_PREAMBLES = ("Worker exit detail: ", "due to the node running low on memory. ", "The actor died because ")
"""After these Ray 2.60 says what it knows of a death: of any process's, of one that its memory monitor has decided, and
of one that went with its node."""


class WorkerError(Exception):
    """What a worker raised that is none of ours, as text: Ray drops the traceback, and not every exception pickles."""

    def __init__(self, kind: str, text: str, last_lines: str, is_broken_connection: bool) -> None:
        super().__init__(kind, text, last_lines, is_broken_connection)  # all of them, so that it pickles
        self.kind, self.text, self.last_lines = kind, text, last_lines
        self.is_broken_connection = is_broken_connection

    @classmethod
    def of(cls, error: BaseException) -> WorkerError:
        """The text of an error that was just caught."""
        text = one_line(error, most=None)
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        last_lines = " | ".join(f"{frame.filename}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames)
        broken = isinstance(error, RuntimeError | ConnectionError) and any(sign in text.lower() for sign in _BROKEN)
        return cls(type(error).__name__, text, last_lines, broken)


def raised_by_worker(error: BaseException) -> Exception:
    """The error that goes to the driver for one that a worker caught: ours unchanged, memory named, others as text."""
    if isinstance(error, OrchestratorError):
        return error
    if is_out_of_memory(error):
        return MemoryExhaustedError("a step needs more memory than its worker has", got=one_line(error))
    return WorkerError.of(error)


def explain(error: BaseException) -> OrchestratorError:
    """The error that a failed attempt of Ray Train is reported by."""
    if isinstance(error, OrchestratorError):
        return error
    if isinstance(error, ray.train.WorkerGroupError):
        return translate(error.worker_failures)
    if isinstance(error, ray.train.TrainingFailedError | RayError):
        return _never_trained(getattr(error, "controller_failure", error))
    raise error


def translate(failures: Mapping[int, BaseException]) -> OrchestratorError:
    """The one error that explains a failed worker group, given each rank's.

    One of ours comes first, and one that says more than that some other rank is gone; then a dead worker, whose peers
    fail with broken connections; then a foreign error, which is named with its rank and last lines. What is neither
    ours nor a `WorkerError` is Ray speaking for a dead worker.
    """
    ours = [error for error in failures.values() if isinstance(error, OrchestratorError)]
    if ours:
        return min(ours, key=lambda error: type(error) is TransientError)
    raised = {rank: error for rank, error in failures.items() if isinstance(error, WorkerError)}
    foreign = {rank: error for rank, error in raised.items() if not error.is_broken_connection}
    dead = sorted(failures.keys() - raised.keys())
    if dead or not foreign:
        starved = [rank for rank in dead if is_out_of_memory(failures[rank])]
        ranks = starved or dead or sorted(failures)
        fate = "ran out of memory and died" if starved else "died" if dead else "lost the others"
        kind = MemoryExhaustedError if starved else TransientError
        return kind(
            f"worker{'s' if len(ranks) > 1 else ''} of rank {', '.join(map(str, ranks))} {fate}",
            got=_last_words(failures[ranks[0]]),
            do="the same command goes on from the newest checkpoint",
        )
    rank, cause = min(foreign.items())
    return ClusterError(
        f"training failed on rank {rank} with {cause.kind}",
        got=cause.text[:400] or "no message",
        do=f"this is none of the mistakes the project knows; it was raised at {cause.last_lines}",
    )


def find_starved(sightings: Mapping[int, Sighting]) -> tuple[str, ...]:
    """Hosts of the workers whose kernel has ended a process for want of memory since they were last seen.

    A process that is ended so cannot tell. Asks the other machines that still answer, which takes 3 s at most; nobody
    is accused where Ray itself is going down.
    """
    try:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        here = ray.util.get_node_ip_address()
    except Exception:  # Ray has no one error for that
        return ()
    known = [s for s in sightings.values() if s.kernel_kills is not None and s.place.node_id in alive]
    elsewhere = [seen.place for seen in known if seen.place.node_ip != here]
    answers = ask_nodes(_kernel_kills, elsewhere, deadline_s=_ASKING_S)
    starved = set()
    for seen in known:
        now = answers.get(seen.place.rank) or _kernel_kills(seen.place.pid)
        if now.isdigit() and int(now) > (seen.kernel_kills or 0):
            starved.add(seen.place.host)
    return tuple(sorted(starved))


def _kernel_kills(pid: int) -> str:
    return str(kernel_kills())


def _never_trained(cause: BaseException) -> OrchestratorError:
    """What kept Ray Train from running the workers at all."""
    got = one_line(cause, most=None)[-400:]
    if "worker group startup timed out" in str(cause):
        return CapacityError("there is no room for the workers", got=got, do="`ray status` shows what is free")
    if isinstance(cause, RayTaskError):
        return ClusterError(
            "the workers could not start", got=got, do="check that every node has this project and its dependencies"
        )
    return TransientError("Ray could not run the workers", got=got, do="the same command starts them again")


def _last_words(error: BaseException) -> str:
    """What Ray or the worker knows of a death, without Ray's preamble of ids and its guesses at causes."""
    error = getattr(error, "health_check_failure", error)  # without Ray's description of the worker before it
    text = " ".join((error.text if isinstance(error, WorkerError) else str(error)).split())
    told = (text.partition(preamble)[2] for preamble in _PREAMBLES)
    return next(filter(None, told), text).partition(" Some common causes include")[0][:300]
