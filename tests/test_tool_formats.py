"""Calls and thoughts told apart from what is said, wherever the text is cut."""

from __future__ import annotations

import json

import pytest

from jaxpaged.server.reader import Parts, Reader
from jaxpaged.server.tool_formats import FORMATS, format_of

WEATHER, CLOCK = ("weather", {"city": "Zürich", "days": 2}), ("clock", {})
ONE = json.dumps({"name": "weather", "arguments": WEATHER[1]}, ensure_ascii=False)
TWO = json.dumps({"name": "clock", "arguments": {}})
XML = "<function=weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>"
LLAMA = ONE.replace("arguments", "parameters")
PYTHON = "[weather(city='Zürich', days=2), clock()]"

ANSWERS = [  # (format, text, content, calls)
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [WEATHER]),
    ("qwen", f"Well.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "Well.\n", [WEATHER, CLOCK]),
    ("hermes", f"<tool_call>\n{ONE}\n", "", [WEATHER]),
    ("hermes", "a < b, <tool, <tool_call", "a < b, <tool, <tool_call", []),
    ("hermes", "<tool_call>no json</tool_call> so", "<tool_call>no json</tool_call> so", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    ("hermes", "  plain text  ", "  plain text  ", []),
    ("hermes", "\n", "\n", []),
    ("qwen3_coder", f"<tool_call>\n{XML}\n</tool_call>", "", [WEATHER]),
    ("qwen3_coder", "<tool_call>\n<function=clock>\n</function>\n</tool_call>", "", [CLOCK]),
    ("llama3_json", LLAMA, "", [WEATHER]),
    ("llama3_json", f"{LLAMA}; {LLAMA}", "", [WEATHER, WEATHER]),
    ("llama3_json", '{"city": "Bern"}', '{"city": "Bern"}', []),
    ("llama3_json", "The weather {is} fine.", "The weather {is} fine.", []),
    ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [WEATHER, CLOCK]),
    ("mistral", f"[TOOL_CALLS]weather{json.dumps(WEATHER[1])}[TOOL_CALLS]clock{{}}", "", [WEATHER, CLOCK]),
    ("mistral", f"Hm. [TOOL_CALLS]weather[ARGS]{json.dumps(WEATHER[1])}", "Hm. ", [WEATHER]),
    ("mistral", "[TOOL_CALLS]weather{", "[TOOL_CALLS]weather{", []),
    ("pythonic", PYTHON, "", [WEATHER, CLOCK]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[weather(city=__import__('os').name)]", "[weather(city=__import__('os').name)]", []),
    ("pythonic", "[weather('Bern')]", "[weather('Bern')]", []),
    ("pythonic", "[f(**x)]", "[f(**x)]", []),
    ("pythonic", "[" * 3_000, "[" * 3_000, []),
    ("pythonic", "[f(x=b'1')]", "[f(x=b'1')]", []),
]


def read(text, size, **settings):
    """The parts of a text that comes so many characters at a time."""
    reader = Reader(**({"thinks": False, "begins_thinking": False, "tools": None} | settings))
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    parts = [reader.take(piece, is_last=False) for piece in pieces] + [reader.take("", is_last=True)]
    reasoning, content, calls = zip(*parts, strict=True)
    found = [(call.name, json.loads(call.arguments)) for some in calls for call in some]
    return "".join(reasoning), "".join(content), found


@pytest.mark.parametrize(("name", "text", "content", "calls"), ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_calls_are_read_however_the_text_is_cut(name, text, content, calls, size):
    assert read(text, size, tools=FORMATS[name]) == ("", text if content is None else content, calls)


THOUGHTS = [  # (text, begins thinking, thought, said)
    ("<think>\nA, b.\n</think>\n\nYes.", False, "A, b.", "Yes."),
    ("A, b.\n</think>\n\nYes.\n", True, "A, b.", "Yes.\n"),
    ("<think>A, b.</think>Yes.", True, "A, b.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("Yes. <think>no</think>", False, "", "Yes. <think>no</think>"),
    ("<thin", False, "", "<thin"),
    ("  \n", False, "", "  \n"),
    ("<think>\nnever ends </thi", False, "never ends </thi", ""),
    ("a </b> c\n\nd</think>e", True, "a </b> c\n\nd", "e"),
]


@pytest.mark.parametrize(("text", "begins", "thought", "said"), THOUGHTS)
@pytest.mark.parametrize("size", [1, 2, 5, 10_000])
def test_thoughts_are_told_apart_however_the_text_is_cut(text, begins, thought, said, size):
    assert read(text, size, thinks=True, begins_thinking=begins) == (thought, said, [])


def test_calls_come_after_thoughts_and_those_thought_of_are_none():
    text = f"<think>\nPerhaps <tool_call>{TWO}</tool_call>\n</think>\n\n<tool_call>\n{ONE}\n</tool_call>"
    thought = f"Perhaps <tool_call>{TWO}</tool_call>"
    assert read(text, 3, thinks=True, tools=FORMATS["hermes"]) == (thought, "", [WEATHER])


def test_what_cannot_be_part_of_a_mark_is_given_at_once():
    reader = Reader(thinks=True, begins_thinking=True, tools=FORMATS["hermes"])
    assert reader.take("so", is_last=False) == Parts("so", "", [])
    assert reader.take(" </", is_last=False) == Parts(" ", "", [])
    assert reader.take("think>yes <too", is_last=False) == Parts("", "yes ", [])
    assert reader.take("th", is_last=False) == Parts("", "<tooth", [])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}{{ tools }}", "hermes"),
        ("<tool_call>\n<function=example>", "qwen3_coder"),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", "mistral"),
        ('{"name": function name, "parameters": dictionary of arguments}', "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_known_by_the_template(template, name):
    assert format_of(template) == name
