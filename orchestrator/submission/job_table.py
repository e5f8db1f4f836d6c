"""Jobs of a cluster as people know them: by the names of their specs, with where each stands. Pure.

Comes in: the job server's list, and what each job has written. Goes out: rows, and the job that a name means.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SpecError
from orchestrator.progress_line import Standing
from orchestrator.quantities import human_duration
from orchestrator.submission.job import KIND, NAME, OWNER

if TYPE_CHECKING:
    from orchestrator.submission.job_server import Job

_ERROR = re.compile(r"^error: (?P<what>.*)$(?P<rest>(?:\n  .*$)*)", re.MULTILINE)
_STOPPED = "stopped at step "
"""How the driver's message of a stop begins that has left a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A job of the list; None for what it has not said."""

    name: str
    """Of its spec, as far as that is known; else the job's own."""
    submission_id: str
    owner: str | None
    kind: str | None
    state: str
    """`pending`, `waiting for room`, `running`, `succeeded`, `failed` or `stopped`."""
    place: int | None
    """In the queue for room."""
    step: int | None
    steps: int | None
    trial: str | None
    """Of a search: the trial that reported last, and its step."""
    trials: str | None
    """Of a search: how many of them have ended, as `3/12`; None before the first."""
    eta_s: float | None
    """Seconds to its last step, or to the last trial's."""
    spent: float | None
    """What it has cost, in `unit`."""
    unit: str | None
    budget: float | None
    """In `unit` too."""
    remaining: float | None
    """What is left of the budget."""
    doing: str
    """The last thing it said, while it runs."""
    started_s: float | None
    """Unix time."""
    ended_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def job_name(job: Job) -> str:
    """The name of the spec that a job runs: as `orchestrator submit` noted it, else that of the file in its entrypoint,
    else the job's own."""
    if NAME in job.metadata:
        return job.metadata[NAME]
    try:
        words = shlex.split(job.entrypoint)
    except ValueError:
        words = []
    if any(word.startswith("jobs.") for word in words) and "--config" in words[:-1]:
        return PurePosixPath(words[words.index("--config") + 1]).stem
    return job.submission_id


def row_of(job: Job, standing: Standing) -> JobRow:
    """A job with what its output says of it."""
    progress: Mapping[str, Any] = standing.search or standing.progress or {}
    spent, budget = progress.get("spent") or None, progress.get("budget")
    amount = None if budget is None else float(budget.removesuffix(progress["unit"]))
    waits = standing.waits and job.status == "running"
    return JobRow(
        name=job_name(job),
        submission_id=job.submission_id,
        owner=job.metadata.get(OWNER),
        kind=job.metadata.get(KIND),
        state="waiting for room" if waits else job.status,
        place=standing.place if waits else None,
        step=progress.get("step"),
        steps=progress.get("steps"),
        trial=standing.trial,
        trials=None if standing.search is None else f"{standing.search['ended']}/{standing.search['trials']}",
        eta_s=None if job.is_over else progress.get("eta_s") or None,
        spent=spent,
        unit=progress.get("unit") if spent is not None else None,
        budget=amount,
        remaining=None if amount is None or spent is None else max(0.0, amount - spent),
        doing="" if job.is_over else standing.doing,
        started_s=job.started_s,
        ended_s=job.ended_s,
    )


COLUMNS = ("name", "job", "owner", "state", "place", "step", "ETA", "spent", "remaining", "doing")


def cells(row: JobRow) -> tuple[str, ...]:
    """A row as `COLUMNS` show it; empty for what is not known."""
    step = "" if row.step is None else f"{row.step}/{row.steps}"
    trials = "" if row.trials is None else f"{row.trials} trials"
    return (
        row.name,
        row.submission_id,
        row.owner or "",
        row.state,
        "" if row.place is None else str(row.place),
        step or trials or row.trial or "",
        "" if row.eta_s is None else human_duration(row.eta_s),
        "" if row.spent is None else f"{row.spent:.3g}{row.unit}",
        "" if row.remaining is None else f"{row.remaining:.3g}{row.unit}",
        row.doing if len(row.doing) <= _LONGEST else row.doing[: _LONGEST - 3] + "...",
    )


_LONGEST = 40


def find_job(name: str, jobs: Sequence[Job]) -> Job:
    """The job with an id, else the newest of a spec's name, one that is alive before others.

    `jobs` come the newest first. Raises SpecError with the names that there are.
    """
    for job in jobs:
        if job.submission_id == name:
            return job
    of_name = [job for job in jobs if job_name(job) == name]
    if not of_name:
        known = list(dict.fromkeys(job_name(job) for job in jobs))
        raise SpecError(
            "there is no such job on this cluster",
            got=name,
            allowed=", ".join(known[:20]) or "there are no jobs",
            do="`orchestrator jobs` lists them",
        )
    return next((job for job in of_name if not job.is_over), of_name[0])


def check_name_is_free(name: str, jobs: Sequence[Job], commands: Mapping[str, str]) -> None:
    """Raises SpecError when a job of that name is alive; `commands` follow and stop it."""
    alive = [job for job in jobs if not job.is_over and name in (job_name(job), job.submission_id)]
    if alive:
        owner = alive[0].metadata.get(OWNER)
        raise SpecError(
            f"a job named {name} is {alive[0].status} on this cluster",
            got=alive[0].submission_id + (f", of {owner}" if owner else ""),
            do=f"`{commands['logs']}`, or `{commands['stop']}`, or submit this with name=ANOTHER",
        )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended, as far as it has."""

    status: str
    """`succeeded`, `failed`, `stopped`, or what it is while it is not over."""
    sentence: str
    checkpoint: str | None = None
    """Where the same spec goes on from, as far as the job has said it."""

    @property
    def code(self) -> int:
        """Exit code of a command that waited for it."""
        return 0 if self.status == "succeeded" else 1


def ending_of(job: Job, log: str) -> Ending:
    """What became of a job, from the job server's word and its own last ones."""
    said = list(_ERROR.finditer(log))
    what = said[-1]["what"] if said else ""
    if job.status == "failed":
        return Ending(status=job.status, sentence=f"{job.submission_id} failed: {what or job.message}")
    if job.status != "stopped":
        return Ending(status=job.status, sentence=f"{job.submission_id} {job.status}")
    if not what.startswith("stopped"):
        text = f"{job.submission_id} was stopped, and ended before it said how; its newest checkpoint is kept"
        return Ending(status=job.status, sentence=text)
    got = re.search(r"^  got: +(.*)$", said[-1]["rest"], re.MULTILINE)
    kept = got[1] if got is not None and what.startswith(_STOPPED) else None
    return Ending(status=job.status, sentence=f"{job.submission_id} {what}", checkpoint=kept)
