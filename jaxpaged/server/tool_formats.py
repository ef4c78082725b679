"""How models write calls of tools: where in an answer they stand, and what they say. One `Format` for each way.

Names are vLLM's. A text that looks like a call and is none is left to be shown as it is.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A function's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Format:
    """Calls stand between `opening` and `closing`, or behind `opening` where nothing closes them; without either, the
    whole answer is calls where it begins with one of `beginnings`. `parse` raises ValueError.
    """

    parse: Callable[[str], list[Call]]
    opening: str = ""
    closing: str = ""
    beginnings: tuple[str, ...] = ()


def json_calls(text: str) -> list[Call]:
    """One object with a name and arguments or parameters, a list of them, or several with `;` between."""
    try:
        value = json.loads(text)
    except ValueError:
        value = [json.loads(part) for part in re.split(r"(?<=})\s*;\s*(?={)", text.strip())]
    calls = []
    for one in value if isinstance(value, list) else [value]:
        arguments = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict) or not isinstance(one.get("name"), str):
            raise ValueError("a call is an object with a name and arguments")
        calls.append(_call(one["name"], arguments))
    return calls


def mistral_calls(text: str) -> list[Call]:
    """A list as of `json_calls`; or, newer, name{...} or name[ARGS]{...}, each after a mark of its own."""
    if text.lstrip().startswith(("[", "{")):
        return json_calls(text)
    calls = []
    for part in filter(str.strip, text.split(MISTRAL_MARK)):
        name, brace, rest = part.partition("{")
        arguments = json.loads(brace + rest)
        calls.append(_call(re.split(r"\[(?:ARGS|CALL_ID)\]", name)[0].strip(), arguments))
    return calls


def xml_calls(text: str) -> list[Call]:
    """<function=name><parameter=key>value</parameter>...</function>; a value is JSON where it can be, else text."""
    calls = []
    for name, body in re.findall(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", text, re.DOTALL):
        pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
        calls.append(_call(name.strip(), {key.strip(): _value(value) for key, value in pairs}))
    if not calls:
        raise ValueError("no <function=...>")
    return calls


def python_calls(text: str) -> list[Call]:
    """[name(key=value, ...), ...] with literals as values; nothing is evaluated."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no list of calls: {type(error).__name__}") from None
    if not isinstance(tree, ast.List) or not tree.elts:
        raise ValueError("no list of calls")
    calls = []
    for node in tree.elts:
        if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("a call names its arguments")
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        calls.append(_call(ast.unparse(node.func), arguments))
    return calls


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


def _call(name: str, arguments: Any) -> Call:
    if not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    try:
        return Call(name, json.dumps(arguments, ensure_ascii=False))
    except TypeError as error:
        raise ValueError(str(error)) from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
