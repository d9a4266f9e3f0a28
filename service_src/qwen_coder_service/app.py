"""The HTTP service: its life and its routes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from . import __version__, metrics
from .backends.base import Backend, BackendDead
from .errors import ApiError, invalid
from .formats import ChatFormat, Format, OpenAIFormat
from .lifecycle import COLLECTIONS, Sigterm, State, Watch, collect_when_idle, leave, sd_notify
from .schemas import ChatAnswer, ChatRequest, Completion, CompletionRequest, ErrorAnswer, Health, Models
from .service import Question, Service
from .settings import EX_CONFIG, Settings, claim
from .wire import Envelope, EventStream, until_disconnect

log = logging.getLogger("qwen_coder_service")


def create_app(settings: Settings, backend: Backend | None = None, leave: Callable[[int], object] = leave) -> FastAPI:
    """The application.

    Args:
        settings: what it runs with.
        backend: an engine to use instead of the one that the settings name (tests).
        leave: ends the process when the engine is gone (tests have something else to do then).
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = backend
        if engine is None:
            claim(settings, os.environ)
            from . import backends

            engine = backends.create(settings)
        service = app.state.service = Service(settings, engine, leave)
        server = metrics.MetricsServer(settings)
        await server.start()
        loop = asyncio.get_running_loop()
        stopping: list[asyncio.Task[None]] = []

        async def stop() -> None:
            await service.drain()
            sigterm.proceed()

        def terminated() -> None:
            if service.state is State.STARTING:  # the loop is not free before the model is loaded, and nobody waits for an answer
                engine.kill()
                leave(0)
            elif not stopping:
                loop.call_soon_threadsafe(lambda: stopping.append(loop.create_task(stop())))

        tasks: list[asyncio.Task[None]] = []
        sd_notify("STATUS=loading the model")
        began = time.monotonic()
        with Sigterm(terminated) as sigterm:
            try:
                try:
                    await engine.start()
                except ValueError as error:  # how engines say that they are set wrongly
                    print(" ".join(str(error).split()), file=sys.stderr, flush=True)
                    leave(EX_CONFIG)
                    raise
                await service.warm_up()
                metrics.describe(settings, engine.max_model_len)
                # what was loaded stays: the collector need not look at a million objects again while answers are made
                gc.collect()
                gc.freeze()
                gc.set_threshold(*COLLECTIONS)
                service.set_state(State.READY)
                log.info("ready", extra={"seconds": round(time.monotonic() - began, 1), "model": settings.model_name})
                sd_notify("READY=1\nSTATUS=ready")
                tasks.append(asyncio.create_task(Watch(engine, settings.stall_timeout_s, service.ended).run()))
                tasks.append(asyncio.create_task(collect_when_idle(service.idle)))
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await engine.stop()
                await server.stop()

    app = FastAPI(
        title="Qwen coder service",
        summary="Chats with a coding model: /chat, and the part of the OpenAI API that coding clients use.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    _handlers(app)
    _routes(app)
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    app.add_middleware(Envelope, settings=settings, routes=paths | {"/openapi.json"})
    return app


def _handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response(request.scope["request_id"])

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return invalid(f"{place}: {first['msg']}.", param=place).response(request.scope["request_id"])

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kind = "invalid_request_error" if error.status_code < 500 else "api_error"
        response = ApiError(error.status_code, kind, str(error.detail)).response(request.scope["request_id"])
        response.headers.update(error.headers or {})
        return response


def _errors(**meanings: str) -> dict[int | str, dict[str, Any]]:
    """Errors of a route, for the OpenAPI document: ``_errors(e503="...")``."""
    return {int(name.removeprefix("e")): {"model": ErrorAnswer, "description": meaning} for name, meaning in meanings.items()}


_ASKED = _errors(
    e400="The request is malformed, or prompt and answer do not fit the model.",
    e413="The body is larger than the service takes.",
    e503="The node is not ready, is stopping, is full, or its engine died. `Retry-After` says when to come back.",
)


def _streamed(example: str) -> dict[int | str, dict[str, Any]]:
    """The other form of a 200. Without a schema: OpenAPI 3.1 has none for what stands in an event."""
    description = "The answer; server-sent events if `stream` is true."
    return {200: {"description": description, "content": {"text/event-stream": {"example": example}}}}


def _routes(app: FastAPI) -> None:
    @app.get("/live", response_model=Health)
    async def live() -> Any:
        """The process answers."""
        return {"status": "live"}

    @app.get("/ready", response_model=Health, responses={503: {"model": Health, "description": "Not now."}})
    async def ready(request: Request) -> Response:
        """The service takes requests."""
        state = request.app.state.service.state
        return JSONResponse({"status": state.value}, 200 if state is State.READY else 503)

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "Not now."}})
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

    @app.post(
        "/chat",
        response_model=ChatAnswer,
        response_model_exclude_none=True,
        responses=_ASKED
        | _streamed(
            'data: {"id":"4f1c","delta":{"content":"def "}}\n\n'
            'data: {"id":"4f1c","delta":{"content":"add"},"model":"qwen","finish_reason":"length",'
            '"usage":{"prompt_tokens":30,"completion_tokens":2,"total_tokens":32}}\n\ndata: [DONE]\n\n'
        ),
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        service: Service = request.app.state.service
        question = Question([message.model_dump() for message in body.messages], body, body.max_tokens)
        form = ChatFormat(request.scope["request_id"], service.settings.model_name, body.return_token_ids)
        return await answer(service, question, form, request)

    @app.post(
        "/v1/chat/completions",
        response_model=Completion,
        responses=_ASKED
        | _errors(e404="Another model is asked for than this node serves.")
        | _streamed(
            'data: {"id":"chatcmpl-4f1c","created":1,"model":"qwen","object":"chat.completion.chunk",'
            '"choices":[{"index":0,"delta":{"content":"def "},"finish_reason":null,"logprobs":null}]}\n\ndata: [DONE]\n\n'
        ),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The same, as the OpenAI API has it."""
        service: Service = request.app.state.service
        name = service.settings.model_name
        if body.model is not None and body.model != name:
            raise invalid(f"model is '{body.model}'; this node serves '{name}'.", param="model", status=404)
        question = Question([message.turn() for message in body.messages], body, body.max_completion_tokens or body.max_tokens, body.tools)
        form = OpenAIFormat(request.scope["request_id"], name, bool(body.stream_options and body.stream_options.include_usage))
        return await answer(service, question, form, request)

    @app.get("/v1/models", response_model=Models)
    async def models(request: Request) -> Any:
        """The one model."""
        service: Service = request.app.state.service
        model = {"id": service.settings.model_name, "object": "model", "created": service.since, "owned_by": "qwen-coder-service"}
        return {"object": "list", "data": [model | {"max_model_len": service.backend.max_model_len}]}


async def answer(service: Service, question: Question, form: Format, request: Request) -> Response:
    """Admit a request, ask the engine, and answer."""
    service.admit()
    scope, stream = request.scope, None
    try:
        prompt = await service.prompt(question)
        form.prompt = prompt
        scope["details"] |= {"prompt_tokens": len(prompt), "stream": question.sampled.stream}
        if service.settings.log_prompts:
            scope["details"]["messages"] = question.conversation
        # the engine's own id: a client may send the same id twice
        pieces = service.backend.generate(
            uuid.uuid4().hex, prompt, service.sampling(question, prompt), stream=question.sampled.stream, trace=scope.get("trace")
        )
        if question.sampled.stream:
            stream = EventStream(service.events(form, pieces, scope), service.release)
            return stream
        return JSONResponse(await until_disconnect(service.whole(form, pieces, scope), request.receive))
    finally:
        if stream is None:
            service.release()
