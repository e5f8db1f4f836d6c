"""`submit` as a person meets it: a spec is checked and planned here, sent to a cluster as a job, and followed.

What can be refused is refused before anything is sent; only the cluster's job server needs to be reached.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import console, locations
from orchestrator.cluster_files.largest import largest_clusters
from orchestrator.errors import CapacityError, Interrupted, ModelError, OrchestratorError, SpecError
from orchestrator.load_stages import load_any
from orchestrator.planning.run_plan import ClusterShape
from orchestrator.planning.views import plan_table
from orchestrator.provenance import Provenance, provenance_of
from orchestrator.spec import RunSpec
from orchestrator.spec_stages import StagedSpec
from orchestrator.submission.address import job_server_address
from orchestrator.submission.commands import commands_of, resume_command
from orchestrator.submission.job import DEFAULT_ENVIRONMENT, RUNTIME_ENV, JobRequest, job_request, submission_id
from orchestrator.submission.job_table import Ending, check_name_is_free, ending_of
from orchestrator.submission.upload import Upload, find_upload, write_package
from orchestrator.yaml_file import read_yaml

if TYPE_CHECKING:
    from orchestrator.commands.plan import Preview, StagesPreview
    from orchestrator.submission.job_server import JobServer

WINDING_UP_S = 90.0
"""From the end of a job's log to that of the job: Ray's own poll, and the wait of a stop (a minute)."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the job will take, as far as that can be told from here."""

    preview: Preview | StagesPreview | None
    why_not: str | None = None
    """Why there is no plan."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"plan": None if self.preview is None else self.preview.to_dict(), "not_planned": self.why_not}

    def show(self) -> None:
        """For a person, on standard output."""
        if self.preview is None:
            console.print_messages(f"not planned: {self.why_not}")
        elif hasattr(self.preview, "table"):
            console.print_table(self.preview.table())
        else:
            one = self.preview
            console.print_table(plan_table(one.plan, data=one.sentences(), search=one.search, whole=False))


@dataclass(frozen=True, kw_only=True)
class Order:
    """A job that may be sent: everything of it was checked."""

    request: JobRequest
    upload: Upload
    planned: Planned
    job_id: str
    runtime_env: Mapping[str, Any]


def submit_command(
    path: str,
    overrides: Sequence[str],
    *,
    address: str | None,
    cluster_file: Path | None,
    working_dir: Path,
    fresh: bool,
    yes: bool,
    follow: bool,
    as_json: bool,
) -> int:
    """Checks, plans, asks, sends and follows; gives the exit code: 0 where the job succeeded, or was sent and not
    followed, 1 where it failed or was stopped.

    Raises SpecError for a mistake, before anything is sent, ClusterError where the job server cannot be used, and
    Interrupted where the answer is no.
    """
    before, file = dict(os.environ), Path(path).absolute()
    url = job_server_address(address, before)
    largest = None if cluster_file is None else largest_clusters(cluster_file)
    if not working_dir.is_dir():
        raise SpecError("--working-dir is no folder", got=working_dir, do="give the folder that the job starts in")
    with contextlib.chdir(working_dir):  # where relative paths of the spec begin, here as in the job
        spec = load_any(file, overrides)
        if not yes and not console.is_answered():
            raise SpecError(
                "nobody can be asked here whether to submit", do="look at `orchestrator plan`, then add --yes"
            )
        folder = Path.cwd()
        source = provenance_of(folder)
        request = job_request(spec, file, overrides, folder=folder, owner=source.user, fresh=fresh)
        upload = find_upload(folder, needed=request.needed)
        environment = job_environment(folder, source)
        from orchestrator.submission.job_server import JobServer

        server, commands = JobServer(url), commands_of(request.name, address=url, environment=before)
        jobs = server.jobs()
        check_name_is_free(request.name, jobs, commands)
        shape = server.shape()
        order = Order(
            request=request,
            upload=upload,
            planned=plan_on(spec, (shape,) if largest is None else largest),
            job_id=submission_id(request.name, [job.submission_id for job in jobs]),
            runtime_env=environment,
        )
    _show_order(order, url, shape, as_json=as_json)
    if not yes and not console.ask(f"submit to {url}?"):
        raise Interrupted("not submitted", do="--yes submits without a question")
    send(order, server)
    commands["resume"] = resume_command(path, overrides, address=url, environment=before)
    console.print_messages(f"submitted as {order.job_id}")
    ending = followed(order.job_id, server, to_errors=as_json) if follow else None
    _answer(order, url, ending, commands, as_json=as_json)
    return 0 if ending is None else ending.code


def job_environment(folder: Path, source: Provenance) -> dict[str, Any]:
    """The job's runtime environment: as the folder's RUNTIME_ENV says, with the variables of DEFAULT_ENVIRONMENT where
    it does not set them, and with where the job comes from."""
    own = read_yaml(folder / RUNTIME_ENV) if (folder / RUNTIME_ENV).is_file() else {}
    variables = {name: str(value) for name, value in (own.get("env_vars") or {}).items()}
    return {**own, "env_vars": {**DEFAULT_ENVIRONMENT, **variables, **source.to_environment()}}


def plan_on(spec: RunSpec | StagedSpec, shapes: Sequence[ClusterShape]) -> Planned:
    """The plan on the first of these clusters with room for it; none where none has, or the base lies only there.

    Raises what `preview` raises for mistakes.
    """
    from orchestrator.commands.plan import preview_on_first

    try:
        return Planned(preview=preview_on_first(spec, shapes))
    except CapacityError as error:
        why_not = f"the nodes that are up have no room for it now: {error.what}"
        return Planned(preview=None, why_not=f"{why_not}; --cluster FILE plans for those that may come")
    except OrchestratorError as error:
        base = (spec.first if isinstance(spec, StagedSpec) else spec).model.base
        if base is None or not isinstance(error, ModelError | SpecError) or _lies_here(base):
            raise
        return Planned(preview=None, why_not=f"the base {base} is not on this machine ({error.what})")


def _lies_here(base: str) -> bool:
    try:
        return Path(locations.resolve(base)).exists()
    except SpecError:  # its package is not installed
        return False


def send(order: Order, server: JobServer) -> None:
    """Packs and sends; the job starts."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        package = Path(scratch) / "job.zip"
        write_package(order.upload, package)
        server.submit(
            order.request.entrypoint,
            runtime_env={**order.runtime_env, "working_dir": str(package)},
            metadata=order.request.metadata,
            submission_id=order.job_id,
        )


