"""One HTTP request and its answer: the body, bounded; JSON or a stream of events back. Knows no endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from jaxpaged.server.faults import Fault

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY = 8 << 20
MAX_BODIES = 64 << 20
"""Of all bodies that come or have not been decoded, those not counted that are short."""
SHORT_BODY = 64 << 10
"""Any connection may have so many bytes under way: whoever fills the room keeps no ordinary request out."""

JSON = "application/json"


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Room:
    """What the bodies of all exchanges together may still take, in bytes."""

    def __init__(self, size: int = MAX_BODIES) -> None:
        self.size = self.left = size


class Exchange:
    """Reads one request, writes one answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: dict[str, str] = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = False
        self.common_headers: dict[str, str] = {}
        """Of any answer to it."""
        self._receive, self._send = receive, send
        self.body = b""
        """What `read` has read, until it is taken."""
        self._room: Room | None = None
        self._held = 0  # bytes of the room

    async def read(self, timeout: float, room: Room) -> None:
        """Read the whole body, counted while it comes. Raises Fault 413, 429 or 408, and ClientGone."""
        announced = self.headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > MAX_BODY:
            raise _too_large(int(announced))
        pieces, size, more = [], 0, True
        self._room = room
        try:
            async with asyncio.timeout(timeout):
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    more = message.get("more_body", False)
                    if size > MAX_BODY:
                        raise _too_large(size)
                    if size > SHORT_BODY:
                        self._hold(size, room)
        except TimeoutError:
            raise Fault(408, f"the body did not come within {timeout:g} s", headers={"Connection": "close"}) from None
        self.body = b"".join(pieces)

    def take_body(self) -> bytes:
        """The body, once: the room that it took is free again, since it is about to be decoded."""
        body, self.body = self.body, b""
        self.let_go()
        return body

    def let_go(self) -> None:
        """Nothing more will be read."""
        if self._room is not None:
            self._room.left += self._held
        self._held, self.body = 0, b""

    def _hold(self, size: int, room: Room) -> None:
        more = size - self._held
        if more > room.left:
            message = f"bodies of {room.size >> 20} MB are under way, which is the most; try again later"
            raise Fault(429, message)
        room.left -= more
        self._held = size

    async def until_gone(self) -> None:
        """Returns when the client goes away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(
        self, body: bytes, status: int = 200, kind: str = JSON, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with one body."""
        await self._start(status, {"Content-Type": kind, "Content-Length": str(len(body))} | dict(headers or {}))
        await self._send({"type": "http.response.body", "body": body})

    async def reply_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with one JSON value."""
        await self.reply(msgspec.json.encode(value), status, headers=headers)

    async def start_events(self) -> None:
        """Begin a stream of server-sent events; proxies are asked not to hold them back."""
        await self._start(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})

    async def send_events(self, data: bytes) -> None:
        """Send events made by `event`; waits while the client reads slowly."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self) -> None:
        """End the stream as OpenAI's clients expect it."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        told = (self.common_headers | dict(headers)).items()
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in told]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


class Envelope:
    """Events that differ in one field and what follows it: the rest is encoded once."""

    def __init__(self, head: Mapping[str, Any], field: str) -> None:
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"' + field.encode() + b'":'

    def event(self, value: Any, rest: Mapping[str, Any]) -> bytes:
        """One of them; `rest` are fields after it."""
        encode = msgspec.json.encode
        tail = b"," + encode(rest)[1:] + b"\n\n" if rest else b"}\n\n"
        return self._head + encode(value) + tail


def _too_large(size: int) -> Fault:
    return Fault(413, f"the body has {size:,} bytes or more; at most {MAX_BODY:,} are taken")
