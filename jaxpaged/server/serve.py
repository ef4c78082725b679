"""Runs the API until a signal ends it: socket, signals, the watchdog, and a line in the log every few seconds.

The first SIGTERM or SIGINT refuses new work and waits for what is under way, at most `shutdown_timeout` seconds; then,
or with a second signal at once, the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from jaxpaged.engine.stats import EngineStats
from jaxpaged.errors import ConfigError
from jaxpaged.server.app import App
from jaxpaged.server.async_engine import AsyncEngine
from jaxpaged.server.connection import BoundedConnection

log = logging.getLogger("jaxpaged")

LOG_INTERVAL = 10.0
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `serve`'s."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """The API's socket. Raises ConfigError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --host") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port") from None
    return found


def tls_files(certificate: Path | None, key: Path | None) -> tuple[Path, Path | None] | None:
    """The files with which the API speaks TLS; None: it does not. Raises ConfigError where it could not."""
    if certificate is None:
        if key is not None:
            raise ConfigError(f"--ssl-keyfile is {key} but there is no --ssl-certfile; give both")
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=b"")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise ConfigError(f"cannot speak TLS with {certificate} and {key or 'no --ssl-keyfile'}: {reason}") from None
    return certificate, key


def make_server(app: App) -> Server:
    """A server for one app, not yet running."""
    certificate, key = app.options.tls or (None, None)
    connection = type("Connection", (BoundedConnection,), {"body_timeout": app.options.body_timeout + 5})
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        backlog=2048,
    )
    return Server(config)


def serve(engine: AsyncEngine, app: App, found: socket.socket, shutdown_timeout: float) -> int:
    """Serve until a signal says otherwise; the exit status."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    with Watchdog(engine, app.options.hang_timeout):
        asyncio.run(_serve(app, found, shutdown_timeout))
    engine.stop(timeout=5.0)
    return 0


async def _serve(app: App, found: socket.socket, shutdown_timeout: float) -> None:
    server, loop = make_server(app), asyncio.get_running_loop()
    loop.set_exception_handler(Complaints())
    asked = asyncio.Event()

    def on_signal(number: int) -> None:
        if asked.is_set():
            os._exit(128 + number)
        app.draining = True
        asked.set()
        log.info("%s: no new work; %d requests under way", signal.Signals(number).name, app.num_active)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    reporter = asyncio.create_task(_report(app))
    serving = asyncio.create_task(server.serve(sockets=[found]))
    ending = asyncio.create_task(asked.wait())
    await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(shutdown_timeout):
            while app.num_active:
                await asyncio.sleep(0.02)
    if app.num_active:
        log.warning("%d requests did not end within %g s and are cut off", app.num_active, shutdown_timeout)
        await asyncio.to_thread(app.engine.stop)  # their answers end with an error that says so
    server.should_exit = True
    reporter.cancel()
    ending.cancel()
    await serving


async def _report(app: App, interval: float = LOG_INTERVAL) -> None:
    """What the engine did since the last line; nothing where that is nothing."""
    before, was_idle = await app.stats(), True
    while True:
        await asyncio.sleep(interval)
        now = await app.stats()
        if now is None or before is None:
            before = now
            continue
        is_idle = now.num_steps == before.num_steps and not now.num_waiting
        if not (is_idle and was_idle):
            log.info(report_line(before, now, interval))
        before, was_idle = now, is_idle


def report_line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """One line as vLLM's: rates since `before`, and how things stand."""
    hits = now.prefix_cache_hits / now.prefix_cache_queries if now.prefix_cache_queries else 0.0
    return (
        f"Avg prompt throughput: {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {(now.generation_tokens - before.generation_tokens) / seconds:.1f} tokens/s, "
        f"Running: {now.num_running} reqs, Waiting: {now.num_waiting} reqs, "
        f"KV cache usage: {now.pages_held / now.pages_total:.1%}, Prefix cache hit rate: {hits:.1%}"
    )


class Complaints:
    """An event loop's exception handler, brief where descriptors run out.

    asyncio then complains of thousands of attempts to accept a connection, each second, each with a traceback: a log
    that nobody reads fast enough stops the server.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What went wrong outside any request."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in NO_ROOM):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_INTERVAL
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            log.error("new connections wait: %s, and at most %d may be open; raise `ulimit -n`", error.strerror, most)


class Watchdog:
    """A thread that, once an engine hangs or dies, writes every thread's stack to standard error."""

    def __init__(self, engine: AsyncEngine, patience: float, out: Any = None) -> None:
        self._engine, self._patience, self._out = engine, patience, out or sys.stderr
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="jaxpaged-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        told = False
        while not self._done.wait(min(1.0, self._patience / 4)):
            problem = self._engine.problem(self._patience)
            if problem is not None and not told:
                log.error("not healthy: %s; the stacks of all threads follow", problem)
                faulthandler.dump_traceback(self._out, all_threads=True)
            told = problem is not None
