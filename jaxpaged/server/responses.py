"""/v1/responses: text or calls of tools, whole or as the events of OpenAI's newer API. Nothing is kept after it.

A stream names each of its events and numbers them; the answer so far stands in those that open and close it.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from jaxpaged.errors import RequestError
from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.server.answers import Json, TokenNames, chat_logprobs
from jaxpaged.server.async_engine import AsyncEngine, NewRequest
from jaxpaged.server.chat import begins_thinking
from jaxpaged.server.exchange import Exchange, event
from jaxpaged.server.generation import Observer, Run
from jaxpaged.server.reader import Parts, Reader
from jaxpaged.server.response_input import Asked
from jaxpaged.server.tool_formats import CallPiece, parameters_of
from jaxpaged.server.tools import new_call_id

Kind = Literal["reasoning", "message", "function_call"]

PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
"""Of items' ids."""

_NO_DETAILS = {"description": None, "parameters": None, "strict": False}
"""What a tool says where its definition does not."""


async def answer(
    exchange: Exchange,
    engine: AsyncEngine,
    asked: Asked,
    model: str,
    token_ids: list[int],
    observe: Observer,
) -> None:
    """Run the prompt and write the answer."""
    request, tools = asked.request, asked.tools
    if request.request_id is not None and not 0 < len(request.request_id) <= 256:
        raise RequestError(f"request_id has {len(request.request_id):,} characters; it must have 1 to 256")
    answer_id = f"resp_{request.request_id or uuid.uuid4().hex}"
    reader = None
    if asked.reasoning is not None or tools is not None:
        reader = Reader(
            thinks=asked.reasoning is not None,
            begins_thinking=begins_thinking(asked.reasoning, engine.tokenizer, token_ids),
            tools=tools.reads if tools is not None else None,
            parameters=parameters_of(tools.definitions) if tools is not None else None,
        )
    writer = Writer(answer_id, model, asked, TokenNames(engine.tokenizer), reader)
    one = NewRequest(
        answer_id,
        token_ids,
        asked.params,
        "delta" if request.stream else "final",
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        asked_tokens=request.asked_tokens,
        lora_request=engine.lora_named(model),
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
    """A part of the output as it grows: what was thought, what is said, or a call, whose text are its arguments."""

    kind: Kind
    item_id: str
    place: int
    name: str = ""  # of the function that is called
    call_id: str = ""
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)

    def as_object(self, status: str, *, is_begun: bool = True) -> Json:
        """OpenAI's output item."""
        if self.kind == "function_call":
            called = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
            return {"id": self.item_id, "type": self.kind, "status": status} | called
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
        """How events name the item, or its one part."""
        part = {} if self.kind == "function_call" else {"content_index": 0}
        return {"item_id": self.item_id, "output_index": self.place} | part


class Writer:
    """One response as it grows. What was asked stands in it as it was understood."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        asked: Asked,
        names: TokenNames,
        reader: Reader | None = None,
    ) -> None:
        request, params = asked.request, asked.params
        self._names, self._wanted, self._reader = names, params.logprobs, reader
        self._most = asked.tools.most if asked.tools is not None else None
        self._num_calls = 0
        self._name = answer_id.removeprefix("resp_")
        self._head: Json = {
            "id": answer_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": [_NO_DETAILS | tool for tool in request.tools or ()],
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
        parts = Parts("", [completion.text] if completion.text else [])
        if self._reader is not None:
            parts = self._reader.take(completion.text, is_last=completion.finished)
        events = self._grown("reasoning", parts.reasoning) if parts.reasoning else b""
        for piece in parts.pieces:
            events += self._grown("message", piece) if isinstance(piece, str) else self._called(piece)
        if completion.finished and not self._num_calls and (self._logprobs or not self._items):
            events += self._grown("message", "")
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

    def _begun(self, kind: Kind, name: str = "", call_id: str = "") -> bytes:
        """Another item begins, and the one before ends."""
        events, place = self._ended("completed"), len(self._items)
        item = Item(kind, f"{PREFIXES[kind]}_{self._name}_{place}", place, name, call_id)
        self._items.append(item)
        begun = item.as_object("in_progress", is_begun=False)
        return events + self._event("output_item.added", output_index=place, item=begun)

    def _called(self, piece: CallPiece) -> bytes:
        """A call, or more of the last one's arguments. Its tokens' logprobs have no place in an answer."""
        events = b""
        self._logprobs.clear()
        self._num_calls += piece.name is not None
        if self._most is not None and self._num_calls > self._most:
            return events
        if piece.name is not None:
            events = self._begun("function_call", piece.name, new_call_id())
        item = self._items[-1]
        item.text += piece.arguments
        if not piece.arguments:
            return events
        return events + self._event("function_call_arguments.delta", **item.where(), delta=piece.arguments)

    def _grown(self, kind: Literal["reasoning", "message"], text: str) -> bytes:
        """More text of an item."""
        events = b""
        if not self._items or self._items[-1].kind != kind:
            events = self._begun(kind)
            item = self._items[-1]
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
        events = b""
        match item.kind:
            case "reasoning":
                events = self._event("reasoning_text.done", **item.where(), text=item.text)
            case "message":
                events = self._event("output_text.done", **item.where(), text=item.text, logprobs=item.logprobs)
            case "function_call":
                events = self._event(
                    "function_call_arguments.done", **item.where(), name=item.name, arguments=item.text
                )
        if item.kind != "function_call":
            events += self._event("content_part.done", **item.where(), part=item.part())
        return events + self._event("output_item.done", output_index=item.place, item=item.as_object(status))

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

    def _event(self, name: str, /, **fields: Any) -> bytes:
        kind = f"response.{name}"
        return event({"type": kind, "sequence_number": next(self._numbers)} | fields, kind)


def _item_status(response: Json) -> str:
    return "completed" if response["status"] == "completed" else "incomplete"
