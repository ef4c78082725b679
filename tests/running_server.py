"""A server in this process: its socket is real, its engine can be looked at."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx

from jaxpaged.engine.engine import Engine
from jaxpaged.server.app import App, ServerOptions
from jaxpaged.server.async_engine import AsyncEngine
from jaxpaged.server.serve import listen, make_server

if TYPE_CHECKING:
    from jaxpaged.server.tracing import Tracing

ROOT = Path(__file__).parents[1]
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_pages": 129, "page_size": 4, "warmup": False}


class RunningServer(NamedTuple):
    url: str
    app: App
    engine: AsyncEngine
    inner: Engine
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def pages_held(self) -> int:
        """Once nothing runs."""
        deadline = time.monotonic() + 20
        while (stats := self.inner.stats()).num_running or stats.num_waiting or self.engine.num_open:
            assert time.monotonic() < deadline, stats
            time.sleep(0.005)
        return stats.pages_held


@contextmanager
def running(
    folder: Path,
    *,
    queued: int | None = None,
    tracing: Tracing | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Iterator[RunningServer]:
    engine = AsyncEngine.load(folder, max_num_queued_requests=queued, **SMALL, **settings)
    app = App(engine, ServerOptions(models=("tiny", "tiny-too"), **options), tracing)
    server, found = make_server(app), listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[found])))
    thread.start()
    url = f"{'https' if app.options.tls else 'http'}://127.0.0.1:{found.getsockname()[1]}"
    trusted = ssl.create_default_context(cafile=app.options.tls[0]) if app.options.tls else True
    with httpx.Client(base_url=url, timeout=60, verify=trusted) as http:
        try:
            yield RunningServer(url, app, engine, engine._engine, http)
        finally:
            server.should_exit = True
            thread.join(20)
            engine.stop()
            assert not thread.is_alive()


SERVE = "--port 0 --max-num-seqs 4 --max-num-batched-tokens 32 --num-pages 129 --page-size 4 --no-warmup"


def jaxpaged_serve(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """A server in a process of its own; `address_of` tells where, once it listens."""
    command = [sys.executable, "-m", "jaxpaged", "serve", str(folder), *SERVE.split(), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def address_of(process: subprocess.Popen[str]) -> str:
    """The URL that the process says."""
    lines = [process.stdout.readline() for _ in range(2)]
    assert "up to 4 sequences" in lines[0] and "listening at http://127.0.0.1:" in lines[1], lines
    return lines[1].split()[2].rstrip(",")
