"""Who started a run and from which revision, read where the source is and carried to a job that has only a copy of it.

`orchestrator submit` puts it into the job's environment; what describes a run to MLflow reads it there, or from git.
"""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

USER, COMMIT, DIRTY = "ORCHESTRATOR_SUBMITTED_BY", "ORCHESTRATOR_GIT_COMMIT", "ORCHESTRATOR_GIT_DIRTY"
"""Variables of a job's environment."""
_GIT_TIMEOUT_S = 5.0
"""A status of a large checkout on a slow disk takes a second or two (a guess)."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a run comes from; None for what is not known."""

    user: str | None = None
    commit: str | None = None
    """Of the git checkout."""
    is_dirty: bool | None = None
    """Whether the checkout holds changes that are not committed."""

    def to_environment(self) -> dict[str, str]:
        """As variables of a job's environment; what is not known is left out."""
        dirty = None if self.is_dirty is None else str(self.is_dirty).lower()
        values = {USER: self.user, COMMIT: self.commit, DIRTY: dirty}
        return {name: value for name, value in values.items() if value is not None}


def provenance_of(folder: Path) -> Provenance:
    """This process's user, and the revision of the checkout that holds a folder; raises nothing."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return Provenance(user=own_user(), commit=commit or None, is_dirty=None if changes is None else bool(changes))


def carried(environment: Mapping[str, str]) -> Provenance | None:
    """What a submitting machine has put into a job's environment; None where it has put nothing."""
    if not any(environment.get(name) for name in (USER, COMMIT, DIRTY)):
        return None
    dirty = environment.get(DIRTY)
    return Provenance(
        user=environment.get(USER) or None,
        commit=environment.get(COMMIT) or None,
        is_dirty=None if not dirty else dirty == "true",
    )


def own_user() -> str | None:
    """Who runs this process; None where that user has no name."""
    with suppress(KeyError, OSError):  # a container may run under a user id without a name
        return getpass.getuser()
    return None


def _git(folder: Path, *command: str) -> str | None:
    """A git command's output; None without git, outside a checkout, or when it takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
