"""An engine served over loopback from this process, and clients that cost little: raw requests and streams."""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

from jaxpaged import AsyncEngine

NAME = "model"


class Served(NamedTuple):
    """A server that runs in a thread of this process."""

    port: int
    engine: AsyncEngine


@contextmanager
def serving(engine: AsyncEngine) -> Iterator[Served]:
    """The HTTP API of an engine, stopped with it at the end."""
    from jaxpaged.server.app import App, ServerOptions
    from jaxpaged.server.serve import listen, make_server

    server, found = make_server(App(engine, ServerOptions(models=(NAME,)))), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[found])))
    thread.start()
    try:
        yield Served(found.getsockname()[1], engine)
    finally:
        server.should_exit = True
        thread.join(20)
        engine.stop()


class Reply(NamedTuple):
    """What came of a request: 0 for the status where the connection broke or was left."""

    status: int
    seconds: float
    body: bytes


def request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A POST as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + content


async def ask(port: int, sent: bytes, leave_after: float | None = None) -> Reply:
    """Send a request over a connection of its own and read the answer, or go away after so many seconds."""
    began, received = time.perf_counter(), b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(leave_after):
                writer.write(sent)
                received = await reader.read(-1)
        finally:
            writer.transport.abort() if leave_after is not None else writer.close()
    except (OSError, TimeoutError):
        return Reply(0, time.perf_counter() - began, received)
    status = int(received[9:12]) if received.startswith(b"HTTP/1.1 ") else 0
    return Reply(status, time.perf_counter() - began, received.partition(b"\r\n\r\n")[2])


def elsewhere(function: str, *args: Any) -> dict[str, Any]:
    """What a function of this file finds, called in a process of its own."""
    given = json.dumps([function, *args])
    done = subprocess.run([sys.executable, __file__], input=given, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def crawling(port: int, body: dict[str, Any], count: int) -> Iterator[list[int]]:
    """Clients that take one byte of a stream each second; the list grows with the number taken."""
    readers, taken, done = [], [0], threading.Event()
    for _ in range(count):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        reader.sendall(request(body))
        readers.append(reader)

    def crawl() -> None:
        while not done.wait(1.0):
            taken[0] += sum(len(reader.recv(1)) for reader in readers)

    thread = threading.Thread(target=crawl)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()
        for reader in readers:
            reader.close()


def load(
    port: int, body: dict[str, Any], seconds: float, rate: float | None = None, workers: int = 0
) -> dict[str, Any]:
    """Ask at a steady rate whatever comes of it, or by so many who ask again once they are answered.

    Counted is what ends in the last four fifths of the time; `goodput` is answers a second.
    """
    return asyncio.run(_load(port, request(body), seconds, rate, workers))


async def _load(port: int, sent: bytes, seconds: float, rate: float | None, workers: int) -> dict[str, Any]:
    began = time.perf_counter()
    replies: list[tuple[float, Reply]] = []

    async def one() -> None:
        reply = await ask(port, sent)
        replies.append((time.perf_counter() - began, reply))

    async def worker() -> None:
        while time.perf_counter() - began < seconds:
            await one()

    if rate is None:
        await asyncio.gather(*(worker() for _ in range(workers)))
    else:
        tasks = []
        for number in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, number / rate - (time.perf_counter() - began)))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)
    counted = [reply for ended, reply in replies if seconds / 5 <= ended <= seconds]
    refused = sorted(reply.seconds for reply in counted if reply.status == 429)
    return {
        "statuses": Counter(str(reply.status) for _, reply in replies),
        "goodput": sum(reply.status == 200 for reply in counted) / (0.8 * seconds),
        "refused_p99": refused[len(refused) * 99 // 100] if refused else None,
    }


def read_streams(port: int, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ask for all of the streams at once and read them to the end.

    `gap_p99` is that of the seconds between two reads of one stream.
    """
    selector, num_events, began = selectors.DefaultSelector(), 0, time.perf_counter()
    tails: dict[socket.socket, bytes] = {}
    times: dict[socket.socket, list[float]] = {}
    for body in bodies:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request(body))
        selector.register(connection, selectors.EVENT_READ, connection)
        tails[connection], times[connection] = b"", []
    while tails:
        for key, _ in selector.select():
            connection = key.data
            data = connection.recv(1 << 18)
            ended = not data or data.endswith(b"0\r\n\r\n")
            data = tails[connection] + data
            new = data.count(b"data: {")
            num_events += new
            tails[connection] = data[-6:]
            if new:
                times[connection].append(time.perf_counter())
            if ended:
                selector.unregister(connection)
                connection.close()
                del tails[connection]
    gaps = sorted(b - a for each in times.values() for a, b in pairwise(each))
    p99 = gaps[len(gaps) * 99 // 100] if gaps else 0.0
    return {"events": num_events, "seconds": time.perf_counter() - began, "gap_p99": p99}


if __name__ == "__main__":
    called, *given = json.load(sys.stdin)
    print(json.dumps(load(*given) if called == "load" else read_streams(*given)))
