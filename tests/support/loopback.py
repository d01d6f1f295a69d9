"""An HTTP server on the loopback interface that gives the answers a test lists, and counts the requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer; `promised_bytes` is its Content-Length where that should be a lie."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    promised_bytes: int | None = None
    delay_seconds: float = 0.0


@dataclass(slots=True)
class Loopback:
    """A running server: its address without a slash at the end, and the paths it was asked for so far, by whom."""

    port: int
    requests: list[str]
    user_agents: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serve(answer: Callable[[str], Answer]) -> Iterator[Loopback]:
    """Serve every request, of any method, with the answer to its path and query."""
    requests: list[str] = []
    user_agents: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # answers `Expect: 100-continue`, for which an S3 client would wait a second

        def _reply(self) -> None:
            requests.append(self.path)
            user_agents.append(self.headers.get("User-Agent", ""))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = answer(self.path)
            time.sleep(reply.delay_seconds)
            self.send_response(reply.status)
            length = len(reply.body) if reply.promised_bytes is None else reply.promised_bytes
            for name, value in ({"Content-Length": str(length), "Connection": "close"} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        do_GET = do_PUT = do_HEAD = _reply  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # the client may leave before the answer is complete

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Loopback(server.server_port, requests, user_agents)
        finally:
            server.shutdown()
            thread.join()
