"""The HTTP API as an ASGI application: who may come in, which route answers, what a failure looks like."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxpaged.engine.chat_template import Message
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.stats import EngineStats
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import CheckpointError, ConfigError, EngineDeadError, RequestError, TooLongError
from jaxpaged.outputs import RequestOutput
from jaxpaged.server import chat, embeddings, generation, response_input, responses, scores
from jaxpaged.server.async_engine import AsyncEngine
from jaxpaged.server.exchange import ClientGone, Exchange, Receive, Room, Scope, Send, event
from jaxpaged.server.faults import Fault, fault_of
from jaxpaged.server.metrics import Metrics
from jaxpaged.server.openapi import document
from jaxpaged.server.origins import Origins
from jaxpaged.server.pool_view import PoolView
from jaxpaged.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadLoRARequest,
    RerankRequest,
    ResponseRequest,
    ScoreRequest,
    TokenizeRequest,
    UnloadLoRARequest,
    decode,
)
from jaxpaged.server.tools import readable

if TYPE_CHECKING:
    from jaxpaged.server.tracing import Tracing

log = logging.getLogger("jaxpaged")

ONE_MODEL = "/v1/models/{model}"
_REQUEST_NAME = re.compile(rb"[\x21-\x7e]{1,256}")
SCORE_PATHS = ("/v1/score", "/score")
RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank")
OPEN_PATHS = ("/health", "/ping")  # load balancers have no key

Handler = Callable[[Exchange], Awaitable[None]]

R = TypeVar("R")


@dataclass(frozen=True)
class ServerOptions:
    """How the API behaves; how the engine does is its own config's."""

    models: tuple[str, ...]  # names it answers to, the first of which it gives itself
    api_keys: tuple[str, ...] = ()
    hang_timeout: float = 8.0  # seconds in one step after which the engine is not healthy
    body_timeout: float = 60.0
    enable_admin: bool = False
    log_requests: bool = False
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # of requests that say nothing themselves
    allowed_origins: tuple[str, ...] = ()
    parsers: chat.Parsers = field(default_factory=chat.Parsers)
    chat_template: str | None = None  # instead of the checkpoint's
    template_defaults: Mapping[str, Any] = field(default_factory=dict)  # what requests do not give the template
    tls: tuple[Path, Path | None] | None = None  # files of a certificate and its key, None: in the same file