def _show_order(order: Order, url: str, shape: ClusterShape, *, as_json: bool) -> None:
    if not as_json:
        order.planned.show()
    devices = f"{shape.gpus} {shape.device_name}" if shape.gpus else f"{shape.cpus} CPU cores"
    nodes = "1 node" if len(shape.nodes) == 1 else f"{len(shape.nodes)} nodes"
    size = f"{order.upload.size / 1e6:.1f} MB in {len(order.upload.files)} files"
    console.print_messages(
        f"cluster: {url}, now {nodes} with {devices}",
        f"travels: {size}",
        *(f"note: {text}" for text in order.request.stays),
    )


def followed(job_id: str, server: JobServer, *, to_errors: bool) -> Ending:
    """Shows the job's log until it ends; Ctrl-C leaves the job running."""
    try:
        server.follow(job_id, lambda text: console.print_log(text, to_errors=to_errors))
        job = server.wait(job_id, within_s=WINDING_UP_S)
        return ending_of(job, server.log(job_id))
    except KeyboardInterrupt:
        return Ending(status="running", sentence=f"{job_id} goes on; only its log is not followed any more")


def _answer(order: Order, url: str, ending: Ending | None, commands: Mapping[str, str], *, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "status": "submitted" if ending is None else ending.status,
                "submission_id": order.job_id,
                "name": order.request.name,
                "kind": order.request.kind,
                "address": url,
                "checkpoint": None if ending is None else ending.checkpoint,
                "commands": dict(commands),
                **order.planned.to_dict(),
            }
        )
        return
    if ending is not None:
        console.print_messages(ending.sentence)
    console.print_lines(*(f"{label + ':':<9}{command}" for label, command in commands.items()))
