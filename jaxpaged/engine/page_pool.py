"""Who holds which page. Owns free pages, reference counts and the prefix cache; knows no request and no array.

Every page but the null page 0 is in one of three states: free, held (reference count above 0), or cached: nobody holds
it, its content is known by the hash of its tokens and of all tokens before them, and it is given away only when no free
page is left, the least recently released first. A sequence's pages are released tail first, so that of an old prefix
the end goes before the beginning that leads to it. Where there is a host tier, what is given away is kept there.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from jaxpaged.engine.host_tier import Content, HostTier
from jaxpaged.errors import PoolError

NULL_PAGE = 0
ON_HOST = -1
"""Stands in a match for a page that is found on the host and has none in the pool yet."""


class PagePool:
    """Pages 1 .. num_pages - 1, handed out and taken back."""

    def __init__(
        self, num_pages: int, page_size: int, *, enable_caching: bool = True, host: HostTier | None = None
    ) -> None:
        """A pool with every page free. `num_pages` counts the null page."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_caching = enable_caching
        self.host = host
        self._root = os.urandom(16)  # digests are unpredictable, so that no prompt can be made to collide
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._contents: dict[int, Content] = {}
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

    def is_writable(self, page: int) -> bool:
        """Whether one sequence alone holds the page and nobody can find it."""
        return self._references[page] == 1 and page not in self._contents

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
                content = self._forget(page)
                if self.host is not None:
                    self.host.keep(content, page)
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
            self._contents[page] = Content(digest, parent, tuple(token_ids))
            self._index[digest] = page
        return digest

    def match(self, token_ids: Sequence[int], salt: bytes = b"") -> tuple[list[int], list[bytes]]:
        """What `find` finds, now retained; `bring` must fetch those `ON_HOST` first."""
        pages, digests = self.find(token_ids, salt)
        self.retain(page for page in pages if page != ON_HOST)
        return pages, digests

    def find(self, token_ids: Sequence[int], salt: bytes = b"") -> tuple[list[int], list[bytes]]:
        """The pages that hold the longest known prefix and their digests; `ON_HOST` where only the host has it.

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
            page = self._find(Content(digest, parent, tuple(tokens)))
            if page is None:
                break
            pages.append(page)
            digests.append(digest)
            parent = digest
        if self.host is not None and ON_HOST in pages:
            first = pages.index(ON_HOST)
            if len(pages) - first < self.host.min_pages:
                del pages[first:], digests[first:]
        return pages, digests

    def bring(self, digests: Sequence[bytes]) -> list[int]:
        """Pages for contents that `match` has just found on the host, which plans to move them in; each has one
        reference and is findable. Raises PoolError where fewer are available.
        """
        if self.host is None or not digests:
            return []
        self.host.pin(digests)
        pages = self.allocate(len(digests))
        for digest, page in zip(digests, pages, strict=True):
            self._contents[page] = self.host.bring(digest, page)
            self._index[digest] = page
        return pages

    def unpublish(self, pages: Iterable[int]) -> None:
        """Nobody shall find these pages or what is kept of them again; who holds them keeps them."""
        for page in pages:
            if page in self._contents:
                content = self._forget(page)
                if self.host is not None:
                    self.host.discard(content.digest)
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
        if self.host is not None:
            self.host.reset()

    def _find(self, content: Content) -> int | None:
        """The page that holds this, `ON_HOST` where only the host does, None where nobody does."""
        page = self._index.get(content.digest)
        if page is not None:
            return page if self._contents[page] == content else None
        return ON_HOST if self.host is not None and self.host.find(content.digest) == content else None

    def _forget(self, page: int) -> Content:
        content = self._contents.pop(page)
        del self._index[content.digest]
        return content