class App:
    """Answers requests with one engine."""

    def __init__(self, engine: AsyncEngine, options: ServerOptions, tracing: Tracing | None = None) -> None:
        self.engine, self.options, self._tracing = engine, options, tracing
        for module in engine.loras():
            if module.lora_name in options.models:
                raise ConfigError(f"adapter {module.lora_name!r} has a name of the model itself; choose another name")
        if options.chat_template is not None and engine.tokenizer is not None:
            engine.tokenizer.chat_template = options.chat_template
        chat.template_variables(options.template_defaults, engine.tokenizer)  # or RequestError
        self.metrics = Metrics(options.models[0])
        self.draining = False
        self.num_active = 0
        """Requests that the engine works for."""
        self._room = Room()
        self._created = int(time.time())
        self._origins = Origins(options.allowed_origins)
        self._pool_view = PoolView(engine)
        self._page = files("jaxpaged.server").joinpath("static", "index.html").read_bytes()
        self._routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._index},
            "/v1/models": {"GET": self._models},
            ONE_MODEL: {"GET": self._one_model},
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/responses": {"POST": self._responses},
            "/v1/embeddings": {"POST": self._embeddings},
            **{path: {"POST": self._score} for path in SCORE_PATHS},
            **{path: {"POST": self._rerank} for path in RERANK_PATHS},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/tokenizer_info": {"GET": self._tokenizer_info},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
            "/load": {"GET": self._load},
            "/pool": {"GET": self._pool},
            "/openapi.json": {"GET": self._openapi},
        }
        if options.enable_admin:
            self._routes |= {
                "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
                "/pause": {"POST": self._pause},
                "/resume": {"POST": self._resume},
                "/sleep": {"POST": self._sleep},
                "/wake_up": {"POST": self._wake_up},
                "/v1/load_lora_adapter": {"POST": self._load_lora},
                "/v1/unload_lora_adapter": {"POST": self._unload_lora},
            }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Whatever happens, it is answered once, unless the client has gone."""
        exchange = Exchange(scope, receive, send)
        try:
            exchange.common_headers = self._origins.headers(exchange) | {"X-Request-Id": _name_of(exchange)}
            if (told := self._origins.preflight(exchange)) is not None:
                await exchange.reply(b"", 204, headers=told)
                return
            self._check_key(exchange)
            self._origins.check(exchange)
            handler = self._route(exchange)
            if exchange.method in ("GET", "HEAD"):
                await handler(exchange)
                return
            if self.draining:
                raise Fault(503, "the server is shutting down", headers={"Connection": "close"})
            self.num_active += 1
            try:
                await exchange.read(self.options.body_timeout, self._room)
                await _while_there(exchange, handler(exchange))
            finally:
                self.num_active -= 1
                exchange.let_go()
        except ClientGone:
            return
        except Exception as error:
            fault = fault_of(error)
            if exchange.started:
                await exchange.send_events(event(fault.as_object()))
                await exchange.end_events()
            else:
                await exchange.reply(fault.as_json(), fault.status, headers=fault.headers)

    def _check_key(self, exchange: Exchange) -> None:
        """Every key is compared in full, whichever fits. A browser may send one as a password."""
        if not self.options.api_keys or exchange.path in OPEN_PATHS:
            return
        given = _given_key(exchange.headers.get(b"authorization", b""))
        if not sum(hmac.compare_digest(given, key.encode()) for key in self.options.api_keys):
            challenge = 'Basic realm="jaxpaged", charset="UTF-8"' if exchange.path == "/" else "Bearer"
            message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise Fault(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})

    def _route(self, exchange: Exchange) -> Handler:
        prefix = ONE_MODEL.partition("{")[0]
        is_model = exchange.path.startswith(prefix) and exchange.path != prefix
        methods = self._routes.get(ONE_MODEL if is_model else exchange.path)
        if methods is None:
            raise Fault(404, f"there is no {exchange.path!r}")
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise Fault(405, f"{exchange.path} answers {allowed}, not {exchange.method}", headers={"Allow": allowed})
        return handler

    # Completions and chats

    async def _completions(self, exchange: Exchange) -> None:
        request = _request(exchange, CompletionRequest)
        model = self._model(request.model)
        params = generation.completion_params(request, self.options.sampling_defaults)
        prompts = generation.completion_prompts(request.prompt)
        if request.add_special_tokens is False:
            prompts = [(await self._bare(prompt), text) for prompt, text in prompts]
        form = generation.CompletionForm(request, self.engine)
        await generation.answer(exchange, self.engine, request, model, prompts, params, form, self._observer(exchange))

    async def _bare(self, prompt: Any) -> Any:
        """A text's tokens with none put before or behind them."""
        return await self.engine.offload(self._encode, prompt, False) if isinstance(prompt, str) else prompt

    async def _chat(self, exchange: Exchange) -> None:
        self.engine.check_room()  # before time is spent on what cannot be served
        request = _request(exchange, ChatRequest)
        model = self._model(request.model)
        asked = chat.understood(request, self.engine.tokenizer, self.options.parsers, self.options.sampling_defaults)
        turn, goes_on = request.add_generation_prompt is not False, bool(request.continue_final_message)
        token_ids = await self.engine.offload(self._encode_chat, asked.messages, turn, goes_on, asked.variables)
        form = chat.ChatForm(asked, self.engine.tokenizer)
        prompts = [(token_ids, None)]
        await generation.answer(
            exchange, self.engine, request, model, prompts, asked.params, form, self._observer(exchange)
        )

    async def _responses(self, exchange: Exchange) -> None:
        self.engine.check_room()
        request = _request(exchange, ResponseRequest)
        model = self._model(request.model)
        options, tokenizer = self.options, self.engine.tokenizer
        asked = response_input.understood(request, tokenizer, options.parsers, options.sampling_defaults)
        token_ids = await self.engine.offload(self._encode_chat, asked.messages, True, False, asked.variables)
        await responses.answer(exchange, self.engine, asked, model, token_ids, self._observer(exchange))

    async def _embeddings(self, exchange: Exchange) -> None:
        request = _request(exchange, EmbeddingRequest)
        await embeddings.answer(exchange, self.engine, request, self._model(request.model), self._observer(exchange))

    async def _score(self, exchange: Exchange) -> None:
        request = _request(exchange, ScoreRequest)
        await scores.score(exchange, self.engine, request, self._model(request.model), self._observer(exchange))

    async def _rerank(self, exchange: Exchange) -> None:
        request = _request(exchange, RerankRequest)
        await scores.rerank(exchange, self.engine, request, self._model(request.model), self._observer(exchange))

    def _encode_chat(
        self, messages: Sequence[Message], turn: bool, goes_on: bool, variables: Mapping[str, Any]
    ) -> list[int]:
        """`turn`: the assistant's is opened; `goes_on`: the last message's is not closed."""
        tokenizer = self._tokenizer()
        most, variables = self._max_characters(tokenizer), {**self.options.template_defaults, **variables}
        return tokenizer.encode_chat(messages, turn, max_characters=most, continue_final_message=goes_on, **variables)

    def _observer(self, exchange: Exchange) -> generation.Observer:
        """Told of each request that was made for this exchange."""
        if (tracing := self._tracing) is None:
            return self._observe

        def observe(output: RequestOutput, num_generated: int) -> None:
            self._observe(output, num_generated)
            tracing.observe(output, num_generated, self.options.models[0], exchange.headers)

        return observe

    def _observe(self, output: RequestOutput, num_generated: int) -> None:
        times = output.metrics
        self.metrics.observe(output, num_generated)
        if self.options.log_requests and times is not None and times.finished_time is not None:
            log.info(
                "%s: %d prompt tokens (%d cached), %d generated, %s, %.2f s",
                output.request_id,
                len(output.prompt_token_ids),
                output.num_cached_tokens,
                num_generated,
                output.outputs[0].finish_reason,
                times.finished_time - times.arrival_time,
            )

    # Tokens

    async def _tokenize(self, exchange: Exchange) -> None:
        request = _request(exchange, TokenizeRequest)
        self._model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("give either prompt or messages")
        if request.messages is not None:
            turn, goes_on = request.add_generation_prompt is not False, bool(request.continue_final_message)
            variables = chat.template_variables(request.chat_template_kwargs, self.engine.tokenizer)
            variables |= {"tools": request.tools} if request.tools else {}
            messages = readable(request.messages, self._tokenizer().chat_template)
            token_ids = await self.engine.offload(self._encode_chat, messages, turn, goes_on, variables)
        else:
            special = request.add_special_tokens is not False
            token_ids = await self.engine.offload(self._encode, request.prompt, special)
        reply: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self.engine.max_model_len,
            "tokens": token_ids,
        }
        if request.return_token_strs:
            reply["token_strs"] = [self._tokenizer().token_text(token) for token in token_ids]
        await exchange.reply_json(reply)

    async def _detokenize(self, exchange: Exchange) -> None:
        request = _request(exchange, DetokenizeRequest)
        self._model(request.model)
        vocab = self.engine.vocab_size
        for token in request.tokens:
            if not 0 <= token < vocab:
                raise RequestError(f"tokens holds {token}; token ids of this model are 0 to {vocab - 1:,}")
        text = await self.engine.offload(self._tokenizer().decode, request.tokens, False)
        await exchange.reply_json({"prompt": text})

    async def _tokenizer_info(self, exchange: Exchange) -> None:
        tokenizer = self._tokenizer()
        named = dict.fromkeys(("bos_token", "eos_token", "pad_token")) | tokenizer.named_tokens
        template = {"chat_template": tokenizer.chat_template, "vocab_size": tokenizer.vocab_size}
        await exchange.reply_json(named | template)

    def _encode(self, text: str, special: bool) -> list[int]:
        tokenizer = self._tokenizer()
        most = self._max_characters(tokenizer)
        if len(text) > most:
            raise TooLongError(f"the prompt has {len(text):,} characters; at most {most:,} can fit the model's length")
        return tokenizer.encode(text, special)

    def _max_characters(self, tokenizer: Tokenizer) -> int:
        """More than that is refused before any time is spent on encoding it."""
        return self.engine.max_model_len * tokenizer.longest_token

    # About the server

    async def _index(self, exchange: Exchange) -> None:
        headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'",
        }
        await exchange.reply(self._page, kind="text/html; charset=utf-8", headers=headers)

    async def _models(self, exchange: Exchange) -> None:
        names = *self.options.models, *(module.lora_name for module in self.engine.loras())
        await exchange.reply_json({"object": "list", "data": list(map(self._named, names))})

    async def _one_model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix(ONE_MODEL.partition("{")[0])  # it may have slashes in it
        await exchange.reply_json(self._named(self._model(name)))

    def _named(self, name: str) -> dict[str, Any]:
        about = {"object": "model", "created": self._created, "owned_by": "jaxpaged"}
        found = {"id": name} | about | {"max_model_len": self.engine.max_model_len}
        adapters = {module.lora_name: module for module in self.engine.loras()}
        if name not in adapters:
            return found
        return found | {"root": adapters[name].lora_path, "parent": self.options.models[0]}

    async def _health(self, exchange: Exchange) -> None:
        problem = self.engine.problem(self.options.hang_timeout)
        if problem is not None:
            raise Fault(503, problem)
        if self.draining:
            raise Fault(503, "the server is shutting down")
        await exchange.reply(b"")

    async def _version(self, exchange: Exchange) -> None:
        await exchange.reply_json({"version": version("jaxpaged")})

    async def _metrics(self, exchange: Exchange) -> None:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        await exchange.reply(self.metrics.text(await self.stats()), kind=kind)

    async def _openapi(self, exchange: Exchange) -> None:
        names = *self.options.models, *(module.lora_name for module in self.engine.loras())
        has_keys = bool(self.options.api_keys)
        found = document(self._routes, models=names, vocab_size=self.engine.vocab_size, has_keys=has_keys)
        await exchange.reply_json(found)

    async def _load(self, exchange: Exchange) -> None:
        await exchange.reply_json({"server_load": self.engine.num_open})

    async def _pool(self, exchange: Exchange) -> None:
        await exchange.reply(await self._pool_view.as_json())

    async def stats(self) -> EngineStats | None:
        """The engine's counts; None where it has not given them within two seconds, or is dead."""
        try:
            return await asyncio.wait_for(self.engine.stats(), 2.0)
        except (TimeoutError, EngineDeadError):
            return None

    # For the operator

    async def _reset_prefix_cache(self, exchange: Exchange) -> None:
        await self.engine.call(Engine.reset_prefix_cache)
        await exchange.reply(b"")

    async def _pause(self, exchange: Exchange) -> None:
        await self.engine.pause()
        await exchange.reply(b"")

    async def _resume(self, exchange: Exchange) -> None:
        await self.engine.resume()
        await exchange.reply(b"")

    async def _sleep(self, exchange: Exchange) -> None:
        level = exchange.query.get("level", "1")
        if level != "1":
            raise RequestError(f"level is {level!r}; only 1 is served: weights to wake up with cannot be sent here")
        await self.engine.sleep()
        await exchange.reply(b"")

    async def _wake_up(self, exchange: Exchange) -> None:
        await self.engine.wake_up()
        await exchange.reply(b"")

    async def _load_lora(self, exchange: Exchange) -> None:
        request = _request(exchange, LoadLoRARequest)
        if request.lora_name in self.options.models:
            raise RequestError(f"lora_name is {request.lora_name!r}, which is the model itself; choose another name")
        try:
            await self.engine.load_lora(request.lora_name, request.lora_path)
        except (CheckpointError, ConfigError) as error:
            raise RequestError(str(error)) from None
        await exchange.reply(b"")

    async def _unload_lora(self, exchange: Exchange) -> None:
        await self.engine.unload_lora(_request(exchange, UnloadLoRARequest).lora_name)
        await exchange.reply(b"")

    def _model(self, name: str | None) -> str:
        if name and name not in self.options.models and self.engine.lora_named(name) is None:
            known = ", ".join((*self.options.models, *(module.lora_name for module in self.engine.loras())))
            raise Fault(404, f"there is no model {name!r}; known: {known}", code="model_not_found")
        return name or self.options.models[0]

    def _tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise RequestError("the model came without a tokenizer; give prompts to /v1/completions as token ids")
        return self.engine.tokenizer


async def _while_there(exchange: Exchange, work: Awaitable[None]) -> None:
    """Do the work until the client goes away."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(exchange.until_gone())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


def _request(exchange: Exchange, kind: type[R]) -> R:
    """What the body says. It must be JSON that says so: browsers ask before they let a foreign page send that."""
    told = exchange.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if told != b"application/json":
        raise Fault(415, f"the body is {told.decode('latin-1') or 'of no type'}; send `Content-Type: application/json`")
    return decode(exchange.take_body(), kind)


def _name_of(exchange: Exchange) -> str:
    """What whoever asks calls the request, so that answers are found again in logs; else a name of ours."""
    given = exchange.headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_NAME.fullmatch(given) else uuid.uuid4().hex


def _given_key(header: bytes) -> bytes:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return value.strip() if scheme.lower() == b"bearer" else b""
