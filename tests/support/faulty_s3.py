"""A proxy in front of an S3 server, which treats some requests as a server or a network in trouble does."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = (
    "error",  # an answer of 500
    "slow_down",  # of 503
    "refused",  # the connection is closed, and nothing has been done
    "lost",  # the same, but it has been done
    "cut",  # the answer breaks off in its body
    "stalled",  # it comes late
)
_STATUS = {"error": 500, "slow_down": 503}
_ERROR = b"<Error><Code>%s</Code><Message>seeded</Message></Error>"
_CODES = {"error": b"InternalError", "slow_down": b"SlowDown"}
_NOT_FORWARDED = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(slots=True)
class FaultyProxy:
    """A running proxy.

    Attributes:
        endpoint: Its address, for `AWS_ENDPOINT_URL`.
        requests: Method and path of each request so far, without its query.
        faults: How often each fault came.
    """

    endpoint: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


@contextmanager
def faulty_proxy(
    server: str, *, seed: int = 0, share: float = 0.0, stall_seconds: float = 1.0
) -> Iterator[FaultyProxy]:
    """Run a proxy.

    Args:
        server: Endpoint of the S3 server.
        seed: Of which request meets which fault, in the order in which they come.
        share: Of the requests that meet one.
        stall_seconds: How late a stalled answer comes.
    """
    draws, lock = random.Random(seed), threading.Lock()

    def next_fault(method: str, path: str) -> str | None:
        with lock:
            proxy.requests.append((method, urlsplit(path).path))
            if draws.random() >= share:
                return None
            fault = draws.choice(FAULTS)
            proxy.faults[fault] += 1
            return fault

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            assert "Transfer-Encoding" not in self.headers, "requests have a length"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = next_fault(self.command, self.path)
            if fault in _STATUS:
                content = _ERROR % _CODES[fault]
                self._answer(_STATUS[fault], {"Content-Length": str(len(content))}, content)
                return
            if fault == "refused":
                self.close_connection = True
                return
            answer, content = self._forward(body)
            if fault == "lost":
                self.close_connection = True
                return
            if fault == "stalled":
                time.sleep(stall_seconds)
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _NOT_FORWARDED}
            if self.command != "HEAD":
                headers["Content-Length"] = str(len(content))
            if fault == "cut":
                content = content[: len(content) // 2]
                self.close_connection = True
            self._answer(answer.status, headers, content)

        def _forward(self, body: bytes) -> tuple[HTTPResponse, bytes]:
            # Host included: it is signed.
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_FORWARDED}
            connection = HTTPConnection(urlsplit(server).netloc, timeout=60)
            try:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer, answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client may leave before the answer is complete

    with Server(("127.0.0.1", 0), Handler) as listening:
        proxy = FaultyProxy(f"http://127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            listening.shutdown()
            thread.join()
