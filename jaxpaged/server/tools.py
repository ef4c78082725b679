"""Tools as clients offer them: checked, put into the prompt, and, where a call is required, made the answer's form."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.engine.chat_template import Message
from jaxpaged.errors import RequestError
from jaxpaged.server.tool_formats import FORMATS, Format, json_calls
from jaxpaged.structured_outputs import StructuredOutputsParams

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class ToolUse:
    """What a request may call: definitions for the template, how calls are read, the form that requires one."""

    definitions: list[dict[str, Any]]
    reads: Format
    form: StructuredOutputsParams | None
    most: int | None  # calls that are given


def tools_of(
    tools: Sequence[Any] | None, choice: Any, parallel: bool | None, format_name: str | None, template: str | None
) -> ToolUse | None:
    """What the request's `tools`, `tool_choice` and `parallel_tool_calls` ask for; None where none may be called.

    Raises RequestError, also where the model's format is not known.
    """
    named = choice.get("function", {}).get("name") if _is_named(choice) else None
    if choice not in (None, "none", "auto", "required") and named is None:
        raise RequestError(
            f"tool_choice is {choice!r:.80}; known: none, auto, required, "
            "{'type': 'function', 'function': {'name': ...}}"
        )
    if not tools:
        if choice == "required" or named is not None:
            raise RequestError("tool_choice asks for a call but there are no tools; give some, or leave it out")
        return None
    definitions = [_checked(tool, place) for place, tool in enumerate(tools)]
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools):,} entries; it may have at most {MAX_TOOLS:,}")
    if choice == "none":
        return None
    if template is None or "tools" not in template:
        raise RequestError("the model's chat template knows no tools; leave them out")
    most = 1 if parallel is False or named is not None else None
    if choice == "required" or named is not None:
        wanted = [d["function"] for d in definitions if named in (None, d["function"]["name"])]
        if not wanted:
            raise RequestError(f"tool_choice names {named!r:.80}, which is not among the tools")
        form = StructuredOutputsParams(json=_schema(wanted, most), whitespace_pattern=" ?")
        return ToolUse(definitions, Format(json_calls, beginnings=("[",)), form, most)
    if format_name is None:
        raise RequestError(
            "how this model calls tools is not known; start the server with --tool-call-parser, one of "
            f"{', '.join(FORMATS)}, or set tool_choice to required"
        )
    return ToolUse(definitions, FORMATS[format_name], None, most)


def readable(messages: Sequence[Message], template: str | None) -> Sequence[Message]:
    """The messages as templates want them: earlier calls with arguments as objects, and a content; a developer is the
    system to a template that knows none. Raises RequestError.
    """
    found = [_readable(m, place) if isinstance(m, Mapping) else m for place, m in enumerate(messages)]
    if template is None or "developer" in template:
        return found
    return [m | {"role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m for m in found]


def _readable(message: Message, place: int) -> Message:
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list):
        raise RequestError(f"messages[{place}].tool_calls is {calls!r:.60}; it must be a list")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"messages[{place}].tool_calls holds {call!r:.60}; a call has a function with a name")
        arguments = arguments_of(function.get("arguments"), f"messages[{place}]")
        found.append(call | {"function": function | {"arguments": arguments}})
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {"content": ""} | {n: v for n, v in rest.items() if v is not None} | ({"tool_calls": found} if found else {})


def arguments_of(given: Any, where: str) -> dict[str, Any]:
    """A call's arguments as templates want them. Raises RequestError."""
    given = given or "{}"
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{where} has a call whose arguments are no JSON object")
    return found


def new_call_id() -> str:
    """Mistral's templates want nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _is_named(choice: Any) -> bool:
    return (
        isinstance(choice, dict)
        and choice.get("type") == "function"
        and isinstance(choice.get("function"), dict)
        and isinstance(choice["function"].get("name"), str)
    )


def _checked(tool: Any, place: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        wanted = "{'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
        raise RequestError(f"tools[{place}] is {tool!r:.60}; it must be {wanted}")
    if not _NAME.fullmatch(function["name"]):
        raise RequestError(f"tools[{place}] has the name {function['name']!r:.80}; it may have 64 of a-z A-Z 0-9 _.-")
    if not isinstance(function.get("parameters") or {}, dict):
        raise RequestError(f"tools[{place}] has parameters {function['parameters']!r:.60}; they are a JSON schema")
    return {"type": "function", **tool}


def _schema(functions: Sequence[Mapping[str, Any]], most: int | None) -> dict[str, Any]:
    """A list of calls, each of one of the functions."""
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = {"type": "object"} | dict(function.get("parameters") or {})
        for keyword in ("$defs", "definitions"):  # references are looked up from the top
            defined: Any = parameters.pop(keyword, None) or {}
            if not isinstance(defined, dict):
                raise RequestError(f"{keyword} of {function['name']} is {defined!r:.60}; it must be an object")
            for name, definition in defined.items():
                if definitions.setdefault(keyword, {}).setdefault(name, definition) != definition:
                    raise RequestError(f"two tools define {name!r:.60} differently; give one of them another name")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    bounds = {"minItems": 1} | ({"maxItems": most} if most is not None else {})
    return {"type": "array", "items": items} | bounds | definitions
