"""uvicorn's connection with bounds on what comes before a body: bytes, fields and time. uvicorn itself has none.

A request's headers may take 64 kB, 100 fields and ten seconds; a body has its own bounds (exchange.py), and here a
time after which its connection is closed, should nobody be reading it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jaxpaged.server.faults import Fault

MAX_HEADER_BYTES = 64 << 10
MAX_HEADER_FIELDS = 100
HEADER_TIMEOUT = 10.0


class BoundedConnection(HttpToolsProtocol):
    """One client's connection."""

    header_timeout = HEADER_TIMEOUT
    body_timeout = 90.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_headers = True
        self._header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first request's time begins at once: a connection that says nothing is closed, too."""
        super().connection_made(transport)
        self._start_timer(self.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counted before it is parsed where a header is under way, so that none grows without bound."""
        if self.transport.is_closing():
            return
        if self._in_headers:
            if self._timer is None:  # a further request of a kept connection
                self._start_timer(self.header_timeout)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(Fault(431, f"the header has over {MAX_HEADER_BYTES:,} bytes; shorten it"))
                return
            self._header_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Counts begin anew."""
        self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The header as parsed is within the bounds, or nobody sees the request."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._in_headers, self._header_bytes = False, 0
        self._start_timer(self.body_timeout)
        if size > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_FIELDS:
            self._refuse(
                Fault(
                    431,
                    f"the header has {size:,} bytes and {len(self.headers):,} fields; "
                    f"at most {MAX_HEADER_BYTES:,} and {MAX_HEADER_FIELDS:,} are taken",
                )
            )
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A refused request's body is nobody's."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """What follows is the next request, whenever it comes: waiting for it is uvicorn's keep-alive."""
        self._in_headers = True
        self._stop_timer()
        if not self.transport.is_closing():
            super().on_message_complete()

    def shutdown(self) -> None:
        """The server ends. A client that keeps its connection open is not waited for, as TLS otherwise would."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.transport.get_extra_info("sslcontext") is not None:
            self.transport.abort()
        else:
            super().shutdown()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer may be under way: nothing may be written into it
        else:
            self._refuse(Fault(408, "the request did not come in time"))

    def _refuse(self, fault: Fault) -> None:
        body = fault.as_json()
        lines = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[fault.status] + lines.encode() + body)
            self.transport.close()
        self._stop_timer()
