"""A completion or a chat from request to answer, whole or streamed. Where two endpoints differ, a `Form` says how."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from jaxpaged.engine.report import OutputKind
from jaxpaged.errors import RequestError
from jaxpaged.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.answers import (
    Json,
    TokenNames,
    completion_logprobs,
    prompt_logprobs,
    usage,
)
from jaxpaged.server.async_engine import AsyncEngine, NewRequest
from jaxpaged.server.exchange import Envelope, Exchange, event
from jaxpaged.server.inbox import Inbox
from jaxpaged.server.protocol import MAX_PROMPTS, CompletionRequest, Generation, sampling_params
from jaxpaged.server.truncation import cut

MAX_EVENTS = 64  # of one write

Observer = Callable[[RequestOutput, int], None]
"""Told of each request that has finished, and how many tokens were generated for it."""


class Form(Protocol):
    """How an endpoint writes what the engine says."""

    prefix: str
    whole: str
    part: str

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> Json:
        """A completion that has ended."""

    def parts(self, index: int, completion: CompletionOutput, output: RequestOutput, is_first: bool) -> list[Json]:
        """What is new of a completion."""


class Run:
    """Several requests under way for one client; leaving the context ends those that have not finished."""

    def __init__(self, engine: AsyncEngine, requests: Sequence[NewRequest], observe: Observer) -> None:
        self._engine, self._requests, self._observe = engine, requests, observe
        self._places = {request.request_id: place for place, request in enumerate(requests)}
        self._open = set(self._places)
        self._num_generated = [0] * len(requests)
        self._inbox = Inbox()

    async def __aenter__(self) -> Self:
        await self._engine.submit(self._requests, self._inbox)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._open:
            self._engine.discard(self._open, self._inbox)

    @property
    def is_behind(self) -> bool:
        """Whether the next output is there already."""
        return self._inbox.has_output

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Each output with the place of its prompt, until all have finished."""
        while self._open:
            output = await self._inbox.get()
            place = self._places[output.request_id]
            self._num_generated[place] += sum(len(completion.token_ids) for completion in output.outputs)
            if output.finished:
                self._open.discard(output.request_id)
                self._observe(output, self._num_generated[place])
            yield place, output


async def answer(
    exchange: Exchange,
    engine: AsyncEngine,
    request: Generation,
    model: str,
    prompts: Sequence[tuple[Any, str | None]],
    params: SamplingParams,
    form: Form,
    observe: Observer,
) -> None:
    """Run the prompts, each with its text where that is known, and write the answer."""
    if request.request_id is not None and not 0 < len(request.request_id) <= 256:
        raise RequestError(f"request_id has {len(request.request_id):,} characters; it must have 1 to 256")
    answer_id = f"{form.prefix}-{request.request_id or uuid.uuid4().hex}"
    kind: OutputKind = "delta" if request.stream else "final"
    room = max(1, engine.max_model_len - (params.max_tokens or 1))
    prompts = await cut(engine, prompts, request.truncate_prompt_tokens, room)
    requests = [
        NewRequest(
            f"{answer_id}-{place}", prompt, params, kind, text, priority=request.priority or 0,
            cache_salt=request.cache_salt, asked_tokens=request.asked_tokens, lora_request=engine.lora_named(model),
        )
        for place, (prompt, text) in enumerate(prompts)
    ]  # fmt: skip
    head: Json = {"id": answer_id, "object": form.whole, "created": int(time.time()), "model": model}
    async with Run(engine, requests, observe) as run:
        if request.stream:
            await _stream(exchange, run, request, head | {"object": form.part}, params.n, form)
            return
        outputs = {place: output async for place, output in run.outputs()}
    ordered = [outputs[place] for place in sorted(outputs)]
    choices = [
        form.choice(place * params.n + completion.index, completion, output)
        for place, output in enumerate(ordered)
        for completion in output.outputs
    ]
    generated = sum(len(completion.token_ids) for output in ordered for completion in output.outputs)
    await exchange.reply_json(head | {"choices": choices, "usage": usage(ordered, generated)})


