"""The HTTP API over loopback: what OpenAI's own client gets, and that it is what the engine says."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import openai
import pytest
from running_server import running
from tiny_chat_model import write_chat_model
from tiny_vocabularies import byte_level_metadata
from tokenizers.processors import TemplateProcessing

from jaxpaged.engine.tokenizer import load_tokenizer
from jaxpaged.outputs import Logprob
from jaxpaged.server.answers import prompt_logprobs
from jaxpaged.server.truncation import _last

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 6}
HELLO = [{"role": "user", "content": "ban"}]
RENDERED = "user:ban\nassistant:"

pytestmark = pytest.mark.usefixtures("no_page_is_leaked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, enable_admin=True) as server:
        yield server


def ids(server, text):
    return server.engine.tokenizer.encode(text)


# Completions


def test_completion_is_the_engines(server, client):
    answer = client.completions.create(prompt="ban", **GREEDY)
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids(server, "ban")), 6)
    raw = client.completions.create(prompt="ban", extra_body={"return_token_ids": True}, **GREEDY).choices[0]
    assert server.engine.tokenizer.decode(raw.token_ids) == choice.text
    assert raw.prompt_token_ids == ids(server, "ban")
    unbounded = server.post("/v1/completions", prompt="ban", temperature=0, ignore_eos=True).json()
    assert unbounded["usage"]["completion_tokens"] == 16, "as in OpenAI's API"


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_are_answered_in_their_order(server, client, as_ids):
    texts = ["ban", "an 12", "123"]
    prompts = [ids(server, text) for text in texts] if as_ids else texts
    together = client.completions.create(prompt=prompts, n=2, **GREEDY)
    alone = [client.completions.create(prompt=text, **GREEDY).choices[0].text for text in texts]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]


def test_one_prompt_of_token_ids(server, client):
    by_ids = client.completions.create(prompt=ids(server, "ban"), **GREEDY).choices[0].text
    assert by_ids == client.completions.create(prompt="ban", **GREEDY).choices[0].text


def test_streamed_pieces_add_up_and_usage_comes_last(client):
    whole = client.completions.create(prompt=["ban", "123"], n=2, **GREEDY)
    chunks = list(
        client.completions.create(
            prompt=["ban", "123"], n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    texts = [""] * 4
    reasons = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.index not in reasons
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == dict.fromkeys(range(4), "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_scoring_as_lm_eval_asks_for_it(server):
    tokens = ids(server, "banana 123")
    asked = {"prompt": [tokens], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    (choice,) = server.post("/v1/completions", model="tiny", **asked).json()["choices"]
    found = choice["logprobs"]
    expected = server.post("/v1/completions", model="tiny", prompt=[tokens], prompt_logprobs=1, max_tokens=1).json()
    engine_says = expected["choices"][0]["prompt_logprobs"]
    assert {len(found[name]) for name in found} == {len(tokens) + 1}
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for place, token in enumerate(tokens[1:], 1):
        entry = engine_says[place]
        assert found["token_logprobs"][place] == pytest.approx(entry[str(token)]["logprob"], abs=1e-4)
        best = max(entry.values(), key=lambda e: e["logprob"])
        top = found["top_logprobs"][place]
        assert max(top.values()) == pytest.approx(best["logprob"], abs=1e-4)
        assert (max(top, key=top.get) == found["tokens"][place]) == (entry[str(token)]["rank"] == 1)
    assert choice["text"].startswith("banana 123")


def test_echo_without_new_tokens(server):
    asked = {"model": "tiny", "prompt": "banana", "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = server.post("/v1/completions", **asked).json()["choices"]
    assert choice["text"] == "banana" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(ids(server, "banana"))
    assert "".join(choice["logprobs"]["tokens"]) == "banana"


def test_text_offsets_point_into_the_text(server):
    asked = GREEDY | {"prompt": "banana 12", "echo": True, "logprobs": 2, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=asked) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    logprobs = [json.loads(line)["choices"][0]["logprobs"] for line in lines[:-1]]
    tokens = [token for part in logprobs for token in part["tokens"]]
    offsets = [offset for part in logprobs for offset in part["text_offset"]]
    prompt = [(o, t) for o, t in zip(offsets, tokens, strict=True) if o < len("banana 12")]
    assert all("banana 12"[offset:].startswith(token) for offset, token in prompt)
    assert offsets == sorted(offsets) and len(tokens) == len(ids(server, "banana 12")) + 6


def test_best_of_gives_the_likeliest(client):
    drawn = {"model": "tiny", "prompt": "ban", "seed": 3, "max_tokens": 6, "temperature": 2, "logprobs": 0}
    total = lambda choice: sum(choice.logprobs.token_logprobs)  # noqa: E731
    every = client.completions.create(n=4, **drawn).choices
    best = client.completions.create(n=1, best_of=4, **drawn).choices
    assert [choice.text for choice in best] == [max(every, key=total).text]
    with pytest.raises(openai.BadRequestError, match="the best are known only in the end"):
        client.completions.create(n=1, best_of=4, stream=True, **drawn)


# Chats


def test_chat_renders_the_template(server, client):
    answer = client.chat.completions.create(messages=HELLO, **GREEDY)
    plain = client.completions.create(prompt=RENDERED, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", plain.choices[0].text)
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_chat_streams_a_role_then_pieces_then_a_reason(client):
    whole = client.chat.completions.create(messages=HELLO, **GREEDY).choices[0].message.content
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(messages=HELLO, stream=True, **GREEDY)]
    assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", "")
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


def test_chat_logprobs(server, client):
    answer = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy
        assert entry.top_logprobs[0].token == entry.token
    assert (
        bytes(byte for entry in content for byte in entry.bytes)
        .decode(errors="replace")
        .startswith(answer.choices[0].message.content[:1])
    )


def test_max_completion_tokens_bounds_and_without_it_the_models_length_does(server, client):
    few = client.chat.completions.create(messages=HELLO, model="tiny", max_completion_tokens=3, temperature=0)
    assert few.usage.completion_tokens <= 3
    long = server.post("/v1/chat/completions", messages=HELLO, temperature=0, ignore_eos=True).json()
    assert long["usage"]["total_tokens"] == server.engine.max_model_len


def test_an_answer_longer_than_there_is_room_for_is_refused_with_the_numbers(server):
    most = server.engine.max_model_len
    for path, asked, name in (
        ("/v1/completions", {"prompt": "ban"}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HELLO}, "max_tokens"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}, "max_completion_tokens"),
        ("/v1/responses", {"input": "ban"}, "max_output_tokens"),
    ):
        prompt = len(ids(server, "ban" if path == "/v1/completions" else RENDERED))
        left, asked = most - prompt, asked | {"temperature": 0, "stop": ["a", "b"]}
        assert server.post(path, **asked, **{name: left}).status_code == 200
        fault = server.post(path, **asked, **{name: left + 1})
        assert (fault.status_code, fault.json()["error"]["code"]) == (400, "context_length_exceeded")
        message = fault.json()["error"]["message"]
        assert f"{prompt:,} tokens and max_tokens is {left + 1:,}, but max_model_len is {most:,}" in message
        assert f"set max_tokens to {left:,} or less" in message


def test_async_client_runs_many_at_once(server, client):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            calls = [client.completions.create(prompt="ban" + "an" * i, **GREEDY) for i in range(12)]
            return await asyncio.gather(*calls)

    answers = asyncio.run(run())
    alone = [client.completions.create(prompt="ban" + "an" * i, **GREEDY) for i in range(12)]
    assert [a.choices[0].text for a in answers] == [a.choices[0].text for a in alone]


# Parameters


def test_seed_repeats_and_stop_stops(client):
    drawn = {"model": "tiny", "prompt": "ban", "max_tokens": 12, "temperature": 1.5}
    first, second, other = (client.completions.create(seed=seed, **drawn).choices[0].text for seed in (7, 7, 8))
    assert first == second != other
    assert client.completions.create(seed=7, stop="", **drawn).choices[0].text == first, "an empty text is no stop"
    stop = first[2:4]
    stopped = client.completions.create(seed=7, stop=[stop], **drawn).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (first.split(stop)[0], "stop", stop)


def test_vllms_extras_reach_the_engine(server, client):
    plain = server.post("/v1/completions", prompt="ban", return_token_ids=True, **GREEDY).json()["choices"][0]
    token = plain["token_ids"][0]
    options = {"stop_token_ids": [token], "min_tokens": 0, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0}
    stopped = server.post("/v1/completions", prompt="ban", return_token_ids=True, **GREEDY | options).json()
    assert (stopped["choices"][0]["token_ids"], stopped["choices"][0]["stop_reason"]) == ([token], token)
    biased = client.completions.create(prompt="ban", logit_bias={str(token): -100}, logprobs=0, **GREEDY)
    assert biased.choices[0].logprobs.tokens[0] != server.engine.tokenizer.token_text(token)
    named = server.post("/v1/completions", prompt="ban", logprobs=0, return_tokens_as_token_ids=True, **GREEDY).json()
    assert named["choices"][0]["logprobs"]["tokens"][0] == f"token_id:{token}"


# The rest


def test_models_version_load_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-too"]
    assert client.models.retrieve("tiny-too") == client.models.list().data[1]
    with pytest.raises(openai.NotFoundError, match="there is no model 'no/such'"):
        client.models.retrieve("no/such")
    assert set(server.http.get("/version").json()) == {"version"}
    assert server.http.get("/load").json() == {"server_load": 0}
    assert server.http.get("/health").status_code == server.http.get("/ping").status_code == 200
    assert server.http.head("/health").status_code == 200


def test_tokenize_and_detokenize_are_inverse(server):
    tokens = server.post("/tokenize", prompt="banana 12", return_token_strs=True).json()
    assert tokens["tokens"] == ids(server, "banana 12") and tokens["count"] == len(tokens["tokens"])
    assert "".join(tokens["token_strs"]) == "banana 12"
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "banana 12"}
    assert server.post("/tokenize", messages=HELLO).json()["tokens"] == ids(server, RENDERED)
    for asked in ({}, {"prompt": "ban", "messages": HELLO}):
        assert "give either prompt or messages" in server.post("/tokenize", **asked).text
    unknown = server.post("/detokenize", tokens=[server.engine.vocab_size])
    assert unknown.status_code == 400 and "token ids of this model are 0 to" in unknown.text


def test_tokenizer_info_has_what_the_template_may_write(server):
    info = server.http.get("/tokenizer_info").json()
    assert info["chat_template"] == server.engine.tokenizer.chat_template
    assert info["vocab_size"] == server.engine.tokenizer.vocab_size and "eos_token" in info


def test_metrics_count_what_was_served(server, client):
    def value(name):
        lines = server.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"jaxpaged:{name}{{"))

    names = ("generation_tokens_total", "request_success_total", "time_to_first_token_seconds_count")
    before = [value(name) for name in names]
    client.completions.create(prompt="ban", n=2, **GREEDY)
    list(client.completions.create(prompt="ban", stream=True, **GREEDY))
    after = [value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [18, 2, 2]
    by_reason = server.http.get("/metrics").text
    assert 'request_success_total{finished_reason="length",model_name="tiny"}' in by_reason
    assert value("num_requests_running") == 0 and value("request_generation_tokens_sum") >= 18


def test_usage_tells_what_was_cached_for_whoever_has_the_salt(server):
    asked = {"prompt": list(range(3, 43)), "max_tokens": 1}
    usages = [server.post("/v1/completions", cache_salt=salt, **asked).json()["usage"] for salt in ("a", "a", "b")]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 36, 0]


def test_a_logprob_of_minus_infinity_has_the_number_that_clients_know():
    (entry,) = prompt_logprobs([{3: Logprob(float("-inf"), 1, "a")}])
    assert entry == {"3": {"logprob": -9999.0, "rank": 1, "decoded_token": "a"}}


def test_answers_carry_the_name_of_their_request(server):
    named = server.http.get("/version", headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    fault = server.http.get("/nowhere", headers={"X-Request-Id": "a b"})
    assert fault.status_code == 404 and len(fault.headers["x-request-id"]) == 32
    assert server.http.get("/version").headers["x-request-id"] != fault.headers["x-request-id"]


def test_a_prompt_may_do_without_the_tokens_that_begin_a_text(server, monkeypatch):
    asked, encode = [], server.engine.tokenizer.encode
    monkeypatch.setattr(
        server.engine.tokenizer, "encode", lambda text, add=True: asked.append(add) or encode(text, add)
    )
    for bare in (False, True):
        answer = server.post("/v1/completions", prompt=["ban"], echo=True, add_special_tokens=not bare, **GREEDY).json()
        assert answer["choices"][0]["text"].startswith("ban") and asked[-1] is not bare


def test_prompts_are_cut_to_their_last_tokens_where_that_is_asked_for(server, client):
    text, most = "banana 12 " * 3_000, server.engine.max_model_len
    tokens = ids(server, "banana 12 " * 100)
    asked = GREEDY | {"return_token_ids": True}
    for prompt in (text, tokens):
        (choice,) = server.post("/v1/completions", prompt=prompt, truncate_prompt_tokens=7, **asked).json()["choices"]
        assert choice["prompt_token_ids"] == tokens[-7:]
    (choice,) = server.post("/v1/completions", prompt=text, truncate_prompt_tokens=-1, **asked).json()["choices"]
    assert len(choice["prompt_token_ids"]) == most - 6 and len(choice["token_ids"]) == 6
    (choice,) = server.post("/v1/completions", prompt="ban", truncate_prompt_tokens=50, **asked).json()["choices"]
    assert choice["prompt_token_ids"] == ids(server, "ban")
    (choice,) = server.post("/v1/chat/completions", messages=HELLO, truncate_prompt_tokens=3, **asked).json()["choices"]
    assert choice["prompt_token_ids"] == ids(server, RENDERED)[-3:]
    found = client.embeddings.create(model="tiny", input=[text, "ban"], extra_body={"truncate_prompt_tokens": -1})
    assert found.usage.prompt_tokens == most + len(ids(server, "ban"))
    for wrong in (0, -2, most):
        fault = server.post("/v1/completions", prompt="ban", truncate_prompt_tokens=wrong, **GREEDY)
        assert fault.status_code == 400 and f"it must be 1 to {most - 6}, or -1" in fault.text


def test_a_text_that_is_cut_keeps_the_tokens_around_it():
    tokenizer = load_tokenizer(byte_level_metadata())
    (special,) = tokenizer.special_token_ids
    around = [("<s>", special), ("</s>", special)]
    tokenizer.backend.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", around)
    bare = tokenizer.encode("banana 123", False)
    assert tokenizer.encode("banana 123") == [special, *bare, special]
    assert _last(tokenizer, "banana 123", 4) == [special, *bare[-2:], special]
    assert _last(tokenizer, "banana 123", 2) == bare[-2:]
    assert _last(tokenizer, "banana 123", 99) == [special, *bare, special]


def test_what_is_too_long_has_the_code_that_clients_look_for(server):
    long = "ban" * 600
    for path, asked in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": long * 900}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long * 900}]}),
        ("/v1/embeddings", {"input": [1] * 9_000}),
        ("/tokenize", {"prompt": long * 900}),
    ):
        fault = server.post(path, **asked)
        assert (fault.status_code, fault.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert server.post("/v1/completions", prompt="").json()["error"]["code"] is None


def test_admin_routes_pause_and_resume(server):
    assert server.post("/pause").status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=GREEDY | {"prompt": "x"}, timeout=0.3)
    assert server.post("/resume").status_code == 200
    assert server.post("/sleep?level=2").status_code == 400
    assert server.post("/sleep").status_code == 200 and server.inner.is_sleeping
    assert server.post("/wake_up").status_code == 200
    assert server.post("/v1/completions", **GREEDY, prompt="x").status_code == 200
    assert server.post("/reset_prefix_cache").status_code == 200
    assert server.inner.stats().pages_cached == 0


def test_the_page_needs_nothing_but_itself_and_routes_that_there_are(server):
    page = server.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<title>jaxpaged" in page.text
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self' 'unsafe-inline' data:" and policy["frame-ancestors"] == "'none'"
    assert re.findall(r"https?://(?!www\.w3\.org/)", page.text) == [], "no outside assets"
    assert re.findall(r"<script[^>]*src|<link[^>]*href=\"(?!data:)|@import|\son\w+=\"", page.text) == []
    calls = re.findall(r"""fetch\("([^"]+)"(?:, \{ method: "(\w+)")?""", page.text)
    assert len(calls) == page.text.count("fetch(") >= 3
    for path, method in calls:
        assert not path.startswith("/"), "behind a proxy the page may be at another path"
        assert (method or "GET") in server.app._routes[f"/{path}"]
    script = page.text[page.text.index("<script>") : page.text.index("</script>")]
    ids = set(re.findall(r'\$\("(\w+)"\)', script))
    assert ids <= set(re.findall(r'\bid="(\w+)"', page.text)) and len(ids) > 10


