"""OpenAI's batch files: each line a request to the API, answered as a client of it would be, with no socket between.

An answer is written as soon as there is one, in a line of its own, so that a run that is ended loses only what it had
not answered; a later one goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from jaxpaged.errors import ConfigError, EngineDeadError
from jaxpaged.server.answers import Json
from jaxpaged.server.app import App

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score", "/v1/rerank", "/v1/responses")


class Line(msgspec.Struct):
    """One request; its body is the endpoint's to read."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Refused(Exception):
    """A line that is no request; the message says why."""


class _Stream(msgspec.Struct):
    stream: bool | None = None


class _Named(msgspec.Struct):
    custom_id: str


class Counts(NamedTuple):
    """Lines by what became of them: answered, refused, found answered by an earlier run."""

    answered: int = 0
    refused: int = 0
    before: int = 0


async def run(app: App, source: Path, target: Path, *, resume: bool, told: Callable[[], object]) -> Counts:
    """Answer every line of `source` in `target`. Raises ConfigError where a file cannot be used, EngineDeadError."""
    done = _begun(target) if resume else set()
    seats = asyncio.Semaphore(2 * app.engine.config.max_num_seqs)  # enough that some always wait
    answered = refused = before = 0

    async def one(number: int, raw: bytes, seen: dict[str, int], out: BinaryIO) -> None:
        nonlocal answered, refused
        try:
            reply = await _answer(app, number, raw, seen)
            out.write(msgspec.json.encode(reply) + b"\n")
            out.flush()
            is_good = reply["error"] is None and reply["response"]["status_code"] == 200
            answered, refused = answered + is_good, refused + (not is_good)
            told()
        finally:
            seats.release()

    seen: dict[str, int] = {}
    with _opened(source, "rb") as file, _opened(target, "ab" if resume else "xb") as out:
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, raw in enumerate(file, 1):
                    if not raw.strip():
                        continue
                    if _id_of(raw) in done:
                        before += 1
                        told()
                        continue
                    await seats.acquire()
                    tasks.create_task(one(number, raw, seen, out))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
    return Counts(answered, refused, before)


async def _answer(app: App, number: int, raw: bytes, seen: dict[str, int]) -> Json:
    custom_id: str | None = _id_of(raw)
    try:
        line = _line(number, raw, seen)
    except _Refused as error:
        failure = {"code": "invalid_request", "message": f"line {number:,}: {error}"}
        return {"id": _name(), "custom_id": custom_id, "response": None, "error": failure}
    status, body = await _ask(app, line)
    if app.engine.dead is not None:  # it is not the line that failed
        raise EngineDeadError(app.engine.dead)
    response = {"status_code": status, "request_id": _name("req"), "body": msgspec.Raw(body)}
    return {"id": _name(), "custom_id": custom_id, "response": response, "error": None}


def _line(number: int, raw: bytes, seen: dict[str, int]) -> Line:
    try:
        line = msgspec.json.decode(raw, type=Line)
        is_stream = msgspec.json.decode(line.body, type=_Stream).stream
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused(f"it must be as in {{'custom_id': ..., 'url': ..., 'body': {{...}}}}: {error}") from None
    if line.custom_id in seen:
        raise _Refused(f"custom_id {line.custom_id!r} is that of line {seen[line.custom_id]:,}; give each its own")
    seen[line.custom_id] = number
    if line.method != "POST" or line.url not in URLS:
        raise _Refused(f"{line.method} {line.url} is not served; known: POST {', '.join(URLS)}")
    if is_stream:
        raise _Refused("stream is true, and a line has one answer; leave it out")
    return line


async def _ask(app: App, line: Line) -> tuple[int, bytes]:
    """The status and body of the API's answer."""
    to_read: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": bytes(line.body), "more_body": False}]
    status, pieces = 0, []

    async def receive() -> MutableMapping[str, Any]:
        if not to_read:
            await asyncio.Event().wait()  # who asks does not go away
        return to_read.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        pieces.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json")]
    if app.options.api_keys:
        headers.append((b"authorization", b"Bearer " + app.options.api_keys[0].encode()))
    scope = {"type": "http", "method": "POST", "path": line.url, "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return status, b"".join(pieces)


def _id_of(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Named).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _begun(target: Path) -> set[str | None]:
    """What an earlier run has answered; a line that it was cut off in is cut off."""
    if not target.exists():
        return set()
    with _opened(target, "r+b") as file:
        whole = 0
        done: set[str | None] = set()
        for raw in file:
            if not raw.endswith(b"\n"):
                os.truncate(target, whole)
                break
            whole += len(raw)
            done.add(_id_of(raw))
    return done - {None}


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        file: BinaryIO = path.open(mode)  # type: ignore[assignment]
    except FileExistsError:
        raise ConfigError(f"{path} exists; remove it, or give --resume to go on where it ends") from None
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {error.strerror}") from None
    return file


def _name(prefix: str = "batch_req") -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def lines(path: Path) -> Iterator[bytes]:
    """Those that are not blank."""
    with _opened(path, "rb") as file:
        yield from (raw for raw in file if raw.strip())
