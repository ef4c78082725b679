"""Who holds which page. Owns free pages, reference counts and the prefix cache; knows no request and no array.

Every page but the null page 0 is in one of three states: free, held (reference count above 0), or cached: nobody holds
it, its content is known by the hash of its tokens and of all tokens before them, and it is given away only when no free
page is left, the least recently released first. A sequence's pages are released tail first, so that of an old prefix
the end goes before the beginning that leads to it.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxpaged.errors import PoolError

NULL_PAGE = 0


class _Content(NamedTuple):
    """What a full page holds: its own digest, the digest of all before it, its tokens."""

    digest: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class PagePool:
    """Pages 1 .. num_pages - 1, handed out and taken back."""

    def __init__(self, num_pages: int, page_size: int, *, enable_caching: bool = True) -> None:
        """A pool with every page free. `num_pages` counts the null page."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_caching = enable_caching
        self._root = os.urandom(16)  # digests are unpredictable, so that no prompt can be made to collide
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._contents: dict[int, _Content] = {}
        self._index: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing of use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose content may be found again."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages with a reference count above 0."""
        return self.num_pages - 1 - self.num_available

    def references(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._references[page]

    def is_findable(self, page: int) -> bool:
        """Whether the prefix cache knows the page's content."""
        return page in self._contents

    def allocate(self, count: int) -> list[int]:
        """`count` pages with undefined content, each with one reference. Raises PoolError where there are fewer."""
        if count > self.num_available:
            raise PoolError(f"{count:,} pages asked for but {self.num_available:,} available; release some first")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each page, which must be held or cached."""
        for page in pages:
            if self._references[page] == 0:
                if page not in self._cached:
                    raise PoolError(f"page {page} is free; only held or cached pages can be retained")
                del self._cached[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page of a sequence, given in order; raises PoolError on a page nobody holds."""
        for page in reversed(pages):
            if self._references[page] <= 0:
                raise PoolError(f"page {page} released but nobody holds it")
            self._references[page] -= 1
            if self._references[page] > 0:
                continue
            if page in self._contents:
                self._cached[page] = None
            else:
                self._free.append(page)

    def root(self, salt: bytes = b"") -> bytes:
        """The digest before a first page. Pages after the root of another salt, or of before a reset, are not found."""
        return hashlib.blake2b(self._root + salt, digest_size=16).digest()

    def digest(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """The name of a full page: a hash over its tokens and, through `parent`, all before them."""
        return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()

    def publish(self, page: int, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Make a full page findable; returns its digest. A page whose content is known already stays unpublished."""
        digest = self.digest(parent, token_ids)
        if self.enable_caching and digest not in self._index and page not in self._contents:
            self._contents[page] = _Content(digest, parent, tuple(token_ids))
            self._index[digest] = page
        return digest

    def match(self, token_ids: Sequence[int], salt: bytes = b"") -> tuple[list[int], list[bytes]]:
        """The pages that hold the longest known prefix, now retained, and their digests.

        The last token is never part of it: it must be computed for its logits, and shared pages are never written.
        """
        pages: list[int] = []
        digests: list[bytes] = []
        if not self.enable_caching:
            return pages, digests
        size = self.page_size
        parent = self.root(salt)
        for end in range(size, len(token_ids), size):
            tokens = token_ids[end - size : end]
            digest = self.digest(parent, tokens)
            page = self._index.get(digest)
            if page is None or self._contents[page] != _Content(digest, parent, tuple(tokens)):
                break
            pages.append(page)
            digests.append(digest)
            parent = digest
        self.retain(pages)
        return pages, digests

    def unpublish(self, pages: Iterable[int]) -> None:
        """Nobody shall find these pages again; who holds them keeps them."""
        for page in pages:
            if page in self._contents:
                self._forget(page)
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def reset_prefix_cache(self) -> None:
        """Forget all contents; held pages stay with their holders."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._contents.clear()
        self._index.clear()
        self._root = os.urandom(16)

    def _forget(self, page: int) -> None:
        content = self._contents.pop(page)
        del self._index[content.digest]
