"""Spans as a collector gets them: of each request one, with its times, below the client's own."""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from running_server import running
from tiny_chat_model import write_chat_model

from jaxpaged.__main__ import main

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector():
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def spans_of(bodies):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    for path, body in bodies:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                yield from scope.spans


def attributes_of(span):
    values = {attribute.key: attribute.value for attribute in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_each_request_is_a_span_with_its_times_below_the_clients(tmp_path, collector):
    from jaxpaged.server.tracing import Tracing

    endpoint, bodies = collector
    tracing = Tracing(endpoint)
    before = time.time_ns()
    with running(write_chat_model(tmp_path / "model"), tracing=tracing) as server:
        asked = {"prompt": ["ban", "an"], "max_tokens": 4, "temperature": 0, "request_id": "mine"}
        server.http.post("/v1/completions", json=asked, headers={"traceparent": PARENT})
        server.post("/v1/embeddings", input="ban")
    tracing.close()
    spans = {attributes_of(span)["gen_ai.request.id"]: span for span in spans_of(bodies)}
    assert len(spans) == 3
    first, second, alone = spans.pop("cmpl-mine-0"), spans.pop("cmpl-mine-1"), spans.popitem()[1]
    for span in (first, second):
        assert span.trace_id.hex() == PARENT.split("-")[1] and span.parent_span_id.hex() == PARENT.split("-")[2]
    assert alone.trace_id != first.trace_id and not alone.parent_span_id
    found = attributes_of(first)
    assert found["gen_ai.usage.completion_tokens"] == 4 and found["gen_ai.response.model"] == "tiny"
    seconds = (first.end_time_unix_nano - first.start_time_unix_nano) / 1e9
    assert found["gen_ai.latency.e2e"] == pytest.approx(seconds, abs=1e-4)
    assert 0 < found["gen_ai.latency.time_in_queue"] <= found["gen_ai.latency.time_to_first_token"] <= seconds
    assert before < first.start_time_unix_nano < first.end_time_unix_nano < time.time_ns()
    assert attributes_of(alone)["gen_ai.usage.completion_tokens"] == 0


def test_missing_extra_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "jaxpaged.server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    folder = write_chat_model(tmp_path / "model")
    assert main(["serve", str(folder), "--port", "0", "--otlp-traces-endpoint", "http://localhost:1"]) == 2
    assert "pip install 'jaxpaged[otel]'" in capsys.readouterr().err
