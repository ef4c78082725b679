"""/v1/chat/completions: from messages and tools to a prompt, and from text to a message with thoughts and calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxpaged.engine.chat_template import TEMPLATE_SWITCHES, Message, variables_of
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import RequestError
from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.answers import Json, TokenNames, chat_logprobs, prompt_logprobs
from jaxpaged.server.protocol import ChatRequest, Effort, sampling_params
from jaxpaged.server.reader import OPENING, Parts, Reader
from jaxpaged.server.tool_formats import CallPiece, format_of, parameters_of
from jaxpaged.server.tools import ToolUse, new_call_id, readable, tools_of

OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""What a template is given by other fields of a request."""

REASONING_PARSERS = {"qwen3": False, "deepseek_r1": True}
"""vLLM's names; True where every answer begins with thoughts, whether or not a mark opens them."""


THOUGHTS = ("reasoning", "reasoning_content")
"""What clients call them: vLLM's name, and the one that it had before."""


class Parsers(NamedTuple):
    """How the model's answers are read; None: as the chat template says (tools), or not at all (reasoning)."""

    tools: str | None = None
    reasoning: str | None = None

    def tool_format(self, template: str | None) -> str | None:
        """How the model writes calls; None where that is not known."""
        return self.tools or (format_of(template) if template is not None else None)


class Chat(NamedTuple):
    """One request, understood."""

    request: ChatRequest
    params: SamplingParams
    messages: Sequence[Message]
    variables: dict[str, Any]  # for the template
    tools: ToolUse | None
    reasoning: str | None


def understood(
    request: ChatRequest, tokenizer: Tokenizer | None, parsers: Parsers, defaults: Mapping[str, Any]
) -> Chat:
    """What a request asks for. Raises RequestError."""
    template = tokenizer.chat_template if tokenizer is not None else None
    format_name = parsers.tool_format(template)
    tools = tools_of(request.tools, request.tool_choice, request.parallel_tool_calls, format_name, template)
    params = with_calls(chat_params(request, tools, defaults), tools, tokenizer)
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt are true; a turn either goes on or begins")
    variables = thinking(request.reasoning_effort, tokenizer)
    variables |= template_variables(request.chat_template_kwargs, tokenizer)
    if tools is not None:
        variables["tools"] = tools.definitions
    if request.documents:
        if "documents" not in _declared(tokenizer):
            raise RequestError("documents are given, but the model's chat template knows none; put them in a message")
        variables["documents"] = request.documents
    return Chat(request, params, readable(request.messages, template), variables, tools, parsers.reasoning)


