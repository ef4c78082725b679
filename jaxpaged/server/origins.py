"""Whose pages may ask from a browser: the server's own, and those of the origins that its operator allows."""

from __future__ import annotations

from collections.abc import Collection

from jaxpaged.server.exchange import Exchange
from jaxpaged.server.faults import Fault

ANY = "*"


class Origins:
    """Origins such as https://example.org, or "*"; what a browser is told of them is called CORS."""

    def __init__(self, allowed: Collection[str] = ()) -> None:
        self._allowed = frozenset(allowed)

    def check(self, exchange: Exchange) -> None:
        """Browsers say where a request comes from; no other site's page may make this server work. Raises Fault."""
        is_foreign = exchange.headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site")
        if exchange.method == "POST" and is_foreign and not self._allows(exchange):
            raise Fault(403, "pages of other sites are not answered; ask from the page at /, or from a program")

    def headers(self, exchange: Exchange) -> dict[str, str]:
        """What an answer to a page of an allowed origin carries, so that the browser hands it over."""
        if not self._allowed:
            return {}
        vary = {"Vary": "Origin"}  # for what keeps answers between here and there
        return vary | ({"Access-Control-Allow-Origin": _origin(exchange)} if self._allows(exchange) else {})

    def preflight(self, exchange: Exchange) -> dict[str, str] | None:
        """The answer to a browser that asks whether it may ask; None where nobody asked, or may not."""
        if exchange.method != "OPTIONS" or b"access-control-request-method" not in exchange.headers:
            return None
        if not self._allows(exchange):
            return None
        wanted = exchange.headers.get(b"access-control-request-headers", b"").decode("latin-1")
        told = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
        return told | ({"Access-Control-Allow-Headers": wanted} if wanted else {})

    def _allows(self, exchange: Exchange) -> bool:
        origin = _origin(exchange)
        return bool(origin) and (ANY in self._allowed or origin in self._allowed)


def _origin(exchange: Exchange) -> str:
    return exchange.headers.get(b"origin", b"").decode("latin-1")
