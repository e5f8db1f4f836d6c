"""A real object store for tests: SeaweedFS, which keeps what it is given on disk and knows who may do what with it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bucket"
OWNER, READER, STRANGER = "owner-key", "reader-key", "stranger-key"
"""Access keys of one who may do everything, of one who may read and list BUCKET, and of nobody."""
_START_S, _TRIES = 40.0, 3
"""3 or 8 s on an idle machine."""
_IDENTITIES = {
    "identities": [
        {
            "name": name,
            "credentials": [{"accessKey": key, "secretKey": f"{key}-secret"}],
            "actions": actions,
        }
        for name, key, actions in (
            ("owner", OWNER, ["Admin", "Read", "Write", "List", "Tagging"]),
            ("reader", READER, [f"Read:{BUCKET}", f"List:{BUCKET}"]),
        )
    ]
}


@contextmanager
def s3_server() -> Iterator[Any]:
    """A boto3 client of a server with one empty bucket; meanwhile the environment leads to it, as its owner."""
    import boto3

    with ExitStack() as stack:
        for _ in range(_TRIES):
            server, port = stack.enter_context(_started())
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for name, value in as_user(OWNER, port=port).items():
                patch.setenv(name, value)
            client = boto3.session.Session().client("s3")  # the default one remembers the keys of an earlier test
            stack.callback(client.close)
            if _comes_up(server, client):
                yield client
                return
    raise TimeoutError("the server does not start")


@contextmanager
def _started() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """(the server's process, the port of its S3 interface)."""
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    (folder / "identities.json").write_text(json.dumps(_IDENTITIES))
    port, *others = free_ports(8)
    server = subprocess.Popen(
        _command(folder, port, others), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        yield server, port
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _comes_up(server: subprocess.Popen[bytes], client: Any) -> bool:
    """Whether it answers in time; it does not where somebody else was faster to take one of its ports."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.poll() is None:
        if _is_ready(client):
            return True
        time.sleep(0.05)
    return False


def as_user(key: str, *, port: int | None = None) -> dict[str, str]:
    """The environment of a user of the server; without a port, of the one that it leads to already."""
    where = {} if port is None else {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    return where | {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": f"{key}-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _command(folder: Path, port: int, others: list[int]) -> list[str]:
    """`weed server`: one process with everything that stands behind its S3 interface."""
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = [f"-{name}={number}" for name, number in zip((*names, "s3.port.grpc"), others, strict=True)]
    ports += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed otherwise, so that a second server would end
    small = ["-volume.max=0", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    return [
        f"{sysconfig.get_path('scripts')}/weed",
        *("server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports, *small),
        *("-s3", "-s3.autoCreateBucket=false", f"-s3.port={port}", f"-s3.config={folder / 'identities.json'}"),
    ]


def _is_ready(client: Any) -> bool:
    """It answers before it can keep anything."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        if BUCKET not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
        client.delete_object(Bucket=BUCKET, Key="ready")
    except (BotoCoreError, ClientError):
        return False
    return True
