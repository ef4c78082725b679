"""Tools and thoughts over HTTP, as OpenAI's client asks for them and gets them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.responses import Response
from running_server import running
from tiny_chat_model import write_chat_model
from tiny_vocabularies import byte_level_metadata

from jaxpaged import StructuredOutputsParams
from jaxpaged.__main__ import main
from jaxpaged.engine.tokenizer import Tokenizer, load_tokenizer
from jaxpaged.server.chat import Parsers, understood
from jaxpaged.server.protocol import ChatRequest, decode

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ [t.function.name, t.function.description or ''] | tojson }}{% endfor %}\n"
    "Call as <tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}\n"
    "{% endfor %}{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}{{ persona }}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
HELLO = [{"role": "user", "content": "ban"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"$ref": "#/$defs/Days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}
TOOLS = [WEATHER, CLOCK]
KINDS = ("reasoning_text", "output_text")
CALL = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "seed": 3}
TEXT = 'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'

pytestmark = pytest.mark.usefixtures("no_page_is_leaked")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_chat_model(tmp_path_factory.mktemp("tools") / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with running(folder, parsers=Parsers(reasoning="qwen3")) as server:
        yield server


@pytest.fixture
def saying(server, monkeypatch):
    """Lets the model say this text, whatever it would have said."""

    @contextmanager
    def say(text):
        submit = server.engine.submit

        async def forced(requests, inbox):
            form = StructuredOutputsParams(choice=[text])
            await submit([replace(r, params=replace(r.params, structured_outputs=form)) for r in requests], inbox)

        with monkeypatch.context() as patched:
            patched.setattr(server.engine, "submit", forced)
            yield

    return say


def prompt_of(server, **body):
    """The text that the model was given."""
    answer = server.post("/v1/chat/completions", return_token_ids=True, **({"max_tokens": 1} | body))
    assert answer.status_code == 200, answer.text
    tokenizer = server.engine.tokenizer
    return tokenizer.decode(answer.json()["choices"][0]["prompt_token_ids"], skip_special_tokens=False)


# Calls that the model may make


def test_a_call_in_the_models_own_format(client, saying):
    with saying(TEXT):
        (choice,) = client.chat.completions.create(tools=TOOLS, **CALL).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Well.\n"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather") and call.id
    assert json.loads(call.function.arguments) == {"city": "Bern", "days": 2}


def gathered(chunks):
    """What OpenAI's client makes of a stream."""
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(chunk)
    (choice,) = state.current_completion_snapshot.choices
    return choice


