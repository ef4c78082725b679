"""What a request for a response asks: its input as the messages of a chat, its tools, its parameters. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpaged.engine.chat_template import Message
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import RequestError
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.chat import Parsers, thinking, with_calls
from jaxpaged.server.protocol import ResponseRequest, sampling_params
from jaxpaged.server.tools import ToolUse, arguments_of, tools_of

NOT_KEPT = "this server keeps no responses; "
REFUSED = {
    "store": NOT_KEPT + "leave it out",
    "previous_response_id": NOT_KEPT + "send the conversation so far as input",
    "conversation": NOT_KEPT + "send the conversation so far as input",
    "background": NOT_KEPT + "stream it, or wait",
    "prompt": "this server keeps no prompts; send instructions and input",
    "truncate_prompt_tokens": "it is not served; shorten the input",
    "max_tool_calls": "it is not served; leave it out",
}
"""Fields that ask for what there is not, and what to do instead."""

LOGPROBS = "message.output_text.logprobs"
MEANS_NOTHING = ("reasoning.encrypted_content",)
"""Clients ask for these parts of any response; where there are none, none come."""

TEXT_PARTS = ("input_text", "output_text", "text")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


class Asked(NamedTuple):
    """One request, understood."""

    request: ResponseRequest
    params: SamplingParams
    messages: list[Message]
    variables: dict[str, Any]  # for the template
    tools: ToolUse | None
    reasoning: str | None  # the parser that tells thoughts apart; a given form has no room for them


def understood(
    request: ResponseRequest, tokenizer: Tokenizer | None, parsers: Parsers, defaults: Mapping[str, Any]
) -> Asked:
    """What a request asks for. Raises RequestError."""
    _refuse(request)
    template = tokenizer.chat_template if tokenizer is not None else None
    tools = tools_of(
        [_nested(tool, place) for place, tool in enumerate(request.tools or ())],
        _nested_choice(request.tool_choice),
        request.parallel_tool_calls,
        parsers.tool_format(template),
        template,
    )
    params = with_calls(_params(request, tools, defaults), tools, tokenizer)
    variables = thinking(request.reasoning.effort if request.reasoning is not None else None, tokenizer)
    if tools is not None:
        variables["tools"] = tools.definitions
    reasoning = parsers.reasoning if params.form is None else None
    return Asked(request, params, messages_of(request), variables, tools, reasoning)


def _refuse(request: ResponseRequest) -> None:
    for name, what in REFUSED.items():
        if asked := getattr(request, name):
            if isinstance(asked, Mapping) and not any(asked.values()):
                continue
            raise RequestError(f"{name} is given, but {what}")
    if request.truncation not in (None, "disabled"):
        raise RequestError(f"truncation is {request.truncation!r}; only 'disabled' is served: shorten the input")
    if request.n not in (None, 1):
        raise RequestError(f"n is {request.n:,}; a response has one text, leave it out")
    if unknown := [name for name in request.include or () if name not in (LOGPROBS, *MEANS_NOTHING)]:
        raise RequestError(f"include names {unknown[0]!r}; served: {LOGPROBS}")


def _params(request: ResponseRequest, tools: ToolUse | None, defaults: Mapping[str, Any]) -> SamplingParams:
    """A response may be as long as the model allows, unless it is bounded."""
    match request.text.format if request.text is not None else None:
        case {"type": "json_schema", **schema}:
            request.response_format = {"type": "json_schema", "json_schema": schema}
        case dict(other):
            request.response_format = other
        case None:
            pass
        case other:
            raise RequestError(f"text.format is {other!r:.60}; it must be as in {{'type': 'text'}}")
    has_logprobs = LOGPROBS in (request.include or ()) or request.top_logprobs
    return sampling_params(
        request,
        defaults,
        max_tokens=request.asked_tokens,
        logprobs=(request.top_logprobs or 0) if has_logprobs else None,
        structured_outputs=tools.form if tools is not None else None,
    )


def _nested(tool: Any, place: int) -> dict[str, Any]:
    """A tool as chats have it; here its function's fields stand beside its type."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise RequestError(f"tools[{place}] is of type {kind!r:.60}; only functions are served, leave it out")
    function = {name: value for name, value in tool.items() if name != "type"}
    if not isinstance(function.get("name"), str):
        wanted = "{'type': 'function', 'name': ..., 'parameters': ...}"
        raise RequestError(f"tools[{place}] is {tool!r:.60}; it must be {wanted}")
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _nested_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        known = "none, auto, required, {'type': 'function', 'name': ...}"
        raise RequestError(f"tool_choice is {choice!r:.80}; known: {known}")
    return {"type": "function", "function": {"name": choice["name"]}}


def messages_of(request: ResponseRequest) -> list[Message]:
    """Instructions and input as the messages of a chat. Raises RequestError."""
    messages: list[Message] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    called = set[str]()
    for place, item in enumerate(request.input):
        where = f"input[{place}]"
        match item.get("type", "message"):
            case "reasoning":  # of an earlier answer, which is in the input too
                continue
            case "message":
                role = item.get("role")
                if not isinstance(role, str) or role not in ROLES:
                    raise RequestError(f"{where} has role {role!r}; known: {', '.join(ROLES)}")
                messages.append({"role": ROLES[role], "content": _text_of(item.get("content"), where)})
            case "function_call":
                call = _call_of(item, where)
                called.add(call["id"])
                if not messages or messages[-1]["role"] != "assistant":  # what was said with it, and earlier calls
                    messages.append({"role": "assistant", "content": ""})
                messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), call]}
            case "function_call_output":
                call_id = item.get("call_id")
                if not isinstance(call_id, str) or call_id not in called:
                    raise RequestError(f"{where} answers call {call_id!r:.60}, which is not before it; send that too")
                content = _text_of(item.get("output"), where)
                messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case kind:
                known = "message, reasoning, function_call, function_call_output"
                raise RequestError(f"{where} is a {kind!r:.60}; known: {known}")
    return messages


def _call_of(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in ("call_id", "name"):
        if not isinstance(item.get(name), str):
            raise RequestError(f"{where} has {name} {item.get(name)!r:.60}; it must be text")
    function = {"name": item["name"], "arguments": arguments_of(item.get("arguments"), where)}
    return {"id": item["call_id"], "type": "function", "function": function}


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} has content {content!r}; it must be text or a list of text parts")
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)
        if not is_text:
            raise RequestError(f"{where} has a part {part!r}; only text is served")
        texts.append(part["text"])
    return "\n".join(texts)
