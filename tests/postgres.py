"""A PostgreSQL server of a test's own: on loopback, with a password, in a folder that goes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.mlflow_runs import free_port

USER = "mlflow"


def programs() -> Path | None:
    """The folder of the newest server that is installed; None without one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Postgres:
    """A running server."""

    def __init__(self, bin_folder: Path, port: int, password: str) -> None:
        self._bin, self._port, self._password = bin_folder, port, password
        self.uri = f"postgresql+psycopg2://{USER}:{password}@127.0.0.1:{port}/postgres"

    def dump(self) -> bytes:
        """All that it holds, as SQL."""
        command = [self._bin / "pg_dump", "-h", "127.0.0.1", "-p", str(self._port), "-U", USER, "postgres"]
        return subprocess.run(
            command, env=_environment(PGPASSWORD=self._password), capture_output=True, check=True
        ).stdout


@contextmanager
def postgres(password: str) -> Iterator[Postgres]:
    """A server whose user `mlflow` has this password; the server refuses to run as root, so `nobody` runs it there."""
    bin_folder = programs()
    assert bin_folder is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
    as_whom: dict[str, Any] = {}
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
        as_whom = {"user": "nobody", "cwd": folder}
    data, port = folder / "data", free_port()
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)

    def command(name: str, *arguments: str) -> None:
        subprocess.run(
            [bin_folder / name, *arguments], env=_environment(), stdout=subprocess.DEVNULL, check=True, **as_whom
        )

    try:
        command(
            "initdb", "-D", str(data), "-U", USER, "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"
        )
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off -c synchronous_commit=off"
        command("pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield Postgres(bin_folder, port, password)
        finally:
            command("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(**more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LC_ALL": "C", **more}