def said(choice):
    calls = [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    return choice.finish_reason, choice.message.content or None, calls


def test_streamed_arguments_come_as_they_are_written_and_add_up_to_the_whole_call(client, saying):
    with saying(TEXT + '\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>'):
        chunks = list(client.chat.completions.create(tools=TOOLS, stream=True, **CALL))
        (whole,) = client.chat.completions.create(tools=TOOLS, **CALL).choices
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    opening = [call for call in deltas if call.id is not None]
    assert [(c.index, c.type, c.function.name) for c in opening] == [
        (0, "function", "weather"),
        (1, "function", "clock"),
    ]
    assert len({call.id for call in opening}) == 2
    more = [call for call in deltas if call.id is None]
    assert len([call for call in more if call.index == 0]) > 5
    assert not any(call.type or call.function.name for call in more)
    assert said(gathered(chunks)) == said(whole)
    assert said(whole)[:2] == ("tool_calls", "Well.\n")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_calls_are_streamed_as_they_are_given_whole(client, choice):
    asked = CALL | {"tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    for seed in range(3):
        (whole,) = client.chat.completions.create(**asked | {"seed": seed}).choices
        chunks = list(client.chat.completions.create(stream=True, **asked | {"seed": seed}))
        assert said(gathered(chunks)) == said(whole) and whole.message.tool_calls


def test_a_call_cut_off_by_the_bound_is_given_as_far_as_it_came(client, saying):
    with saying(TEXT):
        (choice,) = client.chat.completions.create(tools=TOOLS, **CALL | {"max_tokens": 60}).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "length" and call.function.name == "weather"
    assert TEXT[TEXT.index('{"city"') :].startswith(call.function.arguments) and call.function.arguments


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_the_first_alone_is_given(client, saying, stream):
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    with saying(call * 3):
        answer = client.chat.completions.create(tools=TOOLS, parallel_tool_calls=False, stream=stream, **CALL)
        calls = (gathered(answer) if stream else answer.choices[0]).message.tool_calls
    assert [one.function.name for one in calls] == ["clock"]


def test_where_nothing_is_called_the_answer_is_text(client, saying):
    with saying("No <tool_box> here."):
        (choice,) = client.chat.completions.create(tools=TOOLS, **CALL).choices
    assert (choice.message.content, choice.message.tool_calls) == ("No <tool_box> here.", None)
    assert choice.finish_reason == "stop"


def test_tools_stand_in_the_prompt_unless_none_may_be_called(server):
    assert '["weather", "Of a city."]' in prompt_of(server, messages=HELLO, tools=TOOLS)
    assert "weather" not in prompt_of(server, messages=HELLO, tools=TOOLS, tool_choice="none")


# Calls that the model must make


def test_a_required_call_is_made(client):
    for seed in range(4):
        answer = client.chat.completions.create(tools=TOOLS, tool_choice="required", **(CALL | {"seed": seed}))
        (choice,) = answer.choices
        assert choice.finish_reason in ("tool_calls", "length")  # this model may go on calling
        calls = choice.message.tool_calls
        for call in calls if choice.finish_reason == "tool_calls" else calls[:-1]:
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "clock" or (
                arguments["city"] in ("Bern", "Rome") and 1 <= arguments["days"] <= 9
            )


@pytest.mark.parametrize("stream", [False, True])
def test_the_named_call_is_made_once(client, stream):
    named = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(tools=TOOLS, tool_choice=named, stream=stream, **CALL)
    if stream:
        choice = gathered(answer)
    else:
        (choice,) = answer.choices
    calls, reason, content = choice.message.tool_calls, choice.finish_reason, choice.message.content
    assert [call.function.name for call in calls] == ["weather"]
    assert set(json.loads(calls[0].function.arguments)) == {"city", "days"}
    assert reason == "tool_calls" and not content


def test_a_conversation_goes_on_after_a_call(server):
    call = {"id": "abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc", "content": "rain"},
    ]
    prompt = prompt_of(server, messages=messages, tools=TOOLS)
    assert prompt.endswith('user:banassistant:weather({"city": "Bern"})tool:rainassistant:')


def test_special_tokens_in_tools_and_calls_are_text(server):
    tokenizer = server.engine.tokenizer
    (special,) = (tokenizer.backend.id_to_token(token) for token in tokenizer.special_token_ids)
    tool = {"type": "function", "function": {"name": "f", "description": special}}
    call = {"function": {"name": "f", "arguments": json.dumps({"x": special, special: 1})}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    answer = server.post("/v1/chat/completions", messages=messages, tools=[tool], max_tokens=1, return_token_ids=True)
    prompt = answer.json()["choices"][0]["prompt_token_ids"]
    assert not tokenizer.special_token_ids & set(prompt)
    assert tokenizer.decode(prompt, skip_special_tokens=False).count(special) == 3


# What the template is told


@pytest.mark.parametrize(
    ("told", "end"),
    [
        ({"reasoning_effort": "high"}, "effort high\nassistant:<think>\n"),
        ({"reasoning_effort": "none"}, "effort none\nassistant:"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}, "effort low\nassistant:"),
        ({"chat_template_kwargs": {"persona": "a bot, "}}, "ban\na bot, assistant:"),
        ({"chat_template_kwargs": {"thinking": False}}, "ban\nassistant:"),  # clients turn it off whatever the model
    ],
    ids=str,
)
def test_what_clients_say_of_thinking_reaches_the_template(server, told, end):
    # The template's own line ends are not all its text's.
    assert prompt_of(server, messages=HELLO, **told).replace("\n", "").endswith(end.replace("\n", ""))


def test_an_effort_that_no_template_knows_is_refused_and_none_at_all_is_served(server, monkeypatch):
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", "{{ messages[0].content }}")
    asked = {"messages": HELLO, "max_tokens": 1}
    answer = server.post("/v1/chat/completions", reasoning_effort="high", **asked)
    assert answer.status_code == 400 and "'high', but the model's chat template knows none" in answer.text
    assert server.post("/v1/chat/completions", reasoning_effort="none", **asked).status_code == 200
    answer = server.post("/v1/responses", input="ban", reasoning={"effort": "high"}, max_output_tokens=1)
    assert answer.status_code == 400 and "knows none" in answer.text


def test_a_developer_is_the_system_to_a_template_that_knows_none(server, monkeypatch):
    messages = [{"role": "developer", "content": "be brief"}, *HELLO]
    assert prompt_of(server, messages=messages).startswith("system:be brief")
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", TEMPLATE + "{# developer #}")
    assert prompt_of(server, messages=messages).startswith("developer:be brief")


def test_the_last_message_goes_on(server):
    messages = [*HELLO, {"role": "assistant", "content": "Sure: "}]
    goes_on = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(server, **goes_on) == "user:banassistant:Sure: "
    (special,) = (server.engine.tokenizer.backend.id_to_token(t) for t in server.engine.tokenizer.special_token_ids)
    messages = [*HELLO, {"role": "user", "content": [{"type": "text", "text": f"a{special}b"}]}]
    assert prompt_of(server, messages=messages, continue_final_message=True).endswith(f"user:a{special}b")
    tokens = server.post("/tokenize", **goes_on).json()["tokens"]
    assert server.post("/detokenize", tokens=tokens).json()["prompt"] == "user:banassistant:Sure: "


REFUSED = [
    ({"tools": [{"type": "function"}]}, "tools[0] is"),
    ({"tools": ["weather"]}, "tools[0] is"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0] has the name 'a b'"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "they are a JSON schema"),
    ({"tools": [CLOCK] * 129}, "at most 128"),
    ({"tool_choice": "required"}, "there are no tools"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice is 'always'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "not among the tools"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "set tool_choice to none"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "give 1 of them"),
    ({"tools": [{"function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "required"}, "Unimplemented"),
    ({"tools": [{"function": {"name": "f", "parameters": {"$defs": 3}}}], "tool_choice": "required"}, "$defs of f"),
    ({"messages": [{"role": "assistant", "tool_calls": "x"}]}, "must be a list"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "a call has a function with a name"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "whose arguments are no JSON object",
    ),
    (
        {"chat_template_kwargs": {"tools": []}},
        "knows enable_thinking, persona, reasoning_effort, thinking",
    ),
    ({"chat_template_kwargs": {"enable_thinking": "x" * 99}}, "it must be true or false"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "sets 'bos_token'"),
    ({"functions": [{"name": "f"}]}, "functions is not served"),
    ({"chat_template": "{{ 1 }}"}, "chat_template is not served"),
    ({"documents": [{"text": "x"}]}, "put them in a message"),
    ({"reasoning_effort": "much"}, "Invalid enum value 'much' - at `$.reasoning_effort`"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "a turn either goes on or begins"),
    ({"continue_final_message": True, "messages": [{"role": "assistant", "content": ""}]}, "no text to go on from"),
]


@pytest.mark.parametrize(("body", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_cannot_be_served_is_a_400(server, body, why):
    answer = server.post("/v1/chat/completions", **({"messages": HELLO, "max_tokens": 2} | body))
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text


def test_a_template_without_tools_or_a_known_format_is_said_to_be_one(server, monkeypatch):
    post = {"messages": HELLO, "tools": TOOLS, "max_tokens": 80}
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", TEMPLATE.replace("<tool_call>", "<call>"))
    answer = server.post("/v1/chat/completions", **post)
    assert answer.status_code == 400 and "start the server with --tool-call-parser" in answer.json()["error"]["message"]
    assert server.post("/v1/chat/completions", tool_choice="required", **post).status_code == 200
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", "{{ messages[0].content }}")
    answer = server.post("/v1/chat/completions", **post)
    assert answer.status_code == 400 and "knows no tools" in answer.json()["error"]["message"]


def test_a_mark_that_is_a_special_token_is_seen():
    tokenizer = load_tokenizer(byte_level_metadata())
    tokenizer.backend.add_special_tokens(["[TOOL_CALLS]"])
    template = "{{ tools }}[TOOL_CALLS]"
    marked = Tokenizer(tokenizer.backend, chat_template=template)
    request = decode(json.dumps({"messages": HELLO, "tools": TOOLS}).encode(), ChatRequest)
    assert understood(request, marked, Parsers(), {}).params.skip_special_tokens is False
    unmarked = Tokenizer(load_tokenizer(byte_level_metadata()).backend, chat_template=template)
    assert understood(request, unmarked, Parsers(), {}).params.skip_special_tokens is True


@pytest.mark.parametrize(("flag", "known"), [("--tool-call-parser", "hermes"), ("--reasoning-parser", "qwen3")])
def test_an_unknown_parser_names_the_known_ones(capsys, flag, known):
    assert main(["serve", "nowhere", flag, "xml"]) == 2
    assert f"{flag} is 'xml'; known: " in (told := capsys.readouterr().err) and known in told


# Calls in responses, where functions' fields stand beside their type


FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
ASKED = {"model": "tiny", "input": "ban", "max_output_tokens": 200, "tools": FLAT}


def outputs(response):
    """The items without what differs each time: their ids."""
    Response.model_validate(response.model_dump(warnings="none"), strict=True)
    return [
        (item.type, item.status, item.name, json.loads(item.arguments))
        if item.type == "function_call"
        else (item.type, item.status, item.content[0].text)
        for item in response.output
    ]


def test_a_response_calls_in_items_of_their_own_whole_and_streamed(client, saying):
    text = f'<think>\nHm.\n</think>\n{TEXT}\nAnd\n<tool_call>{{"name": "clock", "arguments": {{}}}}</tool_call>'
    with saying(text):
        whole = client.responses.create(**ASKED)
        events = list(client.responses.create(stream=True, **ASKED))
        with client.responses.stream(**ASKED) as stream:  # puts the answer together from the events
            gathered = stream.get_final_response()
    assert outputs(whole) == [
        ("reasoning", "completed", "Hm."),
        ("message", "completed", "Well.\n"),
        ("function_call", "completed", "weather", {"city": "Bern", "days": 2}),
        ("message", "completed", "\nAnd"),
        ("function_call", "completed", "clock", {}),
    ]
    assert whole.status == "completed" and outputs(events[-1].response) == outputs(gathered) == outputs(whole)
    calls = [item for item in events[-1].response.output if item.type == "function_call"]
    told = [event for event in events if event.type.startswith("response.function_call_arguments")]
    for call in calls:
        *deltas, done = [event for event in told if event.item_id == call.id]
        assert "".join(delta.delta for delta in deltas) == done.arguments == call.arguments and done.name == call.name
    assert len([event for event in told if event.type.endswith("delta")]) > 8, "arguments come piece by piece"
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert opened == closed == [item.id for item in events[-1].response.output] and len(set(opened)) == 5
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_response_calls_what_it_must(client, choice):
    asked = ASKED | {"tool_choice": choice, "extra_body": {"seed": 3}}
    if choice == "required":
        asked |= {"parallel_tool_calls": False}
    response = client.responses.create(**asked)
    assert [kind for kind, *_ in outputs(response)] == ["function_call"] and response.status == "completed"
    assert choice == "required" or response.output[0].name == "weather"
    assert response.parallel_tool_calls == (choice != "required") and response.tools[1].name == "clock"


def test_without_parallel_calls_a_response_has_the_first_alone(client, saying):
    with saying(TEXT + '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'):
        asked = ASKED | {"parallel_tool_calls": False}
        for response in (
            client.responses.create(**asked),
            list(client.responses.create(stream=True, **asked))[-1].response,
        ):
            assert [item.type for item in response.output] == ["message", "function_call"]


def test_a_call_of_a_response_that_is_cut_off_is_incomplete(client, saying):
    with saying(TEXT):
        response = client.responses.create(**ASKED | {"max_output_tokens": 60})
    assert response.status == "incomplete" and response.output[-1].status == "incomplete"
    assert response.output[-1].arguments == '{"city": '


def test_a_response_goes_on_after_a_call_as_a_chat_does(server, client, saying, monkeypatch):
    with saying(TEXT):
        first = client.responses.create(**ASKED)
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    parts = result | {"output": [{"type": "input_text", "text": "rain"}]}
    given = []
    encode = server.app._encode_chat
    monkeypatch.setattr(server.app, "_encode_chat", lambda *a: given.append(encode(*a)) or given[-1])
    for answered in (result, parts):
        asked = ASKED | {"input": [{"role": "user", "content": "ban"}, *first.output, answered]}
        client.responses.create(**asked | {"max_output_tokens": 1})
    function = {"name": "weather", "arguments": call.arguments}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "Well.\n", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
    ]
    tokenizer = server.engine.tokenizer
    texts = {tokenizer.decode(tokens, skip_special_tokens=False) for tokens in given}
    assert texts == {prompt_of(server, messages=messages, tools=TOOLS)}


# Thoughts


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_are_apart_from_the_answer(client, saying, opened):
    extra = {"chat_template_kwargs": {"enable_thinking": opened}}
    with saying(("" if opened else "<think>\n") + "So so.\n</think>\n\nYes."):
        message = client.chat.completions.create(extra_body=extra, **CALL).choices[0].message
        chunks = [c.choices[0].delta for c in client.chat.completions.create(extra_body=extra, stream=True, **CALL)]
        extra["include_reasoning"] = False
        hidden = client.chat.completions.create(extra_body=extra, **CALL)
        unseen = [c.choices[0].delta for c in client.chat.completions.create(extra_body=extra, stream=True, **CALL)]
    assert (message.reasoning_content, message.content) == ("So so.", "Yes.") and message.reasoning == "So so."
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks) == "So so."
    assert "".join(delta.content or "" for delta in chunks) == "Yes."
    assert "".join(delta.content or "" for delta in unseen) == "Yes."
    assert not any(hasattr(delta, name) for delta in unseen for name in ("reasoning", "reasoning_content"))
    assert hidden.choices[0].message.content == "Yes." and not hasattr(hidden.choices[0].message, "reasoning_content")


def test_calls_come_after_thoughts(client, saying):
    with saying(f"<think>\nHm.\n</think>\n\n{TEXT}"):
        (choice,) = client.chat.completions.create(tools=TOOLS, **CALL).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("Hm.", "Well.\n")
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]


def test_an_answer_of_a_form_has_no_thoughts(client):
    call = CALL | {"extra_body": {"structured_outputs": {"regex": "[ab]{3}</think>c"}}}
    message = client.chat.completions.create(**call).choices[0].message
    assert message.content.endswith("</think>c")


@pytest.mark.parametrize(
    "text", ["<think>\nSo so.\n</think>\n\nYes.", "<think>\nSo", "Yes."], ids=["both", "cut", "said"]
)
def test_a_response_has_its_thoughts_in_an_item_of_their_own(client, saying, text):
    asked = {"model": "tiny", "input": "ban", "max_output_tokens": 200}
    thought = text.partition("</think>")[0].removeprefix("<think>\n").strip() if "<think>" in text else ""
    said = text.partition("</think>\n\n")[2] if "<think>" in text else text
    with saying(text):
        whole = client.responses.create(**asked)
        events = list(client.responses.create(stream=True, **asked))
        with client.responses.stream(**asked) as stream:
            gathered = stream.get_final_response()
    Response.model_validate(whole.model_dump(warnings="none"), strict=True)
    for answer in (whole, events[-1].response, gathered):
        kinds = {item.type: item.content[0].text for item in answer.output}
        assert kinds == {k: v for k, v in {"reasoning": thought, "message": said}.items() if v}
        assert answer.output_text == said and answer.status == "completed"
    assert (whole.usage.output_tokens_details.reasoning_tokens > 0) == bool(thought)
    told = {kind: "".join(e.delta for e in events if e.type == f"response.{kind}.delta") for kind in KINDS}
    assert told == {"reasoning_text": thought, "output_text": said}
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert opened == closed == [item.id for item in events[-1].response.output]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    again = [{"role": "user", "content": "ban"}, *whole.output, {"role": "user", "content": "12"}]
    assert client.responses.create(**asked | {"input": again}).status in ("completed", "incomplete")
