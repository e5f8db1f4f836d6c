"""Where a cluster's job server is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from orchestrator.credentials import hide
from orchestrator.doctor.ray_address import is_job_server
from orchestrator.errors import SpecError

SERVER, RAY = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"
"""Ray's own variables, the first for job servers alone."""
DEFAULT = "http://127.0.0.1:8265"
"""Where `ray dashboard CLUSTER.yaml`, an ssh tunnel and `ray start --head` have it."""


def job_server_address(given: str | None, environment: Mapping[str, str]) -> str:
    """URL of the job server: `given`, else `RAY_API_SERVER_ADDRESS`, else `RAY_ADDRESS` where it is one, else the
    usual one on this machine.

    Raises SpecError when it is no http(s) URL of a host.
    """
    elsewhere = environment.get(RAY, "")
    address = given or environment.get(SERVER) or (elsewhere if is_job_server(elsewhere) else "") or DEFAULT
    try:
        parts = urlsplit(address)
        usable = is_job_server(address) and parts.hostname and (parts.port is None or parts.port)
    except ValueError:
        usable = False
    if not usable:
        raise SpecError(
            "the address of a job server is a URL",
            got=hide(address),
            allowed="http://HOST:PORT or https://HOST:PORT",
            do=f"for example --address http://{address.rpartition('/')[2].partition(':')[0] or 'HOST'}:8265",
        )
    return address.rstrip("/")
