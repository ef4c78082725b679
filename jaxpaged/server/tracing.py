"""A span for each request, sent to an OpenTelemetry collector, below the client's own where its headers name one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxpaged.outputs import RequestOutput

CONTEXT = ("traceparent", "tracestate")


class Tracing:
    """Makes spans and sends them from a thread of its own; where nobody takes them they are dropped."""

    def __init__(self, endpoint: str) -> None:
        """Spans go to `endpoint` as OTLP over HTTP, such as http://localhost:4318/v1/traces."""
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxpaged"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("jaxpaged")
        self._propagator = TraceContextTextMapPropagator()

    def observe(self, output: RequestOutput, num_generated: int, model: str, headers: Mapping[bytes, bytes]) -> None:
        """A span from the request's arrival to its end."""
        times = output.metrics
        if times is None or times.finished_time is None:
            return
        offset = time.time_ns() - time.monotonic_ns()
        carrier = {name: headers.get(name.encode(), b"").decode("latin-1") for name in CONTEXT}
        reason = output.outputs[0].finish_reason
        attributes: dict[str, Any] = {
            "gen_ai.request.id": output.request_id,
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": [str(completion.finish_reason) for completion in output.outputs],
            "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.cached_tokens": output.num_cached_tokens,
            "gen_ai.usage.completion_tokens": num_generated,
            "gen_ai.latency.e2e": times.finished_time - times.arrival_time,
        }
        told = {"time_in_queue": times.time_in_queue, "time_to_first_token": times.time_to_first_token}
        attributes |= {f"gen_ai.latency.{name}": seconds for name, seconds in told.items() if seconds is not None}
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=offset + round(1e9 * times.arrival_time),
        )
        if reason == "error":
            span.set_status(Status(StatusCode.ERROR, str(output.outputs[0].stop_reason)))
        span.end(offset + round(1e9 * times.finished_time))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
