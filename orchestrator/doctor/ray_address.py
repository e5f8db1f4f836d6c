"""Can a training be driven at the address that RAY_ADDRESS names? Asked in seconds, where Ray itself takes minutes.

Called by `doctor` and before anything connects. Ray is not imported here: its control service (GCS) speaks gRPC, and
one call tells whether it is there and lets us in.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.credentials import hide
from orchestrator.doctor.machine_checks import Finding, fail, ok, warn
from orchestrator.errors import SpecError

ANSWER_TIMEOUT_S = 6.0
"""For a connection, and for an answer: a cluster that is up gives both within milliseconds."""
_IS_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What Ray 2.60 asks first when it connects; an empty request is a valid one."""
SUBMIT = "`orchestrator submit SPEC` reaches a cluster from outside of it"
"""What else there is to do."""
GET_TOKEN = (
    "copy ~/.ray/auth_token of the head (`ray get-auth-token` shows it) to the same place here, or let "
    "RAY_AUTH_TOKEN_PATH name it, and `export RAY_AUTH_MODE=token`"
)
"""What to do where a cluster wants a token."""


def is_job_server(address: str) -> bool:
    """Whether an address is one of HTTP: a cluster's dashboard, whose job server takes jobs, not the cluster itself."""
    return address.startswith(("http://", "https://"))


def check_drives(address: str | None) -> None:
    """Raises SpecError where RAY_ADDRESS names a dashboard: a training is driven from within its cluster."""
    if address is not None and is_job_server(address):
        raise SpecError(
            "RAY_ADDRESS names a cluster's dashboard, which takes jobs, and `run` drives a training from within",
            got=hide(address),
            do="`orchestrator submit SPEC` sends it there as a job; `unset RAY_ADDRESS` runs it on this machine",
        )


def check_ray_address(address: str) -> Finding | None:
    """Does the cluster that RAY_ADDRESS names answer, and let us in? Nothing is said when it names none."""
    if address in ("", "local", "auto"):
        return None
    named = f"RAY_ADDRESS={hide(address)}"
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        where = (parts.hostname or "", parts.port or {"http": 80, "https": 443, "ray": 10001}.get(parts.scheme, 6379))
        socket.create_connection(where, timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        remedy = f"start that cluster, or `unset RAY_ADDRESS` to run on this machine; {SUBMIT}"
        return fail("ray address", f"{named} does not answer: {error}", remedy)
    if is_job_server(address):
        remedy = "`orchestrator submit SPEC` sends jobs there; `unset RAY_ADDRESS` to `run` on this machine"
        return warn("ray address", f"{named} answers; it is a dashboard, for jobs", remedy)
    if parts.scheme == "ray" or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):  # else it wants certificates
        return ok("ray address", f"{named} answers")
    return _asked(named, f"{where[0]}:{where[1]}")


def _asked(named: str, where: str) -> Finding:
    import grpc  # 60 ms

    token = own_token()
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    try:
        with grpc.insecure_channel(where) as channel:
            channel.unary_unary(_IS_ALIVE)(b"", timeout=ANSWER_TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            remedy = f"give HOST:PORT of `ray start --head` (6379 by default), not that of a dashboard; {SUBMIT}"
            return fail("ray address", f"{named} is not a Ray cluster's: it does not answer as one", remedy)
        said = "wants a token" if token is None else f"does not know the token of {token_source()}"
        return fail("ray address", f"{named} {said}", GET_TOKEN)
    return ok("ray address", f"{named} answers")


def own_token() -> str | None:
    """The token that Ray's clients send, by Ray's own order; None where RAY_AUTH_MODE does not ask for one."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8").strip() or None
    return None


def token_source() -> str:
    """Where that comes from."""
    names = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    return names[0] if names else "~/.ray/auth_token"
