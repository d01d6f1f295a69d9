"""A web application around one linker: a page to try it, and a JSON API.

    GET  /              the page
    POST /api/link      one mention -> its answer
    POST /api/explain   the same with demonstrations, prompt and the answer without the picture

Requests that wait at the same time are linked in one call, which is faster than one after the other.
The number of waiting requests, the requests of one client and the size of a request are limited.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from gemel_engine.display import cut, visible
from gemel_engine.errors import EngineDiedError, GemelError, MentionError
from gemel_engine.extras import extra
from gemel_engine.linker import Explanation, Linker, explain
from gemel_engine.serving.answers import MAX_TEXT, Question, as_answer, as_explanation
from gemel_engine.types import Prediction

with extra("serve"):
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

MAX_WAITING = 64  # requests; more are refused
_PER_BATCH = 32  # requests that are linked in one call
_PER_MINUTE = 120  # requests of one client
_SPARE_BYTES = 8 * MAX_TEXT  # of a request beside its picture
_SHOWN_CHARACTERS = 1000  # of what is malformed in a request

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Next = Callable[[Request], Awaitable[Response]]


class RequestRefusedError(Exception):
    """A request is not served.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class LinkingQueue:
    """Links waiting questions together, and explains others one after the other.

    Args:
        linker: Linker of the application.
        on_death: Function to call after the engine's process has ended.
    """

    def __init__(self, linker: Linker, on_death: Callable[[], None]) -> None:
        self._linker = linker
        self._on_death = on_death
        self._waiting: deque[tuple[Question, asyncio.Future[Prediction]]] = deque()
        self._num_explained = 0  # questions that wait for an explanation
        self._has_work = asyncio.Event()

    async def ask(self, question: Question) -> Prediction:
        """Return the prediction for a question.

        Raises:
            ConfigurationError: The question has a picture, but no image encoder is configured.
            RequestRefusedError: Too many questions wait.
        """
        self._linker.check_picture(question.picture)  # it would fail for all questions that are linked together
        self._check_room()
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._has_work.set()
        return await future

    async def explain(self, question: Question) -> Explanation:
        """Return the explanation of a question.

        Raises:
            GemelError: The question can't be explained.
            RequestRefusedError: Too many questions wait.
        """
        self._check_room()
        self._num_explained += 1
        try:
            return await self._call(explain, self._linker, question.as_mention(), question.picture)
        finally:
            self._num_explained -= 1

    async def run(self) -> None:
        """Link what waits, until cancelled."""
        while True:
            await self._has_work.wait()
            batch = [self._waiting.popleft() for _ in range(min(_PER_BATCH, len(self._waiting)))]
            if not self._waiting:
                self._has_work.clear()
            mentions = [question.as_mention() for question, _ in batch]
            pictures = [question.picture for question, _ in batch]
            try:
                predictions = await self._call(self._linker.link, mentions, pictures)
            except Exception as error:  # of this batch alone: its requests get it, and the next ones are served
                self._fail(batch, error)
                continue
            for (_, future), prediction in zip(batch, predictions, strict=True):
                if not future.done():  # its client may have gone
                    future.set_result(prediction)

    def _fail(self, batch: list[tuple[Question, asyncio.Future[Prediction]]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)

    async def _call(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call a function in a thread, and `on_death` if the engine has ended."""
        try:
            return await asyncio.to_thread(function, *arguments)
        except EngineDiedError:
            self._on_death()
            raise

    def _check_room(self) -> None:
        if len(self._waiting) + self._num_explained >= MAX_WAITING:
            raise RequestRefusedError(503, f"{MAX_WAITING} requests are waiting: try again later")


class ClientLimit:
    """Counts the requests of each client in the last minute."""

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}

    def check(self, client: str) -> None:
        """Count a request.

        Raises:
            RequestRefusedError: The client sends too many.
        """
        now = time.monotonic()
        for other in [name for name, times in self._times.items() if times[-1] < now - 60]:
            del self._times[other]
        times = self._times.setdefault(client, deque())
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= _PER_MINUTE:
            raise RequestRefusedError(429, f"at most {_PER_MINUTE} requests a minute: try again later")
        times.append(now)


def create_app(linker: Linker, hosts: list[str], on_death: Callable[[], None]) -> FastAPI:
    """Return the application.

    Args:
        linker: Linker of all requests.
        hosts: Host names by which browsers reach the application; others are refused, so that no
            page of another site can read from it under a name of its own.
        on_death: Function to call after the engine's process has ended.
    """
    queue, limit = LinkingQueue(linker, on_death), ClientLimit()
    max_bytes = linker.config.image_source.max_bytes * 4 // 3 + _SPARE_BYTES

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(queue.run())
        yield
        working.cancel()

    app = FastAPI(title="GEMEL engine", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    page, policy = _page()

    @app.middleware("http")
    async def limited(request: Request, call_next: Next) -> Response:
        try:
            if request.method == "POST":
                limit.check(request.client.host if request.client else "")
                await _read_body(request, max_bytes)
            response = await call_next(request)
        except RequestRefusedError as error:
            response = JSONResponse({"error": str(error)}, error.status)
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    _answer_errors(app)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> str:
        return page

    @app.post("/api/link")
    async def link(question: Question) -> dict[str, Any]:
        return as_answer(await queue.ask(question))

    @app.post("/api/explain")
    async def explained(question: Question) -> dict[str, Any]:
        return as_explanation(await queue.explain(question))

    return app


def _answer_errors(app: FastAPI) -> None:
    """Let an application answer errors in JSON, with the message as `error`."""

    @app.exception_handler(RequestRefusedError)
    async def refused(_: Request, error: RequestRefusedError) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return JSONResponse({"error": cut(visible(faults), _SHOWN_CHARACTERS)}, 422)

    @app.exception_handler(GemelError)
    async def failed(_: Request, error: GemelError) -> Response:
        if isinstance(error, MentionError):
            return JSONResponse({"error": str(error)}, 422)
        logger.error("%s", error)
        return JSONResponse({"error": str(error)}, 503 if isinstance(error, EngineDiedError) else 400)


async def _read_body(request: Request, max_bytes: int) -> None:
    """Read the body of a request, which keeps it for the endpoint.

    Raises:
        RequestRefusedError: It is too large, or not declared as JSON: a page of another site can't
            send JSON without asking first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RequestRefusedError(415, "the content type is not application/json: send JSON")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise RequestRefusedError(413, f"the request is larger than {max_bytes} bytes: send a smaller picture")
        parts.append(part)
    request._body = b"".join(parts)


def _page() -> tuple[str, str]:
    """Return the page, and a content security policy that allows what it contains alone."""
    directory = Path(__file__).parent
    style, script = ((directory / name).read_text("utf-8") for name in ("page.css", "page.js"))
    page = (directory / "page.html").read_text("utf-8").replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src blob:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    return page, policy


def _digest(text: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
