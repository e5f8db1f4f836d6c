"""What is found out of RAY_ADDRESS before anything connects, against servers that are real."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from orchestrator.doctor.ray_address import check_drives, check_ray_address, own_token
from orchestrator.errors import SpecError


class ControlService(grpc.GenericRpcHandler):
    """Answers as a cluster's control service does, with a token if it has one."""

    token: str | None = None

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if call.method != "/ray.rpc.NodeInfoGcsService/CheckAlive":
            return None
        sent = dict(call.invocation_metadata).get("authorization")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.token is not None and sent != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def service() -> Iterator[tuple[ControlService, str]]:
    """(the service, its address)."""
    server, service = grpc.server(ThreadPoolExecutor(1)), ControlService()
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def listener() -> Iterator[str]:
    """Something that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def found(address: str) -> tuple[str, str]:
    finding = check_ray_address(address)
    assert finding is not None
    return finding.status, f"{finding.detail} {finding.remedy or ''}"


def test_a_cluster_that_answers_is_fine(service: tuple[ControlService, str]) -> None:
    assert found(service[1]) == ("ok", f"RAY_ADDRESS={service[1]} answers ")


def test_a_cluster_that_wants_a_token_says_so_and_where_to_get_it(
    service: tuple[ControlService, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service[0].token = "right"
    status, text = found(service[1])
    assert (status, "wants a token" in text, "RAY_AUTH_MODE=token" in text) == ("fail", True, True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "does not know the token of RAY_AUTH_TOKEN" in found(service[1])[1]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    assert found(service[1])[0] == "ok"


def test_the_token_of_a_file_is_sent_where_the_mode_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("abc\n")
    assert own_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert own_token() == "abc"


def test_what_is_no_cluster_is_told_from_one(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.doctor.ray_address.ANSWER_TIMEOUT_S", 0.5)
    assert found(listener)[0] == "fail"
    assert "is not a Ray cluster's" in found(listener)[1]


def test_a_dashboard_takes_jobs_and_drives_nothing(listener: str) -> None:
    status, text = found(f"http://{listener}")
    assert (status, "orchestrator submit SPEC" in text) == ("warn", True)
    with pytest.raises(SpecError, match="names a cluster's dashboard"):
        check_drives(f"http://{listener}")
    for address in (None, "auto", listener, f"ray://{listener}"):
        check_drives(address)


def test_ray_client_and_encrypted_clusters_are_only_knocked_at(listener: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(f"ray://{listener}")[0] == "ok"
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert found(listener)[0] == "ok"


def test_a_dead_address_fails_with_the_way_out() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    status, text = found(f"127.0.0.1:{free}")
    assert (status, "does not answer" in text, "orchestrator submit SPEC" in text) == ("fail", True, True)
    assert found("127.0.0.1:nonsense")[0] == "fail"
    assert check_ray_address("auto") is None
