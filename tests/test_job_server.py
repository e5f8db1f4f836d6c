"""The way to a job server, and what is said where there is none; with a real cluster see end_to_end/test_jobs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.errors import ClusterError, SpecError
from orchestrator.submission import job_server
from orchestrator.submission.address import job_server_address
from orchestrator.submission.commands import commands_of, resume_command
from orchestrator.submission.job_server import JobServer

HEAD = "http://head:8265"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Ray's client reads variables that connecting sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", "")
        yield


class Server(ThreadingHTTPServer):
    status: int = 200
    body: str = "{}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        body = self.server.body.encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        (HEAD, {"RAY_API_SERVER_ADDRESS": "http://other:1"}, HEAD),
        (f"{HEAD}/", {}, HEAD),
        (None, {"RAY_API_SERVER_ADDRESS": HEAD, "RAY_ADDRESS": "http://other:1"}, HEAD),
        (None, {"RAY_ADDRESS": "https://head"}, "https://head"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
        (None, {}, "http://127.0.0.1:8265"),
    ],
)
def test_the_address_is_that_which_was_given_last(given: str | None, environment: dict[str, str], found: str) -> None:
    assert job_server_address(given, environment) == found


@pytest.mark.parametrize("given", ["head:8265", "http://", "http://head:port", "ray://head:10001"])
def test_an_address_that_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(SpecError, match=r"is a URL[\s\S]*for example --address http://"):
        job_server_address(given, {})


def test_commands_name_the_address_where_the_shell_does_not_know_it() -> None:
    assert commands_of("demo", address=HEAD, environment={})["stop"] == f"orchestrator stop demo --address {HEAD}"
    known = {"RAY_ADDRESS": HEAD}
    assert commands_of("demo", address=HEAD, environment=known)["logs"] == "orchestrator logs demo --follow"
    assert resume_command("a b.yaml", ["x=1"], address=HEAD, environment=known) == "orchestrator submit 'a b.yaml' x=1"


def test_where_nobody_answers_the_way_to_a_cluster_is_told() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with pytest.raises(ClusterError, match=r"no job server answers at http://127.0.0.1:\d+[\s\S]*--address"):
        JobServer(f"http://127.0.0.1:{free}")


def test_a_server_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "ANSWER_TIMEOUT_S", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        began = time.monotonic()
        with pytest.raises(ClusterError, match="no job server answers"):
            JobServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert time.monotonic() - began < 5


def test_a_server_of_something_else_is_no_job_server(server: Server) -> None:
    server.status = 404
    with pytest.raises(ClusterError, match="refuses"):
        JobServer(url(server))


@pytest.mark.parametrize(
    ("status", "said"), [(401, "wants a token[\\s\\S]*RAY_AUTH_MODE is disabled"), (403, "does not know this token")]
)
def test_a_server_that_wants_a_token_says_how_to_get_one(server: Server, status: int, said: str) -> None:
    server.status, server.body = status, "Unauthorized"
    with pytest.raises(ClusterError, match=said) as caught:
        JobServer(url(server))
    assert "RAY_AUTH_MODE=token" in (caught.value.do or "")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("submit", "{spec}", "training.lr=1", "--yes"), "unknown key training.lr", 2),
        (("submit", "{spec}"), "nobody can be asked here", 2),
        (("submit", "{spec}", "--yes"), "no job server answers", 1),
        (("jobs",), "no job server answers", 1),
        (("stop", "demo"), "no job server answers", 1),
        (("logs", "demo", "--follow"), "no job server answers", 1),
    ],
)
def test_a_mistake_is_told_in_a_few_lines_before_anything_is_sent(
    arguments: tuple[str, ...], said: str, code: int
) -> None:
    filled = [one.format(spec="configs/pretrain/demo.yaml") for one in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *filled, "--address", "http://127.0.0.1:9"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_API_SERVER_ADDRESS": ""},
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 4


def test_what_was_written_of_a_log_is_not_written_again_when_it_is_read_anew() -> None:
    said: list[str] = []
    written = job_server._Written(said.append)
    for part, at in (("abc", 0), ("d\n", 3), ("abc", 0), ("d\nef", 3)):
        written.take(part, at)
    written.end_line()
    assert "".join(said) == "abcd\nef\n"
