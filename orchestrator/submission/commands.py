"""The commands that a person needs once a job is there, as text to copy. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from orchestrator.submission.address import job_server_address


def commands_of(name: str, *, address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What follows, lists and stops a job; with the address where an environment does not lead to it."""
    where = [] if address == job_server_address(None, environment) else ["--address", address]
    return {
        "logs": shlex.join(["orchestrator", "logs", name, "--follow", *where]),
        "status": shlex.join(["orchestrator", "jobs", *where]),
        "stop": shlex.join(["orchestrator", "stop", name, *where]),
    }


def resume_command(spec: str, overrides: Sequence[str], *, address: str, environment: Mapping[str, str]) -> str:
    """What submits the same spec again, which goes on where its run is."""
    where = [] if address == job_server_address(None, environment) else ["--address", address]
    return shlex.join(["orchestrator", "submit", spec, *overrides, *where])
