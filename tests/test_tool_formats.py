"""Calls and thoughts told apart from what is said, wherever the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxpaged.server.reader import Parts, Reader
from jaxpaged.server.tool_formats import FORMATS, CallPiece, format_of

WEATHER, CLOCK = ("weather", {"city": "Zürich", "days": 2}), ("clock", {})
ONE = json.dumps({"name": "weather", "arguments": WEATHER[1]}, ensure_ascii=False)
TWO = json.dumps({"name": "clock", "arguments": {}})
XML = "<function=weather>\n<parameter=city>\nZürich\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>"
LLAMA = ONE.replace("arguments", "parameters")
PYTHON = "[weather(city='Zürich', days=2), clock()]"

TEXT, CLOSED = json.dumps(WEATHER[1], ensure_ascii=False), "</tool_call>"

ANSWERS = [  # (format, text, content, calls)
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [WEATHER]),
    ("qwen", f"Well.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "Well.\n", [WEATHER, CLOCK]),
    ("hermes", f"<tool_call>\n{ONE}\n", "", [WEATHER]),
    ("hermes", "a < b, <tool, <tool_call", "a < b, <tool, <tool_call", []),
    ("hermes", "<tool_call>no json</tool_call> so", "<tool_call>no json</tool_call> so", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    ("hermes", f"<tool_call>{ONE}}}</tool_call>", "", [WEATHER]),  # a brace too many is what small models write
    ("hermes", f"<tool_call>{ONE[:-1]}</tool_call>", "", [WEATHER]),  # or one too few
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "", [("f", {"a": CLOSED})]),
    ("hermes", '<tool_call>{"arguments": {}, "name": "clock"}</tool_call> so', " so", [CLOCK]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {json.dumps(TEXT)}}}</tool_call>', "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>', None, []),
    ("hermes", f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", [WEATHER, CLOCK]),
    ("hermes", '<tool_call>{"name": "clock"}</tool_call>', "", [CLOCK]),
    ("hermes", f"A<tool_call>{TWO}</tool_call>\n \n<tool_call>{TWO}</tool_call>\n B\n", "A\n B", [CLOCK, CLOCK]),
    ("hermes", "  plain text  ", "  plain text  ", []),
    ("hermes", "\n", "\n", []),
    ("qwen3_coder", f"<tool_call>\n{XML}\n</tool_call>", "", [WEATHER]),
    ("qwen3_coder", "<tool_call>\n<function=clock>\n</function>\n</tool_call>", "", [CLOCK]),
    ("llama3_json", LLAMA, "", [WEATHER]),
    ("llama3_json", f"{LLAMA}; {LLAMA}", "", [WEATHER, WEATHER]),
    ("llama3_json", f"{LLAMA} so", "so", [WEATHER]),
    ("llama3_json", '{"city": "Bern"}', '{"city": "Bern"}', []),
    ("llama3_json", "The weather {is} fine.", "The weather {is} fine.", []),
    ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [WEATHER, CLOCK]),
    ("mistral", f"[TOOL_CALLS]weather{json.dumps(WEATHER[1])}[TOOL_CALLS]clock{{}}", "", [WEATHER, CLOCK]),
    ("mistral", f"Hm. [TOOL_CALLS]weather[ARGS]{TEXT}", "Hm. ", [WEATHER]),
    ("mistral", "[TOOL_CALLS]weather, or not", "[TOOL_CALLS]weather, or not", []),
    ("mistral", "[TOOL_CALLS]the weather is {}", "[TOOL_CALLS]the weather is {}", []),
    ("pythonic", PYTHON, "", [WEATHER, CLOCK]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[weather(city=__import__('os').name)]", "[weather(city=__import__('os').name)]", []),
    ("pythonic", "[weather('Bern')]", "[weather('Bern')]", []),
    ("pythonic", "[f(**x)]", "[f(**x)]", []),
    ("pythonic", "[" * 3_000, "[" * 3_000, []),
    ("pythonic", "[f(x=b'1')]", "[f(x=b'1')]", []),
    ("pythonic", "[f(x={[]: 1})]", "[f(x={[]: 1})]", []),
]


def calls_of(pieces):
    """Each call's name and the text of its arguments, as a client puts them together."""
    calls = []
    for piece in pieces:
        if piece.name is not None:
            calls.append([piece.name, ""])
        calls[-1][1] += piece.arguments
    return calls


def read_pieces(pieces, **settings):
    """(thought, said, calls) of a text that comes in these pieces."""
    reader = Reader(**({"thinks": False, "begins_thinking": False, "tools": None} | settings))
    parts = [reader.take(piece, is_last=False) for piece in pieces] + [reader.take("", is_last=True)]
    pieces = [piece for part in parts for piece in part.pieces]
    said = "".join(piece for piece in pieces if isinstance(piece, str))
    assert said == "".join(part.content for part in parts)
    return "".join(part.reasoning for part in parts), said, calls_of(p for p in pieces if not isinstance(p, str))


