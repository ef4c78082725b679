"""Full pages kept in the host's memory after the pool gave theirs away. Owns which content lies in which slot there.

A page that the pool evicts moves out to a slot, and the least recently used content makes room. A sequence that begins
with what is kept here gets a page for it, and the content moves in. Names are the digests of the prefix cache: what is
not found there because of a salt, other weights or a reset is not found here either.

Moves are only planned here. The runner makes those of a plan in order: all that go out, then all that come in, then the
step writes. What has moved in stays here as well, so that evicting it again costs no second move.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple


class Content(NamedTuple):
    """What a full page holds: its own digest, the digest of all before it, its tokens."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class Move(NamedTuple):
    """A page's content on its way between the pool and a slot of the host."""

    page: int
    slot: int


class _Kept(NamedTuple):
    slot: int
    content: Content


class HostTier:
    """Slots 0 .. num_slots - 1, a page's content each."""

    def __init__(self, num_slots: int, min_pages: int = 1) -> None:
        """All slots empty. Where fewer than `min_pages` pages would be gained, computing them anew is cheaper."""
        self.num_slots = num_slots
        self.min_pages = min_pages
        self.num_moved_out = 0
        self.num_moved_in = 0
        self._empty = list(range(num_slots - 1, -1, -1))
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # the least recently used first
        self._pinned: set[bytes] = set()  # to move in with the plan in the making: these slots must not change hands
        self._out: list[Move] = []
        self._in: list[Move] = []

    @property
    def num_held(self) -> int:
        """Slots with a page's content."""
        return len(self._kept)

    def find(self, digest: bytes) -> Content | None:
        """What is kept under this name."""
        kept = self._kept.get(digest)
        return kept.content if kept else None

    def keep(self, content: Content, page: int) -> None:
        """Plan to move out a page that is being evicted; one whose content is here already has only been used again."""
        if content.digest in self._kept:
            self._kept.move_to_end(content.digest)
            return
        if not self._empty and not self._make_room():
            return
        slot = self._empty.pop()
        self._kept[content.digest] = _Kept(slot, content)
        self._out.append(Move(page, slot))

    def pin(self, digests: Iterable[bytes]) -> None:
        """Hold these until they have moved in, whatever is kept before that."""
        for digest in digests:
            self._pinned.add(digest)
            self._kept.move_to_end(digest)

    def bring(self, digest: bytes, page: int) -> Content:
        """Plan to move pinned content to a page."""
        slot, content = self._kept[digest]
        self._in.append(Move(page, slot))
        return content

    def discard(self, digest: bytes) -> None:
        """Forget one content, if it is here."""
        if (kept := self._kept.pop(digest, None)) is not None:
            self._empty.append(kept.slot)

    def reset(self) -> None:
        """Forget everything."""
        for digest in list(self._kept):
            self.discard(digest)

    def take_moves(self) -> tuple[list[Move], list[Move]]:
        """The moves planned since the last call, out and in; no page and no slot is filled twice by them."""
        moves_out = list({move.slot: move for move in self._out}.values())  # the last one to a slot is the one meant
        moves_in = self._in
        self._out, self._in = [], []
        self._pinned.clear()
        self.num_moved_out += len(moves_out)
        self.num_moved_in += len(moves_in)
        return moves_out, moves_in

    def _make_room(self) -> bool:
        """Forget the least recently used content; False where all that there is will move in now."""
        oldest = next(iter(self._kept), None)
        if oldest is None or oldest in self._pinned:  # pinning makes recent, so all behind it are pinned too
            return False
        self.discard(oldest)
        return True
