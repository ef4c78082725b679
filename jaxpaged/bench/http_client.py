"""The little of HTTP that a load generator needs: a connection for each request, JSON out, JSON or events in.

So nothing but Python is needed, and little of its time: on two cores the one who asks must not slow down who answers.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jaxpaged.errors import ConfigError

_SILENCE = 300.0  # seconds without a byte after which a server is given up


class HTTPError(Exception):
    """The server answered with another status than 200, or with something else than was asked for."""


class Server(NamedTuple):
    """Whom to ask."""

    host: str
    port: int
    is_secure: bool
    path: str  # before every endpoint's
    headers: tuple[tuple[str, str], ...] = ()


def server_at(url: str, headers: Mapping[str, str]) -> Server:
    """The server of a URL such as http://localhost:8000. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"--base-url is {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url is {url!r}; it must be as in http://localhost:8000")
    return Server(parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/"), tuple(headers.items()))


async def get_json(server: Server, path: str) -> Any:
    """What a GET gives. Raises HTTPError, OSError."""
    async with _asked(server, "GET", path, b"") as pieces:
        return _parsed(b"".join([piece async for piece in pieces]))


async def post_json(server: Server, path: str, body: Any) -> Any:
    """What a POST gives. Raises HTTPError, OSError."""
    async with _asked(server, "POST", path, json.dumps(body).encode()) as pieces:
        return _parsed(b"".join([piece async for piece in pieces]))


async def post_events(server: Server, path: str, body: Any) -> AsyncGenerator[Any, None]:
    """The JSON of each event of a streamed answer, until it says [DONE]. Raises HTTPError, OSError."""
    async with _asked(server, "POST", path, json.dumps(body).encode()) as pieces:
        rest = b""
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                value = _parsed(data)
                if isinstance(value, dict) and value.get("error"):
                    raise HTTPError(f"the stream ended with an error: {value['error']}")
                yield value


@asynccontextmanager
async def _asked(server: Server, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
    """The pieces of the answer's body, as they come."""
    context = ssl.create_default_context() if server.is_secure else None
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=context, limit=1 << 20)
    try:
        host = f"[{server.host}]" if ":" in server.host else server.host
        head = [
            f"{method} {server.path}{path} HTTP/1.1",
            f"Host: {host}:{server.port}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in server.headers),
            *(("Content-Type: application/json", f"Content-Length: {len(body)}") if method == "POST" else ()),
        ]
        writer.write("\r\n".join((*head, "", "")).encode() + body)
        status, headers = await _head(reader)
        pieces = _body(reader, headers)
        if status != 200:
            said = b"".join([piece async for piece in pieces])
            raise HTTPError(f"{path} answered {status}: {said[:500].decode(errors='replace')}")
        yield pieces
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise HTTPError(f"{path}: the answer broke off or is no HTTP: {error}") from None
    except TimeoutError:
        raise HTTPError(f"{path}: nothing came for {_SILENCE:g} s") from None
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await _soon(reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")
    headers = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split(" ")[1]), {name.strip().lower(): value.strip() for name, _, value in headers}


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await _soon(reader.readuntil(b"\r\n"))).split(b";")[0], 16):
            yield (await _soon(reader.readexactly(size + 2)))[:-2]
    elif "content-length" in headers:
        yield await _soon(reader.readexactly(int(headers["content-length"])))
    else:
        while piece := await _soon(reader.read(1 << 16)):
            yield piece


async def _soon(reading: Any) -> bytes:
    async with asyncio.timeout(_SILENCE):
        read: bytes = await reading
        return read


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise HTTPError(f"the server answered what is no JSON: {data[:200].decode(errors='replace')!r}") from None
