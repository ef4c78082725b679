"""`AsyncEngine`: an engine for asyncio. One thread owns it and steps it; event loops send it calls and get outputs.

The thread sleeps on a condition while there is nothing to do. A reader that goes away ends its request before the next
step; a request that fails ends alone; an engine that fails ends all of them with an error, and stays marked as dead.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

import numpy as np

from jaxpaged.engine.embedding import unit_length
from jaxpaged.engine.engine import Engine, request_ids
from jaxpaged.engine.grammar import Grammar
from jaxpaged.engine.intake import EMBEDDING
from jaxpaged.engine.prompts import AnyPrompt, Prompt, given
from jaxpaged.engine.report import OutputKind
from jaxpaged.engine.stats import EngineStats
from jaxpaged.errors import EngineDeadError, QueueFullError, RequestError, TooLongError
from jaxpaged.llm import LLM
from jaxpaged.lora_request import LoRARequest
from jaxpaged.model.params import Params
from jaxpaged.outputs import Pooling, RequestOutput
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.server.inbox import Inbox

log = logging.getLogger("jaxpaged")

T = TypeVar("T")

_SHORT = 2_000  # characters that the event loop may spend its own time on: well under a millisecond


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What `Engine.add_request` takes."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    output_kind: OutputKind = "cumulative"
    prompt_text: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    pooling: Pooling | None = None  # with `params` EMBEDDING
    grammar: Grammar | None = None
    lora_request: str | None = None  # the name of an adapter that the engine knows
    asked_tokens: int | None = None  # that there must be room for, unlike for those of `params`


@dataclass(frozen=True, slots=True)
class _Call:
    """What the engine's thread shall do, and who waits for it."""

    function: Callable[[Engine], Any]
    future: Future[Any]