def in_order(pieces, **settings):
    """What is said, with a mark where each call begins."""
    reader = Reader(begins_thinking=False, **settings)
    parts = [reader.take(piece, is_last=False) for piece in pieces] + [reader.take("", is_last=True)]
    return "".join(p if isinstance(p, str) else "\0" * (p.name is not None) for part in parts for p in part.pieces)


def read(text, size, **settings):
    """The same of a text that comes so many characters at a time, the arguments as values."""
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    thought, said, calls = read_pieces(pieces, **settings)
    return thought, said, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_calls_are_read_however_the_text_is_cut(name, text, content, calls, size):
    assert read(text, size, tools=FORMATS[name]) == ("", text if content is None else content, calls)


MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>", "<function=f>", "</function>", "\n", " ")
NOISE = st.sampled_from([*MARKS, *'{}[]":,;\\<x1', "</parameter>", "<parameter=a>", '"name"', "\n\n", "so"])


@st.composite
def broken_answers(draw):
    """An answer with something put into it, or left out, and where it is cut: (format, text, pieces)."""
    name, text, *_ = draw(st.sampled_from(ANSWERS))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(NOISE) + text[at + draw(st.integers(0, 4)) :]
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return draw(st.sampled_from([name, *FORMATS])), text, pieces


@given(broken_answers(), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
@example(("hermes", "", ["A<tool_call>" + TWO, CLOSED + "\n", "\n", f"<tool_call>{TWO}{CLOSED}", " B"]), False)
def test_whatever_the_text_its_parts_do_not_depend_on_where_it_is_cut(broken, thinks):
    name, _, pieces = broken
    reading = {"tools": FORMATS[name], "thinks": thinks}
    whole, cut, alone = (read_pieces(some, **reading) for some in (["".join(pieces)], pieces, "".join(pieces)))
    assert whole == cut == alone
    assert in_order(["".join(pieces)], **reading) == in_order(pieces, **reading)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("qwen", "pythonic")])
def test_arguments_are_given_as_they_come(name):
    text = next(text for form, text, _, calls in ANSWERS if form == name and calls == [WEATHER])
    reader = Reader(thinks=False, begins_thinking=False, tools=FORMATS[name], parameters={"weather": {"city": STRING}})
    before, after = text[: text.index("rich")], text[text.index("rich") :]
    begun = reader.take(before, is_last=False).calls
    # Of a text between tags the end may be the beginning of a tag.
    held = "" if name != "qwen3_coder" else "Zü"
    assert calls_of(begun) == [["weather", '{"city": "Zü'.removesuffix(held)]]
    rest = [piece for character in after for piece in reader.take(character, is_last=False).calls]
    rest += reader.take("", is_last=True).calls
    assert len(rest) > 5 and not any(piece.name for piece in rest)
    assert calls_of([*begun, *rest]) == [["weather", TEXT]]


STRING = {"type": "string"}


def test_a_text_between_tags_is_one_where_its_schema_says_so():
    values = {"code": "12\n\n x", "zip": "3000", "n": "12", "f": "NaN", "o": '{"a": [1]}'}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<tool_call>\n<function=g>\n{tags}</function>\n</tool_call>"
    reading = {"tools": FORMATS["qwen3_coder"], "parameters": {"g": {"code": STRING, "zip": STRING, "n": {}, "o": 3}}}
    for size in (1, 3, 1_000):
        assert read(text, size, **reading)[2] == [("g", values | {"n": 12, "o": {"a": [1]}})]


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b\\', '{"a": "b\\'),
        ("mistral", '[TOOL_CALLS]f{"a": [1', '{"a": [1'),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>1</parameter><parameter=b>2", '{"a": 1, "b": '),
    ],
)
@pytest.mark.parametrize("size", [1, 1_000])
def test_a_call_that_is_cut_off_is_given_as_far_as_it_came(name, text, arguments, size):
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read_pieces(pieces, tools=FORMATS[name]) == ("", "", [["f", arguments]])


def test_reading_takes_time_in_proportion_to_the_text():
    reader = Reader(thinks=False, begins_thinking=False, tools=FORMATS["hermes"])
    reader.take('<tool_call>{"name": "f", "arguments": {"a": "', is_last=False)
    pieces = [piece for _ in range(50_000) for piece in reader.take("x\\n", is_last=False).calls]
    assert pieces == [CallPiece(None, "x\\n")] * 50_000 and len(reader._calls._feed.taken) < 100


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
    assert reader.take("so", is_last=False) == Parts("so", [])
    assert reader.take(" </", is_last=False) == Parts(" ", [])
    assert reader.take("think>yes <too", is_last=False) == Parts("", ["yes "])
    assert reader.take("th", is_last=False) == Parts("", ["<tooth"])


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
