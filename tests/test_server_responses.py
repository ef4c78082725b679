"""/v1/responses as OpenAI's own client reads it."""

from __future__ import annotations

import asyncio
from typing import Literal

import jax
import jax.numpy as jnp
import openai
import pydantic
import pytest
from openai.types.responses import Response
from running_server import running
from tiny_chat_model import write_chat_model

GREEDY = {"model": "tiny", "temperature": 0, "max_output_tokens": 6}
EVENTS = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
    *("response.output_item.done", "response.incomplete"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(write_chat_model(tmp_path_factory.mktemp("responding") / "model")) as server:
        yield server
        assert server.pages_held() == 0


def chat(client, messages):
    answer = client.chat.completions.create(model="tiny", temperature=0, max_tokens=6, messages=messages)
    return answer.choices[0].message.content


def test_a_response_is_the_chats_answer_and_valid(client):
    answer = client.responses.create(input="ban", **GREEDY)
    assert answer.output_text == chat(client, [{"role": "user", "content": "ban"}])
    Response.model_validate(answer.model_dump(warnings="none"), strict=True)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.output_tokens == 6 and answer.usage.total_tokens == answer.usage.input_tokens + 6


def test_instructions_and_messages_are_a_conversation(client):
    first = client.responses.create(input="ban", **GREEDY)
    again = [{"role": "user", "content": "ban"}, *first.output, {"role": "developer", "content": "12"}]
    parts = [{"type": "input_text", "text": "an"}, {"type": "input_text", "text": "na"}]
    answer = client.responses.create(instructions="3", input=[*again, {"role": "user", "content": parts}], **GREEDY)
    assert answer.instructions == "3"
    assert answer.output_text == chat(
        client,
        [
            {"role": "system", "content": "3"},
            {"role": "user", "content": "ban"},
            {"role": "assistant", "content": first.output_text},
            {"role": "system", "content": "12"},
            {"role": "user", "content": "an\nna"},
        ],
    )


def test_events_come_in_order_and_add_up(client):
    whole = client.responses.create(input="ban", **GREEDY)
    events = list(client.responses.create(input="ban", stream=True, **GREEDY))
    kinds = [event.type for event in events]
    assert [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]] == EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text and len(deltas) > 1
    assert events[-1].response.usage == whole.usage
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[-1].response.output[0].id}


def test_the_clients_own_stream_and_async_client(server, client):
    """Its `stream` puts the answer together from the events, and fails where one is out of place."""
    with client.responses.stream(input="ban", **GREEDY) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await client.responses.create(input="ban", **GREEDY)

    assert texts[-1] == asyncio.run(run()).output_text


def test_a_text_that_ends_is_completed_with_its_logprobs(client):
    asked = {"input": "ban", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    plain = client.responses.create(**asked, **GREEDY)
    logprobs = plain.output[0].content[0].logprobs
    assert len(logprobs) == 6 and all(len(entry.top_logprobs) == 2 for entry in logprobs)
    stopped = client.responses.create(**asked, extra_body={"stop": plain.output_text[2:4]}, **GREEDY)
    assert stopped.status == "completed" and stopped.output_text == plain.output_text[:2]
    streamed = list(client.responses.create(stream=True, **asked, **GREEDY))
    told = [entry for e in streamed if e.type == "response.output_text.delta" for entry in e.logprobs]
    assert [entry.token for entry in told] == [entry.token for entry in logprobs]


def test_a_text_has_the_form_that_is_asked_for(client):
    class Fruit(pydantic.BaseModel):
        name: Literal["banana", "12"]

    answer = client.responses.parse(model="tiny", input="ban", temperature=0, text_format=Fruit)
    assert answer.output_parsed.name in ("banana", "12") and answer.text.format.type == "json_schema"


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_fail_the_response(server, client, stream):
    params = server.inner.params
    broken = params | {"head": jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params["head"])}
    try:
        server.inner.update_params(broken)
        answer = client.responses.create(input="ban", stream=stream, **GREEDY)
        answer = list(answer)[-1].response if stream else answer
    finally:
        server.inner.update_params(params)
    assert answer.status == "failed" and "not finite" in answer.error.message


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no responses; send the conversation so far"),
        ({"store": True}, "keeps no responses; leave it out"),
        ({"background": True}, "keeps no responses"),
        ({"tools": [{"type": "web_search"}]}, "tools[0] is of type 'web_search'; only functions are served"),
        ({"tools": ["f"]}, "tools[0] is of type None"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "{'type': 'function', 'name': ..."),
        ({"tools": [{"type": "function", "name": "f g"}]}, "tools[0] has the name 'f g'"),
        ({"tools": [{"type": "function", "name": "f"}]}, "chat template knows no tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": {"type": "allowed_tools"}}, "known: none, auto, required, {'type': 'function', 'name': ...}"),
        ({"text": {"format": {"type": "yaml"}}}, "'yaml'; known: text, json_object, json_schema"),
        ({"text": {"format": 3}}, "text.format is 3"),
        ({"reasoning": {"effort": "high"}}, "the reasoning effort is 'high', but the model's chat template knows none"),
        ({"truncation": "auto"}, "only 'disabled' is served"),
        ({"include": ["file_search_call.results"]}, "include names 'file_search_call.results'"),
        ({"input": []}, "messages is empty"),
        ({"input": [{"role": "robot", "content": "x"}]}, "role 'robot'; known: user"),
        ({"input": [{"role": [], "content": "x"}]}, "role []; known: user"),
        ({"input": [{"type": "file_search_call"}]}, "is a 'file_search_call'; known: message"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0] has call_id None; it must be text"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "["}]}, "are no JSON object"),
        ({"input": [{"type": "function_call_output", "call_id": [], "output": "x"}]}, "answers call [], which is not"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text is served"),
        ({"input": [{"role": "user"}]}, "has content None"),
        ({"n": 2}, "a response has one text"),
        ({"max_output_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_logprobs": 21}, "21"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_and_says_what_to_do(server, asked, message):
    answer = server.post("/v1/responses", **({"input": "ban"} | asked))
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_what_asks_for_nothing_is_served(server):
    asked = {"store": False, "reasoning": {"effort": None}, "tools": [], "include": ["reasoning.encrypted_content"]}
    asked |= {"text": {"format": {"type": "text"}}, "truncation": "disabled", "metadata": {"a": "b"}}
    answer = server.post("/v1/responses", input="ban", max_output_tokens=2, **asked)
    assert answer.status_code == 200 and answer.json()["metadata"] == {"a": "b"} and answer.json()["store"] is False
