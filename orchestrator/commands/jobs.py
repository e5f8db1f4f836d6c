"""`jobs`, `logs` and `stop` as a person meets them: the jobs of a cluster, by the names of their specs."""

from __future__ import annotations

import os
from collections.abc import Sequence

from orchestrator import console
from orchestrator.commands.submit import WINDING_UP_S, followed
from orchestrator.errors import ClusterError
from orchestrator.progress_line import Standing, standing
from orchestrator.submission.address import job_server_address
from orchestrator.submission.job_server import Job, JobServer
from orchestrator.submission.job_table import COLUMNS, JobRow, cells, ending_of, find_job, row_of

_MOST_ENDED = 20
"""Jobs that are over, of those shown: the newest."""


def jobs_command(*, address: str | None, as_json: bool) -> None:
    """Shows the jobs that are alive and the newest of the others. Raises ClusterError when nobody answers."""
    server = JobServer(job_server_address(address, os.environ))
    rows = [row_of(job, _standing(server, job)) for job in _shown(server.jobs())]
    if as_json:
        console.print_json({"address": server.address, "jobs": [row.to_dict() for row in rows]})
    elif not rows:
        console.print_lines(f"no jobs at {server.address}")
    else:
        _show(rows)


def _shown(jobs: Sequence[Job]) -> list[Job]:
    return [*(job for job in jobs if not job.is_over), *[job for job in jobs if job.is_over][:_MOST_ENDED]]


def _standing(server: JobServer, job: Job) -> Standing:
    """What a job's log says; nothing where it went with its node."""
    try:
        return standing(server.log(job.submission_id).splitlines())
    except ClusterError:
        return Standing()


def _show(rows: list[JobRow]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    shown = [cells(row) for row in rows]
    used = [place for place in range(len(COLUMNS)) if any(row[place] for row in shown)]
    for place in used:
        table.add_column(COLUMNS[place], overflow="fold")
    for row in shown:
        table.add_row(*(row[place] for place in used))
    console.print_table(table)


def logs_command(name: str, *, address: str | None, follow: bool) -> int:
    """Shows what a job has written; with `follow` until it ends, which the exit code tells of. Raises SpecError when
    there is no such job."""
    server = JobServer(job_server_address(address, os.environ))
    job = find_job(name, server.jobs())
    if not follow:
        log = server.log(job.submission_id)
        console.print_log(log + "\n" * (not log.endswith("\n")), to_errors=False)
        return 0
    ending = followed(job.submission_id, server, to_errors=False)
    console.print_messages(ending.sentence)
    return ending.code


def stop_command(name: str, *, address: str | None, as_json: bool) -> None:
    """Asks a job to stop, waits until it has saved its work and ended, and says how. Raises SpecError when there is no
    such job, ClusterError when it does not end."""
    server = JobServer(job_server_address(address, os.environ))
    job = find_job(name, server.jobs())
    if not job.is_over:
        server.stop(job.submission_id)
        console.print_messages(f"{job.submission_id} is asked to stop, and saves its work")
        job = server.wait(job.submission_id, within_s=WINDING_UP_S)
        if not job.is_over:
            raise ClusterError(
                f"{job.submission_id} has not ended in {WINDING_UP_S:g} s",
                got=job.status,
                do=f"`orchestrator logs {job.submission_id}` says what it does",
            )
    ending = ending_of(job, server.log(job.submission_id))
    if as_json:
        console.print_json(
            {"status": ending.status, "submission_id": job.submission_id, "checkpoint": ending.checkpoint}
        )
        return
    console.print_lines(ending.sentence)
    if ending.checkpoint is not None:
        console.print_lines(f"checkpoint: {ending.checkpoint}", "the same `orchestrator submit` goes on from there")
