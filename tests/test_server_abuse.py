"""What hostile or careless clients send: refused as their own fault, at no cost to anybody else, and no page lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from running_server import jaxpaged_serve, running
from tiny_chat_model import write_chat_model

from jaxpaged.__main__ import main
from jaxpaged.server.connection import BoundedConnection

ROOT = Path(__file__).parents[1]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"prompt": "banana", "temperature": 0, "max_tokens": 8}
LONG = {"prompt": "ban", "temperature": 0, "max_tokens": 400, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("abused") / "model")


@pytest.fixture(scope="module")
def server(folder):
    with running(folder) as server:
        yield server


@pytest.fixture(scope="module")
def right(server):
    return server.post(COMPLETIONS, **GREEDY).json()["choices"][0]["text"]


@contextmanager
def slow_steps(server, seconds):
    step = server.inner.step
    server.inner.step = lambda: (time.sleep(seconds), step())[1]
    yield
    server.inner.step = step


# Poison

NO_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", '"1"', '"NaN"', "[]", "{}", "true"]
NUMBERS = ["-1", "-1e30", "1e30", "1" + "0" * 30, "9" * 400, "9" * 5000]  # of some fields, some may be served
FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed", "priority"),
)


def with_field(field, number):
    rest = "" if field == "max_tokens" else ', "max_tokens": 2'
    return f'{{"prompt": "ban"{rest}, "{field}": {number}}}'


BODY_POISON = {
    "nothing": "",
    "no object": "[]",
    "null": "null",
    "half": '{"prompt": "ban"',
    "twice": '{"prompt": "ban"}{}',
    "no prompt": "{}",
    "prompt null": '{"prompt": null}',
    "prompt number": '{"prompt": 3}',
    "prompt object": '{"prompt": {}}',
    "empty prompt": '{"prompt": ""}',
    "empty list": '{"prompt": []}',
    "list of nothing": '{"prompt": [[]]}',
    "list of empty text": '{"prompt": ["ban", ""]}',
    "mixed list": '{"prompt": ["ban", 3]}',
    "mixed lists": '{"prompt": [[3], "ban"]}',
    "deeper list": '{"prompt": [[[3]]]}',
    "booleans": '{"prompt": [[true, false]]}',
    "floats": '{"prompt": [[1.5]]}',
    "negative id": '{"prompt": [-1]}',
    "id past the vocabulary": '{"prompt": [1000000]}',
    "id past all integers": '{"prompt": [[' + "9" * 400 + "]]}",
    "lone surrogate": '{"prompt": "ban\\ud800"}',
    "lone surrogate in stop": '{"prompt": "ban", "stop": "\\udfff"}',
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "nested": "[" * 100_000,
    "nested object": '{"prompt": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}",
    "4 MB of text": json.dumps({"prompt": "banana " * 600_000}),
    "4 MB of one character": json.dumps({"prompt": "a" * 4_000_000}),
    "2 MB of ids": json.dumps({"prompt": [[1] * 700_000]}),
    "too many prompts": json.dumps({"prompt": [[1]] * 2_000}),
    "too long": json.dumps({"prompt": [1] * 512}),
    "n past the bound": '{"prompt": "ban", "n": 129}',
    "prompts times n": json.dumps({"prompt": ["x"] * 2, "n": 1_000_000_000}),
    "unknown model": '{"prompt": "ban", "model": "gpt-4"}',
    "model number": '{"prompt": "ban", "model": 3}',
    "stops": json.dumps({"prompt": "ban", "stop": ["x"] * 65}),
    "long stop": json.dumps({"prompt": "ban", "stop": "x" * 5_000}),
    "empty stop in a list": '{"prompt": "ban", "stop": [""]}',
    "stop numbers": '{"prompt": "ban", "stop": [3]}',
    "biases": json.dumps({"prompt": "ban", "logit_bias": {str(i): 1 for i in range(2_000)}}),
    "bias name": '{"prompt": "ban", "logit_bias": {"x": 1}}',
    "bias id": '{"prompt": "ban", "logit_bias": {"100000": 1}}',
    "bias huge": '{"prompt": "ban", "logit_bias": {"1": 1e300}}',
    "bias text": '{"prompt": "ban", "logit_bias": {"1": "x"}}',
    "bias list": '{"prompt": "ban", "logit_bias": [1]}',
    "stop ids": '{"prompt": "ban", "stop_token_ids": [1000000]}',
    "negative stop id": '{"prompt": "ban", "stop_token_ids": [-5]}',
    "allowed nothing": '{"prompt": "ban", "allowed_token_ids": []}',
    "bad words empty": '{"prompt": "ban", "bad_words": [""]}',
    "stream text": '{"prompt": "ban", "stream": "yes"}',
    "stream options alone": '{"prompt": "ban", "stream_options": {"include_usage": true}}',
    "streamed and empty": '{"prompt": "", "stream": true}',
    "streamed and too long": json.dumps({"prompt": [1] * 600, "stream": True}),
    "top_p 0": '{"prompt": "ban", "top_p": 0}',
    "priority": '{"prompt": "ban", "priority": 5}',
    "request id empty": '{"prompt": "ban", "request_id": ""}',
    "request id long": json.dumps({"prompt": "ban", "request_id": "x" * 300}),
    "best of fewer": '{"prompt": "ban", "n": 2, "best_of": 1}',
    "best of very many": '{"prompt": "ban", "best_of": 1000000000}',
    "best of a stream": '{"prompt": "ban", "best_of": 3, "stream": true}',
    "suffix": '{"prompt": "ban", "suffix": "x"}',
    "beam search": '{"prompt": "ban", "use_beam_search": true}',
    "grammar": '{"prompt": "ban", "guided_regex": "(a+"}',
    "schema": '{"prompt": "ban", "response_format": {"type": "json_schema", "json_schema": {}}}',
}
CHAT_POISON = {
    "no messages": "{}",
    "empty": '{"messages": []}',
    "text": '{"messages": "hi"}',
    "numbers": '{"messages": [3]}',
    "no role": '{"messages": [{"content": "hi"}]}',
    "role number": '{"messages": [{"role": 3, "content": "hi"}]}',
    "no content": '{"messages": [{"role": "user"}]}',
    "content number": '{"messages": [{"role": "user", "content": 3}]}',
    "image": '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
    "surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "4 MB": json.dumps({"messages": [{"role": "user", "content": "x" * 4_000_000}]}),
    "many": json.dumps({"messages": [{"role": "user", "content": "hi"}] * 20_000}),
    "tools": '{"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}',
    "top_logprobs alone": '{"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2}',
    "top_logprobs 21": '{"messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 21}',
    "logprobs number": '{"messages": [{"role": "user", "content": "hi"}], "logprobs": 3}',
    "max_completion_tokens 0": '{"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 0}',
}
OTHER_POISON = [
    ("/tokenize", "{}"),
    ("/tokenize", '{"prompt": "x", "messages": []}'),
    ("/tokenize", json.dumps({"prompt": "x" * 4_000_000})),
    ("/detokenize", '{"tokens": [-1]}'),
    ("/detokenize", '{"tokens": [4294967296]}'),
    ("/detokenize", '{"tokens": "x"}'),
]
POISON = [
    *((COMPLETIONS, body) for body in BODY_POISON.values()),
    *((COMPLETIONS, with_field(field, number)) for field in FIELDS for number in NO_NUMBERS),
    *((CHAT, body) for body in CHAT_POISON.values()),
    *OTHER_POISON,
]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_poison_is_the_clients_fault_and_harms_nobody(server, right, every):
    """One request after the other, and a good one after each."""
    assert len(POISON) >= 200
    for path, body in POISON[::every]:
        shown = f"{path} {body[:90]!r}"
        answer = server.http.post(path, content=body, headers=JSON)
        assert 400 <= answer.status_code < 500, (shown, answer.status_code, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and 0 < len(error["message"]) < 700, shown
        assert server.post(COMPLETIONS, **GREEDY).json()["choices"][0]["text"] == right, shown
    assert server.pages_held() == 0


@pytest.mark.slow
def test_what_is_nested_without_end_is_the_clients_fault(server, right, monkeypatch):
    template = "<tool_call>{{ tools | tojson }}{{ persona }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", template)
    said = '"messages": [{"role": "user", "content": "x"}], "max_tokens": 2'
    for depth in (600, 900, 100_000):
        deep = '{"a": ' * depth + "1" + "}" * depth
        tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}'
        for body in (
            f'{{{said}, "tools": [{tool}]}}',
            f'{{{said}, "tools": [{tool}], "tool_choice": "required"}}',
            f'{{{said}, "tools": [{deep}]}}',
            f'{{{said}, "tool_choice": {deep}}}',
            f'{{{said}, "chat_template_kwargs": {{"persona": {deep}}}}}',
            f'{{{said}, "chat_template_kwargs": {{"thinking": {deep}}}}}',
            f'{{{said}, "response_format": {deep}}}',
            f'{{"messages": [{{"role": "user", "content": "x", "z": {deep}}}]}}',
            f'{{"messages": [{{"role": "user", "content": [{deep}]}}]}}',
        ):
            answer = server.http.post(CHAT, content=body, headers=JSON)
            assert answer.status_code == 400, (body[:120], answer.text)
    assert server.post(COMPLETIONS, **GREEDY).json()["choices"][0]["text"] == right


def test_extreme_numbers_are_served_or_refused(server, right):
    for field in FIELDS:
        for number in NUMBERS:
            answer = server.http.post(COMPLETIONS, content=with_field(field, number), headers=JSON)
            assert answer.status_code in (200, 400), (field, number[:9], answer.text)
        assert server.post(COMPLETIONS, **GREEDY).json()["choices"][0]["text"] == right, field
    assert server.pages_held() == 0


def test_special_tokens_in_a_message_are_no_fault(server, right):
    special = server.engine.tokenizer.backend.id_to_token(min(server.engine.tokenizer.special_token_ids))
    answer = server.post(CHAT, messages=[{"role": "user", "content": f"ban {special} an"}], max_tokens=2)
    assert answer.status_code == 200
    tokens = server.post("/tokenize", messages=[{"role": "user", "content": f"ban {special} an"}]).json()["tokens"]
    assert not server.engine.tokenizer.special_token_ids & set(tokens)
    assert server.engine.tokenizer.decode(tokens) == f"user:ban {special} an\nassistant:"
    assert server.post(COMPLETIONS, **GREEDY).json()["choices"][0]["text"] == right


def test_request_id_in_use_is_refused(server):
    asked = LONG | {"request_id": "me", "stream": True}
    with (
        slow_steps(server, 0.01),
        server.http.stream("POST", COMPLETIONS, json=asked),
    ):
        answer = server.post(COMPLETIONS, **GREEDY, request_id="me")
        assert answer.status_code == 400 and "in use" in answer.json()["error"]["message"]
    assert server.pages_held() == 0


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", COMPLETIONS, {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("GET", "/etc/passwd", {}, 404),
        ("GET", "/../../etc/passwd", {}, 404),
        ("POST", COMPLETIONS, {"Content-Type": "text/plain"}, 415),
        ("POST", COMPLETIONS, {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", COMPLETIONS, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_wrong_method_path_type_and_size(server, method, path, headers, status):
    answer = server.http.request(method, path, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert ("allow" in answer.headers) == (status == 405), "it says which methods there are"


def test_a_message_quotes_little_of_what_was_sent(server):
    answer = server.post(COMPLETIONS, prompt="x", model="m" * 5_000)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 404 and len(message) < 700 and message.startswith("there is no model 'mmm")


def test_openais_client_raises_its_own_errors(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="temperature is -1; it must be a finite number"):
            client.completions.create(model="tiny", prompt="x", temperature=-1)
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'; known: tiny, tiny-too"):
            client.completions.create(model="other", prompt="x")


# Sizes and times


def test_body_is_counted_while_it_comes(server):
    def pieces():
        for _ in range(12):
            yield b" " * (1 << 20)

    answer = server.http.post(COMPLETIONS, content=pieces(), headers=JSON)
    assert answer.status_code == 413 and "at most 8,388,608 are taken" in answer.text


def raw(server, *pieces, once=False):
    """What a bare socket gets for these bytes until it is closed, or at `once`."""
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
        received = b""
        try:
            while data := connection.recv(65_536):
                received += data
                if once:
                    break
        except OSError:
            pass
        return received


def test_bodies_together_are_bounded_and_short_ones_always_come_in(server, right):
    room, piece = server.app._room, b" " * (1 << 20)

    async def one(is_given, size, end):
        """A body that waits, all but its end, until that is asked for: the status of its answer."""
        answers, pieces = [], [piece] * size

        async def receive():
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}
            waits_for = asyncio.Event() if is_given.is_set() else end  # nobody goes away
            is_given.set()
            await waits_for.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            is_given.set()
            answers.append(message)

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": []}
        await server.app(scope, receive, send)
        return answers[0]["status"], answers[1]["body"]

    async def many():
        end, given = asyncio.Event(), [asyncio.Event() for _ in range(100)]
        tasks = [asyncio.create_task(one(is_given, 7, end)) for is_given in given]
        for is_given in given:
            await is_given.wait()
        assert 0 <= room.left < 7 << 20
        served = await asyncio.to_thread(lambda: server.post(COMPLETIONS, **GREEDY))
        refused = await asyncio.to_thread(lambda: server.post(COMPLETIONS, user="x" * (7 << 20), **GREEDY))
        end.set()
        return served, refused, await asyncio.gather(*tasks)

    served, refused, answers = asyncio.run(many())
    assert served.json()["choices"][0]["text"] == right
    assert refused.status_code == 429 and refused.headers["retry-after"] and "bodies of 64 MB" in refused.text
    assert [status for status, _ in answers].count(415) == 9, "as many as there was room for came in whole"
    assert [status for status, _ in answers].count(429) == 91
    assert room.left == room.size
    assert server.post(COMPLETIONS, user="x" * (7 << 20), **GREEDY).status_code == 200


def test_announced_size_is_enough_to_refuse(server):
    assert raw(server, HEAD % 9_000_000_000, once=True).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /health HTTP/1.1\r\nHost: x\r\n", *[b"X-A: " + b"a" * 8_000 + b"\r\n"] * 400],
        [b"GET /health HTTP/1.1\r\nX-A: ", *[b"a" * 60_000] * 100],
        [b"GET /", *[b"a" * 60_000] * 100],
        [b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(200)) + b"\r\n"],
        [b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 66_000 + b"\r\n\r\n"],
    ],
    ids=["fields", "one field", "url", "200 fields", "in one piece"],
)
def test_header_is_bounded(server, pieces):
    received = raw(server, *pieces)
    assert received.startswith(b"HTTP/1.1 431 ") or received == b"", received[:200]
    assert server.http.get("/health").status_code == 200


def test_slow_header_and_slow_body_are_cut_off(folder, monkeypatch):
    monkeypatch.setattr(BoundedConnection, "header_timeout", 0.3)
    with running(folder, body_timeout=0.3) as server:
        began = time.monotonic()
        assert raw(server).startswith(b"HTTP/1.1 408 "), "a connection that says nothing"
        assert raw(server, b"GET /health HTTP/1.1\r\nHo").startswith(b"HTTP/1.1 408 ")
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        assert raw(server, head, b'{"prompt"').startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 5
        assert server.http.get("/health").status_code == 200
        time.sleep(0.5)
        assert server.http.get("/health").status_code == 200, "a kept connection may be idle"


# Clients that go away


def test_disconnects_at_any_time_leak_no_page(server, right):
    rng = random.Random(0)
    before = server.inner.stats().generation_tokens
    with slow_steps(server, 0.002):
        for turn in range(40):
            body = json.dumps(LONG | {"stream": turn % 2 == 0, "n": rng.choice([1, 3])}).encode()
            whole = turn % 3 > 0
            with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
                connection.sendall(HEAD % len(body) + body[: len(body) if whole else 9])
                time.sleep(rng.choice([0, 0.001, 0.01, 0.03]))
                if whole and turn % 2 == 0:
                    connection.recv(1_000)
    assert server.pages_held() == 0
    assert server.inner.stats().generation_tokens - before < 6_000, "over 20,000 were asked for"
    assert server.http.get("/load").json() == {"server_load": 0}
    assert server.post(COMPLETIONS, **GREEDY).json()["choices"][0]["text"] == right


# Overload, hanging, death


def test_overload_is_refused_at_once(folder):
    with running(folder, queued=2) as server, slow_steps(server, 0.02):
        results = []

        def ask():
            began = time.monotonic()
            with httpx.Client(base_url=server.url, timeout=60) as client:
                answer = client.post(COMPLETIONS, json=LONG | {"max_tokens": 30})
            results.append((answer.status_code, answer.headers.get("retry-after"), time.monotonic() - began))

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _, _ in results]
        assert statuses.count(200) >= 6 and statuses.count(429) >= 6 and len(results) == 24
        assert {retry for status, retry, _ in results if status == 429} == {"1"}
        slowest = max(seconds for status, _, seconds in results if status == 429)
        assert slowest < min(seconds for status, _, seconds in results if status == 200)
        assert server.pages_held() == 0


def test_hanging_engine_is_not_healthy_and_a_dead_one_says_so(folder, capfd):
    from jaxpaged.server.serve import Watchdog

    with (
        running(folder, hang_timeout=0.2) as server,
        open(os.devnull, "w") as nowhere,
        Watchdog(server.engine, 0.2, nowhere),
    ):
        step, go_on = server.inner.step, threading.Event()
        server.inner.step = lambda: (go_on.wait(20), step())[1]
        with server.http.stream("POST", COMPLETIONS, json=GREEDY | {"stream": True}) as response:
            deadline = time.monotonic() + 10
            while server.http.get("/health").status_code == 200:
                assert time.monotonic() < deadline
            assert "in one step" in server.http.get("/health").text
            assert server.http.get("/metrics").status_code == 200
            server.inner.step = step
            go_on.set()
            assert "[DONE]" in response.read().decode()
        assert server.http.get("/health").status_code == 200

        def fail():
            raise RuntimeError("device lost")

        server.inner.step = fail
        answer = server.post(COMPLETIONS, **GREEDY)
        assert answer.status_code == 503 and "device lost" in answer.json()["error"]["message"]
        assert server.http.get("/health").status_code == 503
        assert server.post(COMPLETIONS, **GREEDY).status_code == 503


def test_failure_in_the_midst_of_a_stream_is_told_in_it(folder):
    with running(folder) as server, slow_steps(server, 0.02):
        with server.http.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.engine.stop()
            rest = [line for line in lines if line]
        assert "the engine was stopped" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert rest[-1] == "data: [DONE]"


# The process


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_drains_and_a_second_one_ends_at_once(folder, signals):
    process = jaxpaged_serve(folder, "--port", "0", "--served-model-name", "tiny")
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[0].startswith("tiny: up to 4 sequences") and "listening at http://127.0.0.1:" in lines[1]
        url = lines[1].split()[2].rstrip(",")
        body = LONG | {"n": 4, "stream": True}
        httpx.post(url + COMPLETIONS, json=body, timeout=120)  # compiles
        with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60) as response:
            chunks = response.iter_lines()
            next(chunks)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.05)
            if signals == 1:
                refused = httpx.post(url + COMPLETIONS, json=GREEDY)
                assert refused.status_code == 503 and "shutting down" in refused.text
                assert httpx.get(url + "/health").status_code == 503
                assert [line for line in chunks if line][-1] == "data: [DONE]"
        assert process.wait(20) == (0 if signals == 1 else 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()


def test_port_in_use_is_one_line(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err == f"error: cannot listen at 127.0.0.1:{port}: Address already in use; choose another --port\n"
    )


def test_missing_extra_is_one_line(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("jaxpaged.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    assert main(["serve", str(folder)]) == 2
    assert capsys.readouterr().err == "error: msgspec is not installed; run pip install 'jaxpaged[serve]'\n"
