"""Servers that a run talks to, and that can be killed and started again: MLflow, and an S3 object store."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import processes
from tests.chaos.processes import HERE, Machine

_START_S = 180.0
"""MLflow took 5.6 s on an idle machine; the rest is a guess for a loaded one."""
_PROBE_S = 2.0
BUCKET = "chaos"
OBJECTS = "object store"
_REGION, _KEY = "us-east-1", "any will do"


@dataclass(kw_only=True)
class Server:
    """One server; `start` starts it where it is not running."""

    part: str
    """Its mark among the suite's processes."""
    command: Callable[[str, int], list[str]]
    """Address and port to the command."""
    ready: str
    """Path that is answered once it is up."""
    log: Path
    machine: Machine = HERE
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=processes.free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where it listens."""
        return f"http://{self.machine.address}:{self.port}"

    def start(self) -> None:
        """Raises TimeoutError when it does not answer."""
        if self._answers():
            return
        self.kill()
        self._process = processes.start(
            self.command(self.machine.address, self.port),
            part=self.part,
            log=self.log,
            machine=self.machine,
            environment=self.environment,
        )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"the {self.part} did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        processes.end(self.part)
        if self._process is not None:
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}{self.ready}", timeout=_PROBE_S):
                return True
        except (urllib.error.URLError, OSError):
            return False


def tracking_server(store_uri: str, *, folder: Path, machine: Machine) -> Server:
    """`mlflow server` on a SQLite file."""

    def command(address: str, port: int) -> list[str]:
        store = ["--backend-store-uri", store_uri, "--artifacts-destination", str(folder / "artifacts")]
        where = ["--host", address, "--port", str(port), "--workers", "1"]
        return [sys.executable, "-m", "mlflow", "server", *where, *store]

    return Server(
        part="tracking server",
        command=command,
        ready="/health",
        log=folder / "tracking-server.log",
        machine=machine,
        environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )


def object_store(*, folder: Path, port: int, machine: Machine) -> Server:
    """An S3 server in memory (moto's)."""

    def command(address: str, port: int) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", address, "-p", str(port)]

    return Server(
        part=OBJECTS,
        command=command,
        ready="/moto-api/",
        log=folder / "object-store.log",
        port=port,
        machine=machine,
    )


def s3_environment(machine: Machine, port: int) -> dict[str, str]:
    """What a client of `object_store` needs."""
    return {
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _KEY,
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_ENDPOINT_URL": f"http://{machine.address}:{port}",
    }


def can_store_objects() -> bool:
    """Whether the S3 server is installed."""
    return importlib.util.find_spec("moto") is not None


class Bucket:
    """What lies in the object store, seen from outside."""

    def __init__(self, uri: str) -> None:
        """Creates the bucket where it is missing."""
        import boto3

        self._client = boto3.client(
            "s3",
            endpoint_url=uri,
            aws_access_key_id=_KEY,
            aws_secret_access_key=_KEY,
            region_name=_REGION,
        )
        self._client.create_bucket(Bucket=BUCKET)

    def names(self) -> list[str]:
        """Names of all objects."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]