def template_variables(given: Mapping[str, Any] | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`chat_template_kwargs`: what the template itself asks for, and no other field gives. Raises RequestError."""
    own = _declared(tokenizer) - OURS - (tokenizer.named_tokens.keys() if tokenizer is not None else set())
    for name, value in (given or {}).items():
        if name in TEMPLATE_SWITCHES:
            if not isinstance(value, bool):
                raise RequestError(f"chat_template_kwargs.{name} is {value!r:.60}; it must be true or false")
        elif name not in own:
            known = ", ".join(sorted(own.union(TEMPLATE_SWITCHES)))
            raise RequestError(f"chat_template_kwargs sets {name!r:.60}; the model's chat template knows {known}")
    return dict(given or {})


def thinking(effort: Effort | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What tells the template how much to think, by names that it knows. Raises RequestError where there are none."""
    declared = _declared(tokenizer)
    if effort is None:
        return {}
    found: dict[str, Any] = {name: effort != "none" for name in TEMPLATE_SWITCHES if name in declared}
    if "reasoning_effort" in declared:
        found["reasoning_effort"] = effort
    if not found and effort != "none":
        raise RequestError(
            f"the reasoning effort is {effort!r}, but the model's chat template knows none; leave it out"
        )
    return found


def _declared(tokenizer: Tokenizer | None) -> frozenset[str]:
    template = tokenizer.chat_template if tokenizer is not None else None
    return variables_of(template) if template is not None else frozenset()


def chat_params(request: ChatRequest, tools: ToolUse | None, defaults: Mapping[str, Any]) -> SamplingParams:
    """An answer may be as long as the model allows, unless it is bounded."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError(f"top_logprobs is {request.top_logprobs} but logprobs is not true; set it")
    return sampling_params(
        request,
        defaults,
        max_tokens=request.asked_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        structured_outputs=tools.form if tools is not None else None,
    )


def with_calls(params: SamplingParams, tools: ToolUse | None, tokenizer: Tokenizer | None) -> SamplingParams:
    """The parameters with which calls of the tools can be read from the answer. Raises RequestError."""
    if tools is None:
        return params
    if tools.form is None and params.form is not None:
        raise RequestError("tools and a form of the answer are given; set tool_choice to none, or leave the form out")
    if tokenizer is not None and tools.reads.opening:
        special = (tokenizer.backend.id_to_token(token) for token in tokenizer.special_token_ids)
        if {tools.reads.opening, tools.reads.closing} & set(special):  # they must be seen to be read
            return replace(params, skip_special_tokens=False)
    return params


def begins_thinking(reasoning: str | None, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int]) -> bool:
    """Whether no mark opens the thoughts: some templates write it themselves."""
    if reasoning is None or tokenizer is None:
        return False
    end = tokenizer.decode(prompt_token_ids[-16:], skip_special_tokens=False)
    return REASONING_PARSERS[reasoning] or end.rstrip().endswith(OPENING)


class ChatForm:
    """What /v1/chat/completions writes."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, chat: Chat, tokenizer: Tokenizer | None) -> None:
        self.request, self._tools = chat.request, chat.tools
        self.names = TokenNames(tokenizer, bool(chat.request.return_tokens_as_token_ids))
        # An answer of a given form has no room for thoughts.
        self._reasoning = None if chat.params.form is not None else chat.reasoning
        self._readers: dict[int, Reader] = {}
        self._num_calls: dict[int, int] = {}

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> Json:
        """A completion that has ended."""
        parts = self._read(index, completion, output)
        message: Json = {"role": "assistant", "content": parts.content, "refusal": None}
        if calls := _joined(self._calls(index, parts.calls)):
            message |= {"content": parts.content or None, "tool_calls": calls}
        if self._reasoning is not None and self.request.include_reasoning is not False:
            message |= dict.fromkeys(THOUGHTS, parts.reasoning or None)
        return self._common(index, completion, output, True) | {"message": message}

    def parts(self, index: int, completion: CompletionOutput, output: RequestOutput, is_first: bool) -> list[Json]:
        """What is new of a completion; before the first comes whose turn it is."""
        found: list[Json] = []
        if is_first:
            role = {"role": "assistant", "content": ""}
            found = [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}]
        parts = self._read(index, completion, output)
        delta: Json = {"content": parts.content} if parts.content else {}
        if parts.reasoning and self.request.include_reasoning is not False:
            delta |= dict.fromkeys(THOUGHTS, parts.reasoning)
        if calls := self._calls(index, parts.calls):
            delta["tool_calls"] = calls
        part = self._common(index, completion, output, is_first) | {"delta": delta}
        says_more = is_first or completion.finished or part["logprobs"] is not None or self.request.return_token_ids
        return [*found, part] if delta or says_more else found

    def _read(self, index: int, completion: CompletionOutput, output: RequestOutput) -> Parts:
        if self._tools is None and self._reasoning is None:
            return Parts("", [completion.text])
        if index not in self._readers:
            self._readers[index] = Reader(
                thinks=self._reasoning is not None,
                begins_thinking=begins_thinking(self._reasoning, self.names.tokenizer, output.prompt_token_ids),
                tools=self._tools.reads if self._tools is not None else None,
                parameters=parameters_of(self._tools.definitions) if self._tools is not None else None,
            )
        return self._readers[index].take(completion.text, is_last=completion.finished)

    def _calls(self, index: int, pieces: list[CallPiece]) -> list[Json]:
        """A completion's new pieces of calls as deltas have them, as far as they are given."""
        found: list[Json] = []
        most = self._tools.most if self._tools is not None else None
        for piece in pieces:
            place = self._num_calls.get(index, 0) - (piece.name is None)
            if piece.name is not None:
                self._num_calls[index] = place + 1
            if most is not None and place >= most:
                continue
            if piece.name is not None:
                function = {"name": piece.name, "arguments": piece.arguments}
                found.append({"index": place, "id": new_call_id(), "type": "function", "function": function})
            elif found and found[-1]["index"] == place:
                found[-1]["function"]["arguments"] += piece.arguments
            else:
                found.append({"index": place, "function": {"arguments": piece.arguments}})
        return found

    def _common(self, index: int, completion: CompletionOutput, output: RequestOutput, is_first: bool) -> Json:
        has_called = completion.finish_reason == "stop" and self._num_calls.get(index, 0) > 0
        part: Json = {
            "index": index,
            "logprobs": None,
            "finish_reason": "tool_calls" if has_called else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None:
            wanted = self.request.top_logprobs or 0
            content = chat_logprobs(completion.token_ids, completion.logprobs, self.names, wanted)
            part["logprobs"] = {"content": content, "refusal": None}
        if self.request.return_token_ids:
            tokens = {"token_ids": completion.token_ids}
            part |= tokens | ({"prompt_token_ids": output.prompt_token_ids} if is_first else {})
        if self.request.prompt_logprobs is not None and is_first:
            part["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return part


def _joined(calls: list[Json]) -> list[Json]:
    """Whole calls as messages have them: in order, and not numbered."""
    return [{name: value for name, value in call.items() if name != "index"} for call in calls]
