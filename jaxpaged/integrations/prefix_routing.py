"""Which replica has seen most of a prompt before: what routes a conversation back to the pages that hold it.

Knows nothing of who carries the requests, nor of tokens: a prompt is a chain of digests, each of all that came before,
one a message or one for so many characters.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

_PIECE = 256  # characters of a plain prompt, or token ids, that get a digest together
_MAX_LINKS = 64  # of a chain: a conversation that long is known by its beginning

Chain = tuple[bytes, ...]


def chain_of(body: bytes) -> Chain:
    """The chain of an OpenAI request's prompt; empty where it has none, or one that the engine will refuse."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(request, Mapping):
        return ()
    root = [request.get("cache_salt"), request.get("tools")]
    digest = blake2b(json.dumps(root).encode(), digest_size=16)
    links: list[bytes] = []
    for piece in _pieces(request):
        digest.update(json.dumps(piece).encode())
        links.append(digest.digest())
        if len(links) == _MAX_LINKS:
            break
    return tuple(links)


class Affinity:
    """Remembers who was given which beginnings, the least recently used forgotten first."""

    def __init__(self, max_links: int = 1 << 17, max_imbalance: int = 8) -> None:
        """A replica that knows a prompt is passed over once it has `max_imbalance` requests more than the idlest."""
        self._holders: OrderedDict[bytes, str] = OrderedDict()
        self._max_links, self._max_imbalance = max_links, max_imbalance

    def choose(self, chain: Chain, loads: Mapping[str, int]) -> str | None:
        """Of the replicas, given with their requests under way, the one that knows most of the prompt; None: any."""
        least = min(loads.values(), default=0)
        for link in reversed(chain):
            holder = self._holders.get(link)
            if holder is not None and holder in loads:
                return holder if loads[holder] - least < self._max_imbalance else None
        return None

    def given(self, chain: Chain, holder: str) -> None:
        """Remember who has this prompt now."""
        for link in chain:
            self._holders[link] = holder
            self._holders.move_to_end(link)
        while len(self._holders) > self._max_links:
            self._holders.popitem(last=False)


def _pieces(request: Mapping[str, Any]) -> Iterator[Any]:
    match request:
        case {"messages": [*messages]}:
            yield from messages
        case {"prompt": str() as text} | {"prompt": [str() as text, *_]} | {"input": str() as text}:
            yield from _cut(text)
        case {"prompt": [[*ids], *_]} | {"prompt": [*ids]}:
            yield from _cut(ids)
        case {"input": [*items]}:
            yield from items


def _cut(whole: Sequence[Any]) -> Iterator[Any]:
    """Full pieces only: of the last one more may follow."""
    return (whole[start : start + _PIECE] for start in range(0, len(whole) - _PIECE + 1, _PIECE))