async def _stream(exchange: Exchange, run: Run, request: Generation, head: Json, n: int, form: Form) -> None:
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage)
    continuous = with_usage and options is not None and bool(options.continuous_usage_stats)
    extra: Json = {"usage": None} if with_usage else {}
    seen: set[int] = set()
    ended: set[int] = set()
    prompts: dict[int, RequestOutput] = {}
    generated = 0
    envelope = Envelope(head, "choices")
    events: list[bytes] = []
    await exchange.start_events()
    async for place, output in run.outputs():
        prompts[place] = output
        for completion in output.outputs:
            index = place * n + completion.index
            if index in ended or not (completion.token_ids or completion.finished):
                continue
            generated += len(completion.token_ids)
            for part in form.parts(index, completion, output, index not in seen):
                if continuous:
                    extra = {"usage": usage(list(prompts.values()), generated)}
                events.append(envelope.event([part], extra))
            seen.add(index)
            if completion.finished:
                ended.add(index)
        if events and not (run.is_behind and len(events) < MAX_EVENTS):  # one write for all that is there
            await exchange.send_events(b"".join(events))
            events.clear()
    if with_usage:
        last = {"choices": [], "usage": usage([prompts[place] for place in sorted(prompts)], generated)}
        await exchange.send_events(event(head | last))
    await exchange.end_events()


class CompletionForm:
    """What /v1/completions writes."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest, engine: AsyncEngine) -> None:
        self.request = request
        self.names = TokenNames(engine.tokenizer, bool(request.return_tokens_as_token_ids))
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> Json:
        """A completion that has ended."""
        (whole,) = self.parts(index, completion, output, True)
        return whole

    def parts(self, index: int, completion: CompletionOutput, output: RequestOutput, is_first: bool) -> list[Json]:
        """What is new of a completion; with the first comes the prompt, where it is echoed."""
        request = self.request
        text, token_ids, entries = completion.text, completion.token_ids, completion.logprobs
        if request.echo and request.max_tokens == 0:  # a token had to be made, and nobody asked for it
            text, token_ids, entries = "", [], None if entries is None else []
        reason = "length" if request.max_tokens == 0 and completion.finished else completion.finish_reason
        shown: Sequence[int] = token_ids
        places: Sequence[TokenLogprobs | None] | None = entries
        if request.echo and is_first:
            text = self._prompt_text(output) + text
            shown = [*output.prompt_token_ids, *token_ids]
            places = None if entries is None else [*(output.prompt_logprobs or ()), *entries]
        part: Json = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": completion.stop_reason,
        }
        if places is not None:
            offset = self._offsets.get(index, 0)
            part["logprobs"] = completion_logprobs(shown, places, self.names, offset, request.logprobs or 0)
            self._offsets[index] = offset + sum(map(len, map(self._token_text, shown)))
        if request.return_token_ids:
            part |= {"token_ids": token_ids} | ({"prompt_token_ids": output.prompt_token_ids} if is_first else {})
        if request.prompt_logprobs is not None and is_first:
            part["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return [part]

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None or self.names.tokenizer is None:
            return output.prompt or ""
        return self.names.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def _token_text(self, token: int) -> str:
        return self.names.tokenizer.token_text(token) if self.names.tokenizer else ""


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """Echoed logprobs are those of the prompt too; to score a prompt, one token is made and dropped."""
    wanted = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        wanted = max(wanted or 0, request.logprobs)
    if request.stream and request.best_of is not None and request.best_of > (request.n or 1):
        raise RequestError(f"best_of is {request.best_of:,} and stream is true; the best are known only in the end")
    max_tokens = request.max_tokens
    if max_tokens is None and "max_tokens" not in defaults:
        max_tokens = SamplingParams.max_tokens
    if request.echo and max_tokens == 0:
        max_tokens = 1
    return sampling_params(
        request,
        defaults,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=wanted,
        best_of=request.best_of,
    )


def completion_prompts(prompt: Any, name: str = "prompt") -> list[tuple[Any, str | None]]:
    """Text, texts, token ids or lists of them, as a list of prompts; `name` is the field's."""
    if isinstance(prompt, str):
        return [(prompt, None)]
    if not prompt:
        raise RequestError(f"{name} is empty; give text, or at least 1 token id")
    if all(isinstance(part, int) and not isinstance(part, bool) for part in prompt):
        return [(prompt, None)]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"{name} has {len(prompt):,} entries; at most {MAX_PROMPTS:,} are served at once")
    if not (all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) for part in prompt)):
        raise RequestError(f"{name} mixes texts and token ids; give text, token ids, or a list of either")
    return [(part, None) for part in prompt]
