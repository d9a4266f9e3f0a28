"""The HTTP service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import __version__, metrics, persona
from .backends.base import Backend, BackendDead, Piece, Sampling
from .errors import ApiError, invalid, unavailable
from .formats import ChatFormat, Format, OpenAIFormat, sse
from .lifecycle import State, end_process, sd_notify
from .schemas import ChatAnswer, ChatRequest, CompletionRequest, Sampled
from .settings import Settings, claim

log = logging.getLogger("qwen_coder_service")

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# prompts up to this many characters are rendered in the loop; for longer ones a thread costs less than the wait of everybody else
_RENDER_INLINE_CHARACTERS = 16_384


# seconds between two looks at the engine
_CHECK_INTERVAL_S = 2.0


@dataclass(slots=True)
class Question:
    """What a client asks, whichever API it speaks."""

    conversation: list[persona.Turn]
    sampled: Sampled
    max_tokens: int | None
    tools: list[dict[str, Any]] | None = None


class Service:
    """The state that routes share."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings, self.backend = settings, backend
        self.state = State.STARTING
        self.since = int(time.time())
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def set_state(self, state: State) -> None:
        """Move on in the service's life, and let the metrics say so."""
        self.state = state
        metrics.READY.set(state is State.READY)

    async def warm_up(self) -> None:
        """Answer one prompt for real; only then is the service ready."""
        prompt = persona.render(self.backend.tokenizer, [{"role": "user", "content": "Hello"}], self.settings.persona_prompt)
        async for _ in self.backend.generate("warm-up", prompt, Sampling(max_tokens=1), stream=False):
            pass

    def admit(self) -> None:
        """Take one more request, or say why not.

        Raises:
            ApiError: 503; the service is not ready, is stopping, or has as many requests as it may.
        """
        if self.state is not State.READY:
            raise unavailable(f"This node is {self.state.value}.", retry_after=5)
        limit = self.settings.max_num_seqs + self.settings.max_queued_requests
        if self.in_flight >= limit:
            raise unavailable(f"This node has {self.in_flight} requests, and takes {limit}.", retry_after=1)
        self.in_flight += 1
        self.idle.clear()
        metrics.IN_FLIGHT.set(self.in_flight)

    def release(self) -> None:
        """A request that was admitted is over."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()
        metrics.IN_FLIGHT.set(self.in_flight)

    async def prompt(self, question: Question) -> list[int]:
        """Token ids of a question's prompt.

        Raises:
            ApiError: 400; the prompt leaves no room for an answer, or less than was asked for.
        """
        arguments = (self.backend.tokenizer, question.conversation, self.settings.persona_prompt, question.tools)
        if sum(len(turn["content"]) for turn in question.conversation) > _RENDER_INLINE_CHARACTERS:
            ids = await asyncio.to_thread(persona.render, *arguments)
        else:
            ids = persona.render(*arguments)
        room = self.backend.max_model_len - len(ids)
        if room < 1:
            raise invalid(f"The prompt has {len(ids)} tokens; this model takes {self.backend.max_model_len - 1} at most.", param="messages")
        if question.max_tokens is not None and question.max_tokens > room:
            raise invalid(
                f"max_tokens is {question.max_tokens}; a prompt of {len(ids)} tokens leaves {room} of {self.backend.max_model_len}.",
                param="max_tokens",
            )
        return ids

    def sampling(self, question: Question, prompt: list[int]) -> Sampling:
        """How the answer is drawn."""
        asked = question.sampled
        return Sampling(
            max_tokens=question.max_tokens or self.backend.max_model_len - len(prompt),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
            ignore_eos=asked.ignore_eos,
        )

    async def watch(self) -> None:
        """See that the engine lives, as long as the service does. vLLM's core may die and leave this process behind, up and useless."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            try:
                await self.backend.check()
            except BackendDead as error:
                self.dead(error)
                return

    def dead(self, error: BackendDead) -> ApiError:
        """The engine is gone: nothing more is taken here, another node can be asked, and the process ends to be started anew."""
        if self.state is not State.DEAD:
            log.error("engine: %s", error)
            self.set_state(State.DEAD)
            end_process()
        return unavailable("The engine of this node died.", retry_after=30)


class EventStream(Response):
    """Server-sent events from an iterator of bytes. A client that goes away ends the iterator, and with it the engine's work."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.events = events
        # proxies on the way are asked not to collect events
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until there are no more or nobody reads them."""

        async def events() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            finally:
                await self.events.aclose()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await until_disconnect(events(), receive)


async def until_disconnect(work: Any, receive: Receive) -> Any:
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


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Envelope:
    """What surrounds every request: its id, the limit of its body, one line in the log. Plain ASGI, as it stands in the way of streams."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.limit = app, settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
        scope["request_id"] = request_id
        began, status, read = time.perf_counter(), 499, 0
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
            await error_response(error, request_id)(scope, receive, answer)
        except ClientGone:
            pass
        finally:
            if status >= 400 or scope["path"] not in _QUIET:
                log.info(
                    "request",
                    extra={
                        "id": request_id,
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "ms": round((time.perf_counter() - began) * 1000, 1),
                        **scope.get("log", {}),
                    },
                )

    def too_large(self, seen: str) -> ApiError:
        """The body is over the limit."""
        return invalid(f"The request body has {seen} bytes; {self.limit} are taken at most.", status=413)


# asked every second by load balancers; a line each would bury the rest
_QUIET = {"/ready", "/health", "/live"}


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """An error in the shape that clients know."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
    return JSONResponse(error.body(request_id), error.status, headers=headers)


