"""How models write calls of tools: where in an answer they stand, and what they say. One `Format` for each way.

Names are vLLM's. A call's arguments are given as the model writes them, from where it is clear that there is a call; a
text that looks like a call and is none is left to be shown as it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxpaged.server.feed import Feed, peek, pieces_of_value, starts_with, string, until, value


class CallPiece(NamedTuple):
    """The beginning of a call, which names its function, or more of the last one's arguments."""

    name: str | None
    arguments: str


Parameters = Mapping[str, Mapping[str, Any]]
"""Of each function that may be called: its parameters' schemas by name."""

Reading = Generator[CallPiece | None, None, None]
"""Gives the pieces of the calls of a feed, and None where it needs more. Raises ValueError where there is no call, or
none any more.
"""


@dataclass(frozen=True)
class Format:
    """Calls stand between `opening` and `closing`, or behind `opening` where nothing closes them; without either, the
    whole answer is calls where it begins with one of `beginnings`.
    """

    read: Callable[[Feed, Parameters], Reading]
    opening: str = ""
    closing: str = ""
    beginnings: tuple[str, ...] = ()


def json_calls(feed: Feed, parameters: Parameters) -> Reading:
    """An object with a name and arguments or parameters, a list of them, or several with `;` between."""
    is_list = (yield from peek(feed)) == "["
    if is_list:
        feed.take(1)
    while True:
        yield from _json_call(feed)
        while (after := (yield from peek(feed))) in (",", ";"):
            feed.take(1)
        if is_list and after == "]":
            feed.take(1)
            return
        if after != "{":
            return


def mistral_calls(feed: Feed, parameters: Parameters) -> Reading:
    """A list as of `json_calls`; or, newer, name{...} or name[ARGS]{...}, each after a mark of its own."""
    if (yield from peek(feed)) in ("[", "{"):
        yield from json_calls(feed, parameters)
        return
    name = re.split(r"\[(?:ARGS|CALL_ID)\]", (yield from until(feed, "{")))[0].strip()
    if not _NAME.fullmatch(name):
        raise ValueError("no name")
    feed.rest = "{" + feed.rest
    yield CallPiece(name, "")
    yield from _arguments(feed)


def xml_calls(feed: Feed, parameters: Parameters) -> Reading:
    """<function=name><parameter=key>value</parameter>...</function>; a value is text where its schema says so, else
    JSON where it can be. Texts come as they are written, other values once they are complete.
    """
    if not (yield from _tag(feed, "<function=")):
        raise ValueError("no <function=...>")
    while True:
        name = (yield from until(feed, ">")).strip()
        if not _NAME.fullmatch(name):
            raise ValueError("no name")
        yield CallPiece(name, "{")
        separator = ""
        while (yield from _tag(feed, "<parameter=")):
            key = (yield from until(feed, ">")).strip()
            yield CallPiece(None, f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            if (yield from starts_with(feed, "\n")):
                feed.take(1)
            schema = parameters.get(name, {}).get(key)
            if isinstance(schema, Mapping) and schema.get("type") == "string":
                yield from _text(feed, "</parameter>")
            else:
                text = (yield from until(feed, "</parameter>")).removesuffix("\n")
                yield CallPiece(None, json.dumps(_json_or_text(text), ensure_ascii=False))
        if not (yield from _tag(feed, "</function>")) and not feed.rest:
            raise ValueError("the call does not end")
        yield CallPiece(None, "}")
        if not (yield from _tag(feed, "<function=")):
            return


def python_calls(feed: Feed, parameters: Parameters) -> Reading:
    """[name(key=value, ...), ...] with literals as values; nothing is evaluated. They come once all are there."""
    while not feed.is_whole:
        yield None
    text = feed.take(len(feed.rest))
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no list of calls: {type(error).__name__}") from None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    found = []
    for node in tree.elts:
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("a call names its arguments")
        try:
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            found.append(CallPiece(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)))
        except TypeError as error:
            raise ValueError(str(error)) from None
    yield from found


