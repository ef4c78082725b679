"""Structured output over HTTP: OpenAI's response_format, vLLM's fields, and forms meant to hurt."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Literal

import pydantic
import pytest
from running_server import running
from tiny_chat_model import write_chat_model

HELLO = [{"role": "user", "content": "ban"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ban", "an"]},
        "sizes": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
CALL = {"model": "tiny", "max_tokens": 300, "seed": 1, "logit_bias": {}}

pytestmark = pytest.mark.usefixtures("no_page_is_leaked")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(write_chat_model(tmp_path_factory.mktemp("forms") / "model")) as server:
        yield server


def test_json_schema_as_openai_asks_for_it(client):
    answer = client.chat.completions.create(messages=HELLO, response_format=FORMAT, n=2, temperature=0, **CALL)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content)) == {"name", "sizes"}


def test_streamed_pieces_add_up_to_the_form(client):
    call = dict(messages=HELLO, response_format=FORMAT, **CALL)
    whole = client.chat.completions.create(**call).choices[0].message.content
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **call)]
    assert "".join(choice.delta.content or "" for choice in chunks) == whole
    assert json.loads(whole) and chunks[-1].finish_reason == "stop"


def test_openais_client_parses_an_answer_into_its_class(client):
    class Thing(pydantic.BaseModel):
        name: Literal["ban", "an"]
        sizes: list[bool]

    answer = client.chat.completions.parse(messages=HELLO, response_format=Thing, temperature=0, **CALL)
    assert isinstance(answer.choices[0].message.parsed, Thing)


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"structured_outputs": {"regex": "[ab]{4}", "json": None}}, "[ab]{4}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+ "n"'}}, "ab+n"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "a" "b" "n"'}, "abn"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_json": '{"type": "null"}', "response_format": {"type": "text"}}, "null"),
    ],
    ids=str,
)
def test_vllms_fields(server, fields, fits):
    answer = server.post("/v1/completions", prompt="ban", max_tokens=300, seed=1, **fields).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and re.fullmatch(fits, answer["text"])


def test_a_format_of_text_changes_nothing(server):
    call = {"prompt": "ban", "max_tokens": 9, "temperature": 0}
    plain = server.post("/v1/completions", **call).json()["choices"]
    assert server.post("/v1/completions", response_format={"type": "text"}, **call).json()["choices"] == plain


def test_where_no_token_is_left_the_request_ends_with_an_error(server):
    call = {"prompt": "ban", "structured_outputs": {"regex": "a{9}"}, "allowed_token_ids": [1]}
    (choice,) = server.post("/v1/completions", **call).json()["choices"]
    assert choice["finish_reason"] == "error" and "structured_outputs" in choice["stop_reason"]


EXPLODING = {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(20)]}
SELF = {"$ref": "#"}
AGAIN = {"$ref": "#/$defs/a"}
NESTED: dict[str, object] = {}
for _ in range(400):
    NESTED = {"properties": {"a": NESTED}}
POISON = [
    ({"response_format": {"type": "json_schema"}}, "no schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}}, "no schema"),
    ({"response_format": {"type": "xml"}}, "has type 'xml'; known: text, json_object, json_schema"),
    ({"response_format": {}}, "has type None"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": FORMAT, "guided_regex": "a"}, "response_format and guided_. are given; give 1"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "give exactly 1"),
    ({"structured_outputs": {"structural_tag": "x"}}, "no field 'structural_tag'"),
    ({"structured_outputs": {"json": SELF}}, "no text fits it"),
    ({"structured_outputs": {"json": {"$defs": {"a": {"allOf": [SELF, AGAIN]}}} | AGAIN}}, "structured_outputs"),
    ({"structured_outputs": {"json": NESTED}}, "recursion limit"),
    ({"structured_outputs": {"json": {"enum": ["x" * 100] * 2_000}}}, "at most 131,072"),
    ({"structured_outputs": {"json": {"type": "object", "if": {}, "then": {}}}}, "Unimplemented keys"),
    ({"structured_outputs": {"json": EXPLODING}}, "take over"),
    ({"guided_regex": "(" * 5_000 + "a" + ")" * 5_000}, "number of nested parentheses"),
    ({"guided_regex": "a{99999999999}"}, "regex"),
    ({"guided_regex": "(?<=a)b"}, "look-around"),
    ({"guided_regex": r"(a)\1"}, "backreferences"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_choice": []}, "at least 1 text"),
    ({"guided_choice": ["\ud800"]}, "surrogate|JSON"),
    ({"guided_grammar": "start: /(/"}, "regex"),
    ({"guided_grammar": "%import nowhere.NOTHING\nstart: NOTHING"}, "cannot be compiled"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "why"), POISON, ids=[why for _, why in POISON])
def test_poison_is_the_clients_fault_and_the_server_goes_on(server, monkeypatch, fields, why):
    if fields == {"structured_outputs": {"json": EXPLODING}}:
        monkeypatch.setattr("jaxpaged.engine.grammar.TIME_LIMIT", 1.0)
    answer = server.http.post(
        "/v1/completions",
        content=json.dumps({"prompt": "ban", "max_tokens": 3} | fields),
        headers={"Content-Type": "application/json"},
    )
    assert 400 <= answer.status_code < 500, answer.text
    assert re.search(why, answer.json()["error"]["message"])
    good = server.post("/v1/completions", prompt="ban", guided_regex="[ab]{4}").json()["choices"][0]
    assert re.fullmatch("[ab]{4}", good["text"])


CATASTROPHIC = [r"(a+)+$", r"((a{1,300}){1,300}){1,300}", r"(a|b)*a(a|b){300}", r"(.*a.{30}|.*b.{31}|.*c.{32})"]


@pytest.mark.parametrize("regex", CATASTROPHIC)
def test_expressions_that_break_backtracking_are_served(server, regex):
    answer = server.post("/v1/completions", prompt="ban", guided_regex=regex, max_tokens=30, seed=1)
    assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.slow
def test_a_form_that_compiles_for_long_holds_up_nobody(server):
    good = {"prompt": "ban", "guided_regex": "[ab]{4}"}
    assert server.post("/v1/completions", **good).status_code == 200
    slow = threading.Thread(
        target=lambda: server.post("/v1/completions", prompt="x", structured_outputs={"json": EXPLODING})
    )
    slow.start()
    time.sleep(0.1)
    assert server.post("/v1/completions", prompt="ban", max_tokens=4).status_code == 200
    assert server.post("/v1/completions", **good).status_code == 200  # compiled before
    assert slow.is_alive()
    slow.join()
