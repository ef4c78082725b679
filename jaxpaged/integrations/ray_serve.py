"""Many replicas behind one address, on Ray Serve (`jaxpaged[ray]`): scaled by load, a conversation back to its pages.

    serve.run(application("Qwen/Qwen3-0.6B", num_replicas=2, ray_actor_options={"num_gpus": 1}))

or `serve run jaxpaged.integrations.ray_serve:build model=PATH num_replicas=2`. A gateway reads each request, and a
replica, chosen by `PrefixRouter`, answers it with the server's own application. What a replica that dies had not begun
to answer, another one answers; a stream it had begun ends with an error that says to ask again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import ray.exceptions
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from jaxpaged.errors import ConfigError
from jaxpaged.integrations.prefix_routing import Affinity, Chain, chain_of
from jaxpaged.server.app import App, ServerOptions
from jaxpaged.server.async_engine import AsyncEngine
from jaxpaged.server.exchange import MAX_BODIES, ClientGone, Exchange, Receive, Room, Scope, Send, event
from jaxpaged.server.faults import Fault, fault_of

log = logging.getLogger("jaxpaged")

REPLICA_HEADER = "x-jaxpaged-replica"
"""Says in each answer who gave it."""

_OPEN = ("/v1/", "/tokenize", "/detokenize", "/health", "/ping", "/version")
_ATTEMPTS = 3
_BODY_TIMEOUT = 60.0
_MAX_WAITING = 64  # pieces of an answer that nobody has taken yet

_Head = tuple[int, list[tuple[bytes, bytes]]]


def application(
    model: Any,
    *,
    num_replicas: int | None = None,
    autoscaling_config: Mapping[str, Any] | None = None,
    ray_actor_options: Mapping[str, Any] | None = None,
    max_ongoing_requests: int = 256,
    max_queued_requests: int = 1024,
    max_imbalance: int = 8,
    served_model_name: str | Sequence[str] | None = None,
    api_keys: Sequence[str] = (),
    num_gateways: int = 1,
    **settings: Any,
) -> serve.Application:
    """A Ray Serve application that serves `model`, a path or hub id; `settings` are those of `LLM`.

    Either `num_replicas` is fixed (1 unless said otherwise) or `autoscaling_config`, Ray's own, lets it follow the
    load. `ray_actor_options` are one replica's, such as {"num_gpus": 2}. A replica takes `max_ongoing_requests` at
    once, beyond which `max_queued_requests` wait at each gateway and others get 429. Raises ConfigError.
    """
    if num_replicas is not None and autoscaling_config is not None:
        raise ConfigError("num_replicas and autoscaling_config were both given; leave one of them out")
    names = (served_model_name,) if isinstance(served_model_name, str) else tuple(served_model_name or (str(model),))
    router = RequestRouterConfig(request_router_class=PrefixRouter, request_router_kwargs={"imbalance": max_imbalance})
    scale = (
        {"autoscaling_config": dict(autoscaling_config)} if autoscaling_config else {"num_replicas": num_replicas or 1}
    )
    replicas = serve.deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        ray_actor_options=dict(ray_actor_options or {}),
        request_router_config=router,
        health_check_period_s=2,
        health_check_timeout_s=30,
        **scale,
    )
    gateway = serve.deployment(serve.ingress(_build_gateway)()).options(
        name="Gateway",
        num_replicas=num_gateways,
        max_ongoing_requests=max(10_000, max_ongoing_requests),
        ray_actor_options={"num_cpus": 0.1},
    )
    options = ServerOptions(models=names, api_keys=tuple(api_keys))
    return gateway.bind(replicas.bind(model, options, settings))


def build(args: Mapping[str, Any]) -> serve.Application:
    """`application`, for `serve run` and Serve's config files: {"model": ..., "num_replicas": ...}.

    `serve run` gives every value as text; what reads as JSON is taken as that.
    """
    given = {name: _value(value) for name, value in args.items()}
    if "model" not in given:
        raise ConfigError("no model was named; give model=PATH")
    return application(given.pop("model"), **given)


class Replica:
    """One engine, and the server's application before it."""

    def __init__(self, model: Any, options: ServerOptions, settings: Mapping[str, Any]) -> None:
        """Load the model; Serve sends requests once that is done."""
        self._engine = AsyncEngine.load(model, **settings)
        self._app = App(self._engine, options)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        if problem := self._engine.problem():
            raise RuntimeError(problem)

    async def answer(self, chain: Chain, scope: Scope, body: bytes) -> AsyncIterator[_Head | bytes]:
        """Status and headers, then pieces of the body. Whoever stops reading ends the request."""
        pieces: asyncio.Queue[_Head | bytes] = asyncio.Queue(_MAX_WAITING)
        requests = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return requests.pop() if requests else await asyncio.Future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (REPLICA_HEADER.encode(), self._name)]
                await pieces.put((message["status"], headers))
            elif message["body"]:
                await pieces.put(message["body"])

        working = asyncio.create_task(self._app(scope, receive, send))
        try:
            async for piece in _until_done(pieces, working):
                yield piece
        finally:
            working.cancel()
            await asyncio.wait((working,))

    def __del__(self) -> None:
        """Serve lets go of a replica once it has no request any more."""
        if hasattr(self, "_engine"):
            self._engine.stop()


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Chooses the replica that has seen most of the prompt, where that is not too busy; else the idlest."""

    def initialize_state(self, imbalance: int = 8) -> None:
        """Called by Serve with `request_router_kwargs`."""
        self._affinity = Affinity(max_imbalance=imbalance)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the first to be asked first; of one rank Serve takes the idlest."""
        loads = {
            r.replica_id.unique_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas
        }
        chosen = self._affinity.choose(_chain(pending_request), loads)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all have been named: wait before asking again
        first = [r for r in candidate_replicas if r.replica_id.unique_id == chosen]
        every = random.sample(candidate_replicas, len(candidate_replicas))  # of several as idle Serve takes the first
        return [first, every] if first else [every]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Called by Serve once a replica has taken the request."""
        self._affinity.given(_chain(pending_request), replica_id.unique_id)


class Gateway:
    """The application at the address: reads a request, has a replica answer it."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas
        self._room = Room(4 * MAX_BODIES)  # kept until answered: another replica may have to be asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; Ray's lifespan messages are nobody's."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        try:
            if not exchange.path.startswith(_OPEN):
                raise Fault(404, f"there is no {exchange.path!r} here; Ray's dashboard shows the replicas' state")
            if exchange.method == "POST":
                await exchange.read(_BODY_TIMEOUT, self._room)
            await self._forward(exchange, scope, exchange.body, send)
        except ClientGone:
            return
        except Exception as error:
            fault = fault_of(_as_fault(error))
            await exchange.reply(fault.as_json(), fault.status, headers=fault.headers)
        finally:
            exchange.let_go()

    async def _forward(self, exchange: Exchange, scope: Scope, body: bytes, send: Send) -> None:
        plain = {key: scope[key] for key in ("type", "method", "path", "query_string")}
        plain["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        chain = chain_of(body)
        gone = asyncio.ensure_future(exchange.until_gone())
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                answer = self._replicas.options(stream=True).answer.remote(chain, plain, body)
                try:
                    return await _pass_on(answer, gone, send)
                except ray.exceptions.RayActorError as error:
                    if attempt == _ATTEMPTS:
                        raise
                    log.warning("a replica died before it answered; asking another: %s", type(error).__name__)
        finally:
            gone.cancel()


async def _pass_on(answer: Any, gone: asyncio.Future[None], send: Send) -> None:
    """Send an answer as it comes, to a client who may go away. Raises only while nothing has been sent."""
    pieces, head = aiter(answer), None
    started = False
    while True:
        following = asyncio.ensure_future(anext(pieces, None))
        await asyncio.wait((following, gone), return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            answer.cancel()
            await asyncio.gather(following, return_exceptions=True)  # it ends with what `cancel` makes of it
            raise ClientGone
        try:
            piece = following.result()
        except Exception as error:
            if not started:
                raise
            fault = fault_of(_as_fault(error))
            await send({"type": "http.response.body", "body": event(fault.as_object())})
            return
        if isinstance(piece, tuple):
            head = piece
            continue
        if not started:  # only now: while nothing was sent, another replica may answer
            if head is None:
                raise Fault(503, "the replica gave no answer; try again")
            await send({"type": "http.response.start", "status": head[0], "headers": head[1]})
            started = True
        await send({"type": "http.response.body", "body": piece or b"", "more_body": piece is not None})
        if piece is None:
            return


async def _until_done(
    pieces: asyncio.Queue[_Head | bytes], working: asyncio.Task[None]
) -> AsyncIterator[_Head | bytes]:
    """What is put into the queue until the task has ended; what waits is joined, for each piece is a message."""
    while not (working.done() and pieces.empty()):
        getting = asyncio.ensure_future(pieces.get())
        await asyncio.wait((getting, working), return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and pieces.empty():
            getting.cancel()
            break
        piece = await getting
        if isinstance(piece, bytes):
            waiting = [piece]
            while not pieces.empty():
                waiting.append(pieces.get_nowait())  # type: ignore[arg-type]  # the head comes first and once
            piece = b"".join(waiting)
        yield piece
    working.result()


def _build_gateway() -> Gateway:
    context = serve.get_replica_context()
    return Gateway(serve.get_deployment_handle("Replica", app_name=context.app_name))


def _as_fault(error: Exception) -> Exception:
    """What Ray raises, as a fault that a client may retry."""
    match error:
        case BackPressureError():
            return Fault(429, "all replicas are busy and as many requests wait as may; try again later")
        case ray.exceptions.RayActorError():
            return Fault(503, "the replica that answered this died; try again")
        case RayServeException():
            return Fault(503, "no replica is there to answer; try again later")
    return error


def _chain(pending_request: PendingRequest | None) -> Chain:
    return pending_request.args[0] if pending_request is not None and pending_request.args else ()


def _value(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text