def create_app(settings: Settings, backend: Backend | None = None) -> FastAPI:
    """The application.

    Args:
        settings: what it runs with.
        backend: an engine to use instead of the one that the settings name (tests).
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal backend
        if backend is None:
            claim(settings, os.environ)
            from . import backends

            backend = backends.create(settings)
        service = app.state.service = Service(settings, backend)
        metrics.describe(settings)
        server = metrics.MetricsServer(settings)
        await server.start()
        sd_notify("STATUS=loading the model")
        began = time.monotonic()
        try:
            await backend.start()
            await service.warm_up()
            service.set_state(State.READY)
            log.info("ready", extra={"seconds": round(time.monotonic() - began, 1), "model": settings.model_name})
            sd_notify("READY=1\nSTATUS=ready")
            watch = asyncio.create_task(service.watch())
            yield
            watch.cancel()
            # the server has ended what was under way, or its time was over
            if service.state is State.READY:
                service.set_state(State.DRAINING)
            sd_notify("STOPPING=1\nSTATUS=draining")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(service.idle.wait(), settings.drain_timeout_s)
        finally:
            await backend.stop()
            await server.stop()

    app = FastAPI(
        title="Qwen coder service",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.add_middleware(Envelope, settings=settings)
    _handlers(app)
    _routes(app)
    return app


def _handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error, request.scope["request_id"])

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return error_response(invalid(f"{place}: {first['msg']}.", param=place), request.scope["request_id"])

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kind = "invalid_request_error" if error.status_code < 500 else "api_error"
        response = error_response(ApiError(error.status_code, kind, str(error.detail)), request.scope["request_id"])
        response.headers.update(error.headers or {})
        return response


def _routes(app: FastAPI) -> None:
    @app.get("/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        """The service takes requests."""
        state = request.app.state.service.state
        return JSONResponse({"status": state.value}, 200 if state is State.READY else 503)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """The engine lives and takes requests."""
        service: Service = request.app.state.service
        if service.state is State.READY:
            try:
                await service.backend.check()
            except BackendDead as error:
                service.dead(error)
        healthy = service.state is State.READY
        return JSONResponse(
            {"status": "ok" if healthy else service.state.value, "model": service.settings.model_name}, 200 if healthy else 503
        )

    @app.post("/chat", response_model=ChatAnswer, response_model_exclude_none=True)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        service: Service = request.app.state.service
        question = Question([message.model_dump() for message in body.messages], body, body.max_tokens)
        form = ChatFormat(request.scope["request_id"], service.settings.model_name, body.return_token_ids)
        return await answer(service, question, form, request)

    @app.post("/v1/chat/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The same, as the OpenAI API has it."""
        service: Service = request.app.state.service
        name = service.settings.model_name
        if body.model is not None and body.model != name:
            raise invalid(f"model is '{body.model}'; this node serves '{name}'.", param="model", status=404)
        question = Question([message.turn() for message in body.messages], body, body.max_completion_tokens or body.max_tokens, body.tools)
        form = OpenAIFormat(request.scope["request_id"], name, bool(body.stream_options and body.stream_options.include_usage))
        return await answer(service, question, form, request)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The one model."""
        service: Service = request.app.state.service
        model = {"id": service.settings.model_name, "object": "model", "created": service.since, "owned_by": "qwen-coder-service"}
        return {"object": "list", "data": [model | {"max_model_len": service.backend.max_model_len}]}


async def answer(service: Service, question: Question, form: Format, request: Request) -> Response:
    """Admit a request, ask the engine, and answer."""
    began = time.perf_counter()
    service.admit()
    route: str = request.scope["path"]
    released = False

    def finish(outcome: str) -> None:
        nonlocal released
        if not released:
            released = True
            service.release()
            metrics.REQUESTS.labels(route, outcome).inc()

    try:
        prompt = await service.prompt(question)
        form.prompt_tokens = len(prompt)
        stream = question.sampled.stream
        details = request.scope["log"] = {"prompt_tokens": len(prompt), "stream": stream}
        if service.settings.log_prompts:
            details["messages"] = question.conversation
        # the engine's own id: a client may send the same id twice
        pieces = service.backend.generate(uuid.uuid4().hex, prompt, service.sampling(question, prompt), stream=stream)
        if stream:
            return EventStream(_events(service, form, request.scope["request_id"], pieces, details, began, finish))
        piece = await until_disconnect(_whole(pieces), request.receive)
        details["completion_tokens"] = len(piece.token_ids)
        finish("ok")
        return JSONResponse(form.whole(piece))
    except BackendDead as error:
        finish("dead")
        raise service.dead(error) from error
    except ClientGone:
        finish("aborted")
        raise
    except ApiError:
        finish("refused")
        raise
    except BaseException:
        finish("error")
        raise


async def _whole(pieces: AsyncIterator[Piece]) -> Piece:
    last = Piece("")
    async for piece in pieces:
        last = piece
    return last


async def _events(
    service: Service,
    form: Format,
    request_id: str,
    pieces: AsyncGenerator[Piece],
    details: dict[str, Any],
    began: float,
    finish: Callable[[str], None],
) -> AsyncGenerator[bytes]:
    """The events of a streamed answer; whatever ends it, the request is accounted for and the engine is told."""
    tokens, outcome, begun = 0, "aborted", False
    try:
        async for piece in pieces:
            tokens += len(piece.token_ids)
            head = b""
            if not begun:
                begun = True
                metrics.FIRST_TOKEN.observe(time.perf_counter() - began)
                head = form.begin()
            if piece.finish_reason is not None:
                outcome = "ok"
            yield head + form.part(piece, tokens)
    except BackendDead as error:
        outcome = "dead"
        yield sse(service.dead(error).body(request_id))
    finally:
        details["completion_tokens"], details["outcome"] = tokens, outcome
        finish(outcome)
        with contextlib.suppress(BackendDead):
            await pieces.aclose()
