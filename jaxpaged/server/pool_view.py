"""The page pool and the engine's counts as JSON for the page at `/`, however many look at it."""

from __future__ import annotations

import asyncio
import time

import msgspec

from jaxpaged.engine.engine import Engine
from jaxpaged.engine.page_map import PageInfo
from jaxpaged.engine.stats import EngineStats
from jaxpaged.server.async_engine import AsyncEngine

STATES = {"free": 0, "cached": 1, "held": 2}
_SHARE = 0.02  # of the engine's time that looking at it may take
_MOST_OFTEN = 0.25  # seconds


class PoolView:
    """Takes a picture when one is asked for and the last is old enough: the more one costs, the rarer they are."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()
        self._picture = b""
        self._next = 0.0

    async def as_json(self) -> bytes:
        """Of each page: its state, tokens, whether the prefix cache knows it, and places in the list of holders."""
        async with self._lock:
            if time.monotonic() >= self._next:
                stats, pages, seconds = await self._engine.call(_look)
                self._picture = _encode(stats, pages)
                self._next = time.monotonic() + max(_MOST_OFTEN, seconds / _SHARE)
            return self._picture


def _look(engine: Engine) -> tuple[EngineStats, list[PageInfo], float]:
    began = time.thread_time()
    stats, pages = engine.stats(), engine.page_map()
    return stats, pages, time.thread_time() - began


def _encode(stats: EngineStats, pages: list[PageInfo]) -> bytes:
    holders: dict[tuple[str, int], int] = {}
    rows = []
    for page in pages:
        who = [holders.setdefault(holder, len(holders)) for holder in page.holders]
        rows.append([STATES.get(page.state, 0), page.num_tokens, int(page.is_findable), *who])
    return msgspec.json.encode({"stats": stats._asdict(), "holders": list(holders), "pages": rows, "time": time.time()})
