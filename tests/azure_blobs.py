"""Azure's blob storage for tests: Azurite, Microsoft's own emulator, in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.s3 import free_ports

CONTAINER = "container"
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The emulator's only account; its key is printed in its documentation."""
_START_S = 60.0


@contextmanager
def azure_server(folder: Path) -> Iterator[str]:
    """The URI of an empty container; meanwhile the environment leads to it. Skips the test where Azurite is missing."""
    from azure.core.exceptions import AzureError
    from azure.storage.blob import BlobServiceClient

    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("Azure is played by azurite-blob: npm install --global azurite")
    (port,) = free_ports(1)
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
    server = subprocess.Popen([azurite, *where, "--skipApiVersionCheck", "--disableTelemetry"])
    endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    connection = f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={endpoint};"
    try:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with BlobServiceClient.from_connection_string(connection, retry_total=0) as client:
                    client.create_container(CONTAINER)
                break
            except AzureError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
            yield f"abfs://{CONTAINER}"
    finally:
        server.kill()
        server.wait()