class AsyncEngine:
    """An engine that any number of tasks, in any number of event loops, use at once."""

    def __init__(self, engine: Engine, *, max_num_queued_requests: int | None = None) -> None:
        """Take over `engine`, which nobody else may use from now on, and start its thread.

        At most `max_num_queued_requests` wait, those not counted for whom a seat is free; None: no limit.
        """
        self.config = engine.config
        self.tokenizer = engine.tokenizer
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.spec.vocab_size
        self.dim = engine.spec.dim
        self.max_num_queued_requests = max_num_queued_requests
        self.dead: str | None = None
        """Why no request can be served any more; None while they can."""
        self._engine = engine
        self._ids = request_ids("async")
        self._inboxes: dict[str, Inbox] = {}  # of requests under way; the thread's own
        self._paused = False  # the thread's own
        self._wake = threading.Condition()
        self._calls: deque[_Call] = deque()  # guarded by _wake, as are the next two
        self._num_arriving = 0  # requests among the calls
        self._stopping = False
        self._busy_since: float | None = None
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="jaxpaged-encode")
        self._compilers = ThreadPoolExecutor(16, thread_name_prefix="jaxpaged-grammar")  # one compiles, others wait
        self._thread = threading.Thread(target=self._run, name="jaxpaged-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        model: Any,
        *,
        max_num_queued_requests: int | None = None,
        lora_modules: Sequence[LoRARequest] = (),
        **settings: Any,
    ) -> Self:
        """An engine for a model, with the arguments of `LLM`, and adapters. Takes as long as loading and compiling."""
        engine = LLM(model, **settings).engine
        for module in lora_modules:
            engine.add_lora(module)
        return cls(engine, max_num_queued_requests=max_num_queued_requests)

    async def generate(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        priority: int = 0,
        cache_salt: str | None = None,
        lora_request: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt, yielding its outputs as they come; closing the generator ends the request.

        `lora_request` is an adapter's name. Raises RequestError where it cannot be served, QueueFullError where it
        cannot be now, EngineDeadError.
        """
        request_id = next(self._ids) if request_id is None else request_id
        prompt, text, salt = given(prompt)
        params, salt = params or SamplingParams(), cache_salt or salt
        request = NewRequest(
            request_id, prompt, params, output_kind, text, priority=priority, cache_salt=salt, lora_request=lora_request
        )
        async with aclosing(self._outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self,
        prompt: AnyPrompt,
        pooling: Pooling = "mean",
        request_id: str | None = None,
        *,
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> np.ndarray:
        """One prompt's embedding, float32 [dim], as `LLM.embed` gives it; the same errors as of `generate`."""
        request_id = next(self._ids) if request_id is None else request_id
        prompt, _, salt = given(prompt)
        salt = cache_salt or salt
        request = NewRequest(
            request_id, prompt, EMBEDDING, "final", priority=priority, cache_salt=salt, pooling=pooling
        )
        async with aclosing(self._outputs(request)) as outputs:
            vector = (await anext(outputs)).embedding
        if vector is None:
            return np.full(self.dim, np.nan, np.float32)
        return unit_length(vector) if normalize else vector

    async def _outputs(self, request: NewRequest) -> AsyncGenerator[RequestOutput, None]:
        """Until the request has finished; closing ends it."""
        inbox = Inbox(holds_deltas=request.output_kind == "delta")
        await self.submit([request], inbox)
        finished = False
        try:
            while not finished:
                output = await inbox.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.discard([request.request_id], inbox)

    async def submit(self, requests: Sequence[NewRequest], inbox: Inbox) -> None:
        """Queue several requests whose outputs go to one inbox: all of them or, with an error as of `generate`, none.

        Who stops reading before all have finished calls `discard`.
        """
        self.check_room(len(requests))
        encoded = [
            replace(r, prompt_text=_text(r), prompt=await self._encode(r), grammar=await self._compile(r))
            for r in requests
        ]
        self.check_room(len(encoded))  # others may have come meanwhile
        try:
            await asyncio.wrap_future(self._send(lambda engine: self._add(engine, encoded, inbox), len(encoded)))
        except BaseException:
            self.discard([r.request_id for r in encoded], inbox)
            raise

    def discard(self, request_ids: Collection[str], inbox: Inbox) -> None:
        """End those of the requests that still write to this inbox; nobody reads it any more. Returns at once."""

        def end(engine: Engine) -> None:
            for request_id in request_ids:
                if self._inboxes.get(request_id) is inbox:
                    del self._inboxes[request_id]
                    engine.abort(request_id)

        with suppress(EngineDeadError):  # then all have ended
            self._send(end)

    async def abort(self, request_id: str) -> bool:
        """End a request; its reader gets a last output, with finish reason "abort". False for an unknown id."""
        return await self.call(lambda engine: engine.abort(request_id))

    async def pause(self) -> None:
        """Take no more steps until `resume`. Requests under way keep their pages; new ones queue."""
        await self.call(lambda engine: self._set_paused(True))

    async def resume(self) -> None:
        """Go on where `pause` stopped."""
        await self.call(lambda engine: self._set_paused(False))

    async def sleep(self, level: Literal[1, 2] = 1) -> None:
        """Give the pool's memory back and, at level 2, the weights': `Engine.sleep`. Requests wait until `wake_up`."""
        await self.call(lambda engine: engine.sleep(level))

    async def wake_up(self, params: Params | None = None) -> None:
        """Make the pool again and go on: `Engine.wake_up`."""
        await self.call(lambda engine: engine.wake_up(params))

    async def load_lora(self, name: str, path: str) -> None:
        """Read an adapter's folder, for requests to name it: `Engine.add_lora`."""

        def add(engine: Engine) -> None:
            number = engine.adapters.free_number()
            if not engine.add_lora(LoRARequest(name, number, path)):
                raise RequestError(f"there is an adapter {name!r} already; unload it first, or choose another name")

        await self.call(add)

    async def unload_lora(self, name: str) -> None:
        """Forget an adapter: `Engine.remove_lora`."""
        await self.call(lambda engine: engine.remove_lora(name))

    def lora_named(self, name: str) -> str | None:
        """The name itself where it is an adapter's; None where it is not. Any thread may ask."""
        return name if name in self._engine.adapters else None

    def loras(self) -> list[LoRARequest]:
        """The adapters that there are."""
        return self._engine.list_loras()

    async def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        return await self.call(Engine.stats)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run `function(engine)` in the engine's thread, between two steps; what it raises is raised here."""
        return await asyncio.wrap_future(self._send(function))

    def describe(self) -> str:
        """In one line, what room there is: sequences, length, pages."""
        shards = self._engine.shards
        num_pages = shards.sum(lambda shard: shard.pool.num_pages - 1)
        return (
            f"up to {shards.max_num_seqs:,} sequences of up to {self.max_model_len:,} tokens, "
            f"{num_pages:,} pages of {self.config.page_size:,} tokens"
            + (f", over {len(shards)} data shards" if len(shards) > 1 else "")
        )

    async def offload(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function that takes its time, such as encoding a long text, beside the event loop and the engine."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, function, *args)

    @property
    def num_queued(self) -> int:
        """Requests that wait, as far as no free seat awaits them."""
        return self._num_queued_with(0)

    @property
    def num_open(self) -> int:
        """Requests that have come and not finished."""
        return len(self._inboxes) + self._num_arriving

    def check_room(self, count: int = 1) -> None:
        """Raise what `generate` raises where so many more requests cannot come now; costs next to nothing."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        limit = self.max_num_queued_requests
        if limit is None:
            return
        if count > (most := limit + self._engine.shards.max_num_seqs):
            raise RequestError(
                f"{count:,} prompts came at once but {most:,} may run and wait; "
                "send fewer, or raise max_num_queued_requests"
            )
        if self._num_queued_with(count) > limit:
            raise QueueFullError(
                f"{self.num_queued:,} requests wait, {count:,} more came, and max_num_queued_requests is {limit:,}; "
                "try again later, or raise it"
            )

    def problem(self, patience: float = 8.0) -> str | None:
        """Why the engine is not well: it has died, or has been busy with one step for over `patience` seconds.

        A step that compiles, as only an engine that was not warmed up takes, may take as long as it likes.
        """
        since = self._busy_since
        if self.dead is not None:
            return self.dead
        if since is not None and time.monotonic() - since > patience and not self._engine.runner.is_compiling:
            return f"the engine has been in one step for {time.monotonic() - since:.0f} s"
        return None

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after the step under way; whatever is still open ends with EngineDeadError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)
        for executor in (self._encoders, self._compilers):
            executor.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.stop)

    def _num_queued_with(self, count: int) -> int:
        """How many would wait if so many more came. Seats are for whoever comes, but while some wait there are none."""
        shards = self._engine.shards
        waiting = shards.num_waiting
        seats = 0 if waiting else shards.max_num_seqs - shards.num_running
        return waiting + max(0, self._num_arriving + count - seats)

    async def _encode(self, request: NewRequest) -> list[int]:
        """The prompt's token ids, checked; a long prompt's are found in a thread of their own."""
        if len(request.prompt) <= _SHORT:
            tokens = self._engine.encode(request.prompt, request.params)
        else:
            tokens = await self.offload(self._engine.encode, request.prompt, request.params)
        left = self.max_model_len - len(tokens)
        if request.asked_tokens is not None and request.asked_tokens > left:
            raise TooLongError(
                f"the prompt has {len(tokens):,} tokens and max_tokens is {request.asked_tokens:,}, but max_model_len "
                f"is {self.max_model_len:,}; set max_tokens to {left:,} or less, or shorten the prompt"
            )
        return tokens

    async def _compile(self, request: NewRequest) -> Grammar | None:
        """The form that the answer must have; others' prompts are encoded meanwhile."""
        if request.grammar is not None or request.params.form is None:
            return request.grammar
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compilers, self._engine.grammar, request.params)

    def _send(self, function: Callable[[Engine], T], num_requests: int = 0) -> Future[T]:
        future: Future[T] = Future()
        with self._wake:
            if self.dead is not None:
                raise EngineDeadError(self.dead)
            self._calls.append(_Call(function, future))
            self._num_arriving += num_requests
            self._wake.notify()
        return future

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_calls():
                if self._has_work:
                    self._busy_since = time.monotonic()
                    self._deliver(self._engine.step())
                self._busy_since = None
            self._die("the engine was stopped")
        except BaseException as error:
            log.exception("the engine failed; every open request ends, and no other will be served")
            self._die(f"the engine failed: {type(error).__name__}: {' '.join(str(error).split())}; start it anew")

    @property
    def _has_work(self) -> bool:
        return self._engine.has_unfinished and not self._rests

    @property
    def _rests(self) -> bool:
        return self._paused or self._engine.is_sleeping

    def _take_calls(self) -> bool:
        """Do what was asked for, once there is that or a step to do. False where the thread shall end."""
        with self._wake:
            while not (self._calls or self._stopping or self._has_work):
                self._wake.wait()
            calls, self._calls = self._calls, deque()
            self._num_arriving = 0
            stopping = self._stopping
        self._busy_since = time.monotonic()
        for call in calls:
            if call.future.set_running_or_notify_cancel():
                try:
                    call.future.set_result(call.function(self._engine))
                except Exception as error:
                    call.future.set_exception(error)
        if self._rests:
            self._deliver(self._engine.take_aborted())
        return not stopping

    def _add(self, engine: Engine, requests: Sequence[NewRequest], inbox: Inbox) -> None:
        added: list[str] = []
        try:
            for r in requests:
                engine.add_request(
                    r.request_id,
                    r.prompt,
                    r.params,
                    output_kind=r.output_kind,
                    prompt_text=r.prompt_text,
                    priority=r.priority,
                    cache_salt=r.cache_salt,
                    pooling=r.pooling,
                    grammar=r.grammar,
                    lora_request=r.lora_request,
                )
                added.append(r.request_id)
        except Exception:
            for request_id in added:
                engine.abort(request_id)
            raise
        self._inboxes.update((request_id, inbox) for request_id in added)

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Wake each event loop once for all that a step brought it."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, RequestOutput]]] = {}
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is None:
                continue
            if output.finished:
                del self._inboxes[output.request_id]
            by_loop.setdefault(inbox.loop, []).append((inbox, output))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:  # the loop is closed, and its readers are gone
                for _, output in pairs:
                    self._inboxes.pop(output.request_id, None)
                    self._engine.abort(output.request_id)

    def _die(self, reason: str) -> None:
        with self._wake:
            self.dead = reason
            calls, self._calls = self._calls, deque()
        self._busy_since = None
        for call in calls:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(EngineDeadError(reason))
        inboxes, self._inboxes = set(self._inboxes.values()), {}
        for inbox in inboxes:
            try:
                inbox.loop.call_soon_threadsafe(inbox.put, EngineDeadError(reason))
            except RuntimeError:
                continue


def _put_all(pairs: Sequence[tuple[Inbox, RequestOutput]]) -> None:
    for inbox, output in pairs:
        inbox.put(output)


def _text(request: NewRequest) -> str | None:
    return request.prompt if isinstance(request.prompt, str) else request.prompt_text