def test_what_the_page_sends_is_served_and_what_it_reads_is_there(server):
    sent = {
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    page = server.http.get("/").text
    fields = re.findall(r'<input name="(\w+)" type="number"', page)
    assert "stream_options: { include_usage: true, continuous_usage_stats: true }" in page and "temperature" in fields
    numbers = {
        "temperature": 1,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "max_tokens": 3,
        "seed": 1,
        "repetition_penalty": 1,
    }
    assert set(fields) <= set(numbers)
    answer = server.post("/v1/chat/completions", **sent, **{name: numbers[name] for name in fields})
    events = [json.loads(part[6:]) for part in answer.text.split("\n\n") if part.startswith("data: {")]
    assert {"completion_tokens", "prompt_tokens", "prompt_tokens_details"} <= set(events[-1]["usage"])
    assert all(event["choices"][0]["delta"] is not None for event in events[:-1])
    told = [event["usage"]["completion_tokens"] for event in events]
    assert told == sorted(told) and told[-1] == 3 and set(told) >= {1, 2}, "the count goes on with every event"


def test_the_page_pictures_the_pool(server):
    picture = server.http.get("/pool").json()
    assert len(picture["pages"]) == picture["stats"]["pages_total"] == server.inner.stats().pages_total


def test_keys_guard_every_route_but_health(folder):
    with running(folder, api_keys=("one", "zwei-\u00fc")) as server:
        for path in ("/", "/v1/models", "/metrics", "/pool", "/no/such/route", "//health", "/health/"):
            assert server.http.get(path).status_code == 401, path
        for path in ("/health", "/ping"):
            assert server.http.get(path).status_code == 200
        assert server.post("/v1/completions", prompt="ban").json()["error"]["code"] == "invalid_api_key"
        for key, status in (("one", 200), ("zwei-\u00fc", 200), ("on", 401), ("x", 401), ("One", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.http.get("/v1/models", headers=headers).status_code == status, key
        assert server.http.get("/", auth=("anybody", "one")).status_code == 200
        assert server.http.get("/").headers["www-authenticate"].startswith("Basic ")
        assert server.http.get("/pause").status_code == 401
        assert server.http.post("/pause", auth=("", "one")).status_code == 404, "admin routes are off by default"
