"""An HTTP server that lets in one user, and answers what an MLflow server answers when it is asked how it is."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def guarded(user: str, password: str) -> Iterator[tuple[str, list[int]]]:
    """(HOST:PORT, the status of every answer so far): 200 for this user, 401 for anybody else."""
    wanted = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    answers: list[int] = []

    class DivergenceGuard(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status = 200 if self.headers.get("Authorization") == wanted else 401
            answers.append(status)
            body = b'{"runs": []}' if status == 200 else b"who are you?"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), DivergenceGuard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", answers
    finally:
        server.shutdown()
        server.server_close()