MISTRAL_MARK = "[TOOL_CALLS]"
_HERMES = Format(json_calls, "<tool_call>", "</tool_call>")

FORMATS = {
    "hermes": _HERMES,
    "qwen": _HERMES,  # Qwen2.5 and Qwen3 write as Hermes does
    "qwen3_coder": Format(xml_calls, "<tool_call>", "</tool_call>"),
    "llama3_json": Format(json_calls, beginnings=("{",)),
    "mistral": Format(mistral_calls, MISTRAL_MARK),
    "pythonic": Format(python_calls, beginnings=("[",)),
}


def format_of(chat_template: str) -> str | None:
    """The format that a template teaches; None where none is known."""
    signs = {
        "<function=": "qwen3_coder",
        "<tool_call>": "hermes",
        MISTRAL_MARK: "mistral",
        "[func_name1(": "pythonic",
        '"parameters": dictionary': "llama3_json",
        "<|python_tag|>": "llama3_json",
    }
    return next((name for sign, name in signs.items() if sign in chat_template), None)


def parameters_of(definitions: Sequence[Mapping[str, Any]]) -> Parameters:
    """Of tools as clients define them."""
    found = {}
    for definition in definitions:
        properties = (definition["function"].get("parameters") or {}).get("properties")
        found[definition["function"]["name"]] = properties if isinstance(properties, Mapping) else {}
    return found


_NAME = re.compile(r"[^\s{}<>\[\]\"]{1,256}")


def _json_call(feed: Feed) -> Reading:
    """One object. Arguments that come behind the name are given as they come."""
    if (yield from peek(feed)) != "{":
        raise ValueError("no object")
    feed.take(1)
    name: str | None = None
    before: str | None = None  # arguments that came before the name
    begun = False
    while (first := (yield from peek(feed))) != "}":
        if first == ",":
            feed.take(1)
            continue
        key = yield from string(feed)
        if (yield from peek(feed)) != ":":
            raise ValueError("no value")
        feed.take(1)
        first = yield from peek(feed)
        if key == "name" and name is None:
            name = yield from string(feed)
            if not name:
                raise ValueError("no name")
        elif key in ("arguments", "parameters") and not begun and before is None:
            if first == '"':  # an object written as text
                before = yield from string(feed)
                if not isinstance(json.loads(before), dict):
                    raise ValueError("the arguments are no object")
            elif first != "{":
                raise ValueError("the arguments are no object")
            elif name is None:
                before = yield from value(feed)
            else:
                begun = True
                yield CallPiece(name, "")
                yield from _arguments(feed)
        else:
            yield from value(feed)
        if name is not None and before is not None and not begun:
            begun = True
            yield CallPiece(name, before)
    feed.take(1)
    if name is None:
        raise ValueError("no name")
    if not begun:
        yield CallPiece(name, "{}")


def _arguments(feed: Feed) -> Reading:
    for piece in pieces_of_value(feed):
        yield None if piece is None else CallPiece(None, piece)


def _tag(feed: Feed, tag: str) -> Generator[None, None, bool]:
    """Read white space and the tag, if that comes."""
    yield from peek(feed)
    comes = yield from starts_with(feed, tag)
    if comes:
        feed.take(len(tag))
    return comes


def _text(feed: Feed, end: str) -> Reading:
    """A text until `end`, and a line end before it, as a JSON string. Raises ValueError where it does not end."""
    yield CallPiece(None, '"')
    while (at := feed.rest.find(end)) < 0:
        held = len(end)  # with the line end, which is one more than may be a beginning of `end`
        if feed.is_whole:
            held = 0
        if piece := feed.take(max(0, len(feed.rest) - held)):
            yield CallPiece(None, _within_quotes(piece))
        if feed.is_whole:
            raise ValueError("the value does not end")
        yield None
    yield CallPiece(None, _within_quotes(feed.take(at).removesuffix("\n")) + '"')
    feed.take(len(end))


def _within_quotes(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return text


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
