"""OpenTelemetry traces, when ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` is set: a span a request, with the engine's own below it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import __version__
from .settings import Settings


class Tracing:
    """Makes spans and sends them to the endpoint, from a thread of its own.

    The protocol is OpenTelemetry's ``OTEL_EXPORTER_OTLP_TRACES_PROTOCOL``, ``grpc`` (as vLLM has it) or ``http/protobuf``; so are the
    other ``OTEL_*`` variables, which the library reads by itself.
    """

    def __init__(self, settings: Settings) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        exporter: SpanExporter
        if os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc") == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

            exporter = Grpc(endpoint=settings.otlp_traces_endpoint, insecure=True)
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

            exporter = Http(endpoint=settings.otlp_traces_endpoint)
        # not the library's global one, which is the engine's
        self._provider = TracerProvider(resource=Resource.create({"service.name": "qwen-coder-service", "service.version": __version__}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("qwen_coder_service", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Any:
        """Start the span of a request, below that of its caller if it has one."""
        from opentelemetry.trace import SpanKind

        carrier = {name: headers[name.encode()].decode("latin-1") for name in ("traceparent", "tracestate") if name.encode() in headers}
        attributes = {"http.request.method": method, "http.route": path}
        return self._tracer.start_span(f"{method} {path}", self._propagator.extract(carrier), SpanKind.SERVER, attributes)

    def below(self, span: Any) -> dict[str, str]:
        """The headers by which the engine puts its spans below this one."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier

    def end(self, span: Any, request_id: str, status: int, outcome: str, details: Mapping[str, Any]) -> None:
        """End a span with what became of the request."""
        from opentelemetry.trace import StatusCode

        span.set_attribute("http.response.status_code", status)
        span.set_attribute("qwen.request_id", request_id)
        span.set_attribute("qwen.outcome", outcome)
        for name, key in (("gen_ai.usage.input_tokens", "prompt_tokens"), ("gen_ai.usage.output_tokens", "completion_tokens")):
            if key in details:
                span.set_attribute(name, details[key])
        if status >= 500:
            span.set_status(StatusCode.ERROR, outcome)
        span.end()

    def stop(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
