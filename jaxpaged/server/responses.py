"""/v1/responses: one answer to text, whole or as the events of OpenAI's newer API. Nothing is kept after it.

A stream names each of its events and numbers them; the answer so far stands in those that open and close it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from jaxpaged.engine.chat_template import Message
from jaxpaged.errors import RequestError
from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.answers import Json, TokenNames, chat_logprobs
from jaxpaged.server.async_engine import AsyncEngine, NewRequest
from jaxpaged.server.chat import begins_thinking
from jaxpaged.server.exchange import Exchange, event
from jaxpaged.server.generation import Observer, Run
from jaxpaged.server.protocol import ResponseRequest, sampling_params
from jaxpaged.server.reader import Parts, Reader

NOT_KEPT = "this server keeps no responses; "
REFUSED = {
    "store": NOT_KEPT + "leave it out",
    "previous_response_id": NOT_KEPT + "send the conversation so far as input",
    "conversation": NOT_KEPT + "send the conversation so far as input",
    "background": NOT_KEPT + "stream it, or wait",
    "prompt": "this server keeps no prompts; send instructions and input",
    "tools": "it is not served here; use /v1/chat/completions",
    "truncate_prompt_tokens": "it is not served; shorten the input",
    "max_tool_calls": "it is not served; leave it out",
}
"""Fields that ask for what there is not, and what to do instead."""

LOGPROBS = "message.output_text.logprobs"
MEANS_NOTHING = ("reasoning.encrypted_content",)
"""Clients ask for these parts of any response; where there are none, none come."""

TEXT_PARTS = ("input_text", "output_text", "text")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def response_params(request: ResponseRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """A response may be as long as the model allows, unless it is bounded. Raises RequestError."""
    for name, what in REFUSED.items():
        if asked := getattr(request, name):
            if isinstance(asked, Mapping) and not any(asked.values()):
                continue
            raise RequestError(f"{name} is given, but {what}")
    if request.truncation not in (None, "disabled"):
        raise RequestError(f"truncation is {request.truncation!r}; only 'disabled' is served: shorten the input")
    match request.text.format if request.text is not None else None:
        case {"type": "json_schema", **schema}:
            request.response_format = {"type": "json_schema", "json_schema": schema}
        case dict(other):
            request.response_format = other
        case None:
            pass
        case other:
            raise RequestError(f"text.format is {other!r:.60}; it must be as in {{'type': 'text'}}")
    if request.n not in (None, 1):
        raise RequestError(f"n is {request.n:,}; a response has one text, leave it out")
    include = request.include or []
    if unknown := [name for name in include if name not in (LOGPROBS, *MEANS_NOTHING)]:
        raise RequestError(f"include names {unknown[0]!r}; served: {LOGPROBS}")
    wanted = (request.top_logprobs or 0) if LOGPROBS in include or request.top_logprobs else None
    return sampling_params(request, defaults, max_tokens=request.asked_tokens, logprobs=wanted)


def messages_of(request: ResponseRequest) -> list[Message]:
    """Instructions and input as the messages of a chat. Raises RequestError."""
    messages: list[Message] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for place, item in enumerate(request.input):
        kind = item.get("type", "message")
        if kind == "reasoning":  # of an earlier answer, which is in the input too
            continue
        if kind != "message":
            raise RequestError(f"input[{place}] is a {kind!r}; only messages are served")
        role = item.get("role")
        if role not in ROLES:
            raise RequestError(f"input[{place}] has role {role!r}; known: {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _text_of(item.get("content"), place)})
    return messages


def _text_of(content: Any, place: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"input[{place}] has content {content!r}; it must be text or a list of text parts")
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)
        if not is_text:
            raise RequestError(f"input[{place}] has a part {part!r}; only text is served")
        texts.append(part["text"])
    return "\n".join(texts)


async def answer(
    exchange: Exchange,
    engine: AsyncEngine,
    request: ResponseRequest,
    model: str,
    token_ids: list[int],
    params: SamplingParams,
    reasoning: str | None,
    observe: Observer,
) -> None:
    """Run the prompt and write the answer; `reasoning` is the parser that tells thoughts apart, if any."""
    if request.request_id is not None and not 0 < len(request.request_id) <= 256:
        raise RequestError(f"request_id has {len(request.request_id):,} characters; it must have 1 to 256")
    answer_id = f"resp_{request.request_id or uuid.uuid4().hex}"
    reader = None
    if reasoning is not None and params.form is None:  # a given form has no room for thoughts
        begun = begins_thinking(reasoning, engine.tokenizer, token_ids)
        reader = Reader(thinks=True, begins_thinking=begun, tools=None)
    writer = Writer(answer_id, model, request, params, TokenNames(engine.tokenizer), reader)
    one = NewRequest(
        answer_id,
        token_ids,
        params,
        "delta" if request.stream else "final",
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        asked_tokens=request.asked_tokens,
    )
    async with Run(engine, [one], observe) as run:
        if not request.stream:
            async for _, output in run.outputs():
                writer.take(output)
            await exchange.reply_json(writer.response())
            return
        await exchange.start_events()
        await exchange.send_events(writer.opening())
        async for _, output in run.outputs():
            if events := writer.take(output):
                await exchange.send_events(events)
        await exchange.send_events(writer.closing())
        await exchange.end_events()


@dataclass(slots=True)
class Item:
    """A part of the output as it grows: what was thought, or what is said."""

    kind: Literal["reasoning", "message"]
    item_id: str
    place: int
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)

    def as_object(self, status: str, *, is_begun: bool = True) -> Json:
        """OpenAI's output item."""
        common: Json = {
            "id": self.item_id,
            "type": self.kind,
            "status": status,
            "content": [self.part()] if is_begun else [],
        }
        own: Json = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return common | own

    def part(self) -> Json:
        """OpenAI's content part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def where(self) -> Json:
        """How events name the part."""
        return {"item_id": self.item_id, "output_index": self.place, "content_index": 0}


class Writer:
    """One response as it grows. What was asked stands in it as it was understood."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        request: ResponseRequest,
        params: SamplingParams,
        names: TokenNames,
        reader: Reader | None = None,
    ) -> None:
        self._names, self._wanted, self._reader = names, params.logprobs, reader
        self._name = answer_id.removeprefix("resp_")
        self._head: Json = {
            "id": answer_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": request.user,
        }
        self._numbers = count()
        self._items: list[Item] = []
        self._logprobs: list[Json] = []  # of tokens whose text has not come yet
        self._num_generated = 0
        self._last: RequestOutput | None = None

    def take(self, output: RequestOutput) -> bytes:
        """Add what is new, and give the events that say so."""
        completion = output.outputs[0]
        self._last = output
        self._num_generated += len(completion.token_ids)
        self._logprobs += self._told(completion)
        parts = Parts("", completion.text, [])
        if self._reader is not None:
            parts = self._reader.take(completion.text, is_last=completion.finished)
        events = self._grown("reasoning", parts.reasoning) if parts.reasoning else b""
        if parts.content or (completion.finished and (self._logprobs or not self._items)):
            events += self._grown("message", parts.content)
        return events

    def opening(self) -> bytes:
        """The events before anything has come."""
        begun = {"response": self.response()}
        return self._event("created", **begun) + self._event("in_progress", **begun)

    def closing(self) -> bytes:
        """The events after all has come; the last one has the whole response."""
        response = self.response()
        return self._ended(_item_status(response)) + self._event(response["status"], response=response)

    def response(self) -> Json:
        """All of it, as far as it has come."""
        completion = self._last.outputs[0] if self._last is not None else None
        reason = completion.finish_reason if completion is not None else None
        response = self._head | {"status": "in_progress", "error": None, "incomplete_details": None, "output": []}
        if self._last is None or completion is None or reason is None:
            return response | {"usage": None}
        match reason:
            case "stop":
                response["status"] = "completed"
            case "length":
                response |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            case _:
                message = str(completion.stop_reason or f"the request ended: {reason}")
                response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        statuses = ["completed"] * (len(self._items) - 1) + [_item_status(response)]
        response["output"] = [item.as_object(status) for item, status in zip(self._items, statuses, strict=True)]
        response["usage"] = self._usage(self._last)
        return response

    def _grown(self, kind: Literal["reasoning", "message"], text: str) -> bytes:
        """More text of an item; the one before ends where another begins."""
        events = b""
        if not self._items or self._items[-1].kind != kind:
            events = self._ended("completed")
            prefix = "msg" if kind == "message" else "rs"
            item = Item(kind, f"{prefix}_{self._name}", len(self._items))
            self._items.append(item)
            begun = item.as_object("in_progress", is_begun=False)
            events += self._event("output_item.added", output_index=item.place, item=begun)
            events += self._event("content_part.added", **item.where(), part=item.part())
        item = self._items[-1]
        item.text += text
        if kind == "reasoning":
            return events + self._event("reasoning_text.delta", **item.where(), delta=text)
        logprobs, self._logprobs = self._logprobs, []
        item.logprobs += logprobs
        if not text and not logprobs:
            return events
        return events + self._event("output_text.delta", **item.where(), delta=text, logprobs=logprobs)

    def _ended(self, status: str) -> bytes:
        """The events that end the last item."""
        if not self._items:
            return b""
        item = self._items[-1]
        kind, logprobs = (
            ("reasoning_text", {}) if item.kind == "reasoning" else ("output_text", {"logprobs": item.logprobs})
        )
        return b"".join(
            (
                self._event(f"{kind}.done", **item.where(), text=item.text, **logprobs),
                self._event("content_part.done", **item.where(), part=item.part()),
                self._event("output_item.done", output_index=item.place, item=item.as_object(status)),
            )
        )

    def _usage(self, output: RequestOutput) -> Json:
        prompt = len(output.prompt_token_ids)
        thought = "".join(item.text for item in self._items if item.kind == "reasoning")
        tokenizer = self._names.tokenizer
        num_thought = len(tokenizer.encode(thought, False)) if thought and tokenizer is not None else 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self._num_generated,
            "output_tokens_details": {"reasoning_tokens": min(num_thought, self._num_generated)},
            "total_tokens": prompt + self._num_generated,
        }

    def _told(self, completion: CompletionOutput) -> list[Json]:
        if completion.logprobs is None:
            return []
        return chat_logprobs(completion.token_ids, completion.logprobs, self._names, self._wanted or 0)

    def _event(self, name: str, **fields: Any) -> bytes:
        kind = f"response.{name}"
        return event({"type": kind, "sequence_number": next(self._numbers)} | fields, kind)


def _item_status(response: Json) -> str:
    return "completed" if response["status"] == "completed" else "incomplete"
