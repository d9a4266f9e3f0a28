"""Between server and routes, in plain ASGI as it stands in the way of streams: what surrounds every request, and how answers leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics
from .errors import ApiError, broken, invalid
from .settings import Settings
from .telemetry import Tracing

log = logging.getLogger("qwen_coder_service")

T = TypeVar("T")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# asked every second by load balancers; a line each would bury the rest
QUIET = {"/ready", "/health", "/live"}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Envelope:
    """What surrounds every request: its id, the limit of its body, one line in the log, one count, one span.

    Routes add to ``scope``: ``outcome`` (what to count it as, where the status does not say) and ``details`` (for the log).
    """

    def __init__(self, app: ASGIApp, settings: Settings, routes: set[str]) -> None:
        self.app, self.limit, self.routes = app, settings.max_body_bytes, routes
        self.tracing = Tracing(settings) if settings.otlp_traces_endpoint else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
        path = scope["path"] if scope["path"] in self.routes else "other"
        details: dict[str, Any] = {}
        began, status, read = time.perf_counter(), 499, 0
        # streams send their events straight to the server: each of the framework's layers costs a turn for each token
        scope.update(request_id=request_id, details=details, began=began, direct=send)
        span = None
        if self.tracing is not None and path not in QUIET:
            span = self.tracing.begin(scope["method"], path, headers)
            scope["trace"] = self.tracing.below(span)
        refused: ApiError | None = None

        async def limited() -> Message:
            nonlocal read, refused
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                refused = self.too_large(f"more than {self.limit}")
                raise refused
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if refused is not None:  # whatever the framework makes of a body that it could not read
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.limit:
                raise self.too_large(length.decode())
            await self.app(scope, limited, answer)
            if refused is not None:
                raise refused
        except ApiError as error:
            refused = None
            await error.response(request_id)(scope, receive, answer)
        except ClientGone:
            scope["outcome"] = "aborted"
        except Exception:
            log.exception("request %s failed", request_id)
            scope["outcome"] = "error"
            if status == 499:  # nothing was sent
                await broken().response(request_id)(scope, receive, answer)
        finally:
            outcome = scope.get("outcome") or _outcome(status)
            metrics.REQUESTS.labels(path, outcome).inc()
            if self.tracing is not None and span is not None:
                self.tracing.end(span, request_id, status, outcome, details)
            if status >= 400 or path not in QUIET:
                line = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status, "outcome": outcome}
                log.info("request", extra={**line, "ms": _ms(began), **details})

    def too_large(self, seen: str) -> ApiError:
        """The body is over the limit."""
        return invalid(f"The request body has {seen} bytes; {self.limit} are taken at most.", status=413)


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 1)


def _outcome(status: int) -> str:
    if status < 400:
        return "ok"
    if status == 499:
        return "aborted"
    if status == 503:
        return "refused"
    return "invalid" if status < 500 else "error"


class EventStream(Response):
    """Server-sent events from an iterator of bytes. A client that goes away ends the iterator, and with it the engine's work.

    Args:
        events: the events; an iterator that was never begun is closed without a word.
        over: called when the response is over, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], over: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.events, self.over = events, over
        # proxies on the way are asked not to collect events
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more or nobody reads them."""
        direct: Send = scope["direct"]

        async def events() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            first = True
            try:
                async for event in self.events:
                    await direct({"type": "http.response.body", "body": event, "more_body": True})
                    if first:
                        first = False
                        metrics.FIRST_TOKEN.observe(time.perf_counter() - scope["began"])
                        scope["details"]["first_token_ms"] = _ms(scope["began"])
            finally:
                await self.events.aclose()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await until_disconnect(events(), receive)
        finally:
            self.over()


async def until_disconnect(work: Awaitable[T], receive: Receive) -> T:
    """Await something, and cancel it when the client goes away.

    Raises:
        ClientGone: the client went away first.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
