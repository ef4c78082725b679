"""Requests that schemathesis makes of our OpenAPI document, right ones and wrong ones: none makes the server fail.

schemathesis is not among the test extras: `make test-fuzz` installs it.
"""

from __future__ import annotations

import os

import pytest
from running_server import running
from tiny_chat_model import write_chat_model

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

NUM_CASES = int(os.environ.get("NUM_CASES", "2000"))
BODIES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/score", "/v1/rerank"),
    *("/tokenize", "/detokenize"),
)


def shorten(body):
    """What would be served for minutes is asked for in little; what is wrong stays wrong."""
    if not isinstance(body, dict):
        return
    for name, most in (("max_tokens", 2), ("max_completion_tokens", 2), ("max_output_tokens", 16), ("n", 2)):
        value = body.get(name)
        if isinstance(value, int) and most < value <= 128:
            body[name] = most
    if "max_completion_tokens" not in body and "messages" in body:
        body.setdefault("max_tokens", 2)
    if "input" in body and isinstance(body["input"], (str, list)):
        body.setdefault("max_output_tokens", 16)


@pytest.mark.slow
def test_2000_requests_made_from_the_document_bring_no_5xx(tmp_path):
    with running(write_chat_model(tmp_path / "model"), queued=64) as server:
        schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
        operations = [result.ok() for result in schema.get_all_operations()]
        with_body = sum(operation.path in BODIES for operation in operations)
        statuses, faults = [], []
        for operation in operations:

            @hypothesis.settings(
                max_examples=NUM_CASES // with_body + 1 if operation.path in BODIES else 4,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy())
            def ask(case):
                shorten(case.body)
                answer = case.call(base_url=server.url, timeout=60)
                statuses.append(answer.status_code)
                if answer.status_code >= 500:
                    faults.append((case.method, case.path, case.body, answer.status_code, answer.text))

            ask()
        assert len(statuses) >= NUM_CASES
        assert not faults, faults[:3]
        assert {200, 400} <= set(statuses)
        assert server.pages_held() == 0
