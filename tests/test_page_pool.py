"""The page pool beside a simple model of it: every page free, held or cached, and prefixes found as they were left."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.engine.page_pool import NULL_PAGE, PagePool
from jaxpaged.errors import PoolError

# Small stories


def filled(pool: PagePool, token_ids: list[int], salt: bytes = b"") -> list[int]:
    """Pages that hold the tokens, published and held."""
    size = pool.page_size
    pages = pool.allocate(len(token_ids) // size)
    parent = pool.root(salt)
    for index, page in enumerate(pages):
        parent = pool.publish(page, parent, token_ids[index * size : (index + 1) * size])
    return pages


def test_the_null_page_is_never_handed_out() -> None:
    pages = PagePool(8, 4).allocate(7)
    assert sorted(pages) == [1, 2, 3, 4, 5, 6, 7]
    assert NULL_PAGE not in pages


def test_more_pages_than_available_are_refused_and_nothing_is_taken() -> None:
    pool = PagePool(4, 4)
    with pytest.raises(PoolError, match="4 pages asked for but 3 available"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_a_released_prefix_is_found_again() -> None:
    pool = PagePool(8, 4)
    pages = filled(pool, list(range(12)))
    pool.release(pages)
    assert (pool.num_cached, pool.num_free, pool.num_held) == (3, 4, 0)
    found, digests = pool.match([*range(12), 99])
    assert found == pages
    assert len(digests) == 3
    assert (pool.num_cached, pool.num_held) == (0, 3)


def test_a_prefix_still_held_is_shared() -> None:
    pool = PagePool(8, 4)
    pages = filled(pool, list(range(8)))
    found, _ = pool.match(list(range(9)))
    assert found == pages
    assert [pool.references(p) for p in pages] == [2, 2]
    pool.release(pages)
    assert pool.num_held == 2


@pytest.mark.parametrize(("length", "num_found"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_the_last_token_is_never_matched(length: int, num_found: int) -> None:
    pool = PagePool(8, 4)
    filled(pool, list(range(12)))
    assert len(pool.match(list(range(length)))[0]) == num_found


def test_a_match_ends_where_tokens_differ() -> None:
    pool = PagePool(8, 4)
    pages = filled(pool, list(range(12)))
    assert pool.match([*range(7), 99, *range(8, 13)])[0] == pages[:1]


def test_equal_pages_after_different_beginnings_are_different() -> None:
    pool = PagePool(8, 2)
    filled(pool, [1, 1, 5, 5])
    other = filled(pool, [2, 2, 5, 5])
    assert pool.match([2, 2, 5, 5, 0])[0] == other
    assert pool.match([5, 5, 0])[0] == []


def test_salts_do_not_share() -> None:
    pool = PagePool(8, 2)
    plain, salted = filled(pool, [1, 2, 3, 4]), filled(pool, [1, 2, 3, 4], b"salt")
    assert pool.match([1, 2, 3, 4, 5])[0] == plain
    assert pool.match([1, 2, 3, 4, 5], b"salt")[0] == salted
    assert pool.match([1, 2, 3, 4, 5], b"other")[0] == []


def test_free_pages_go_before_cached_ones() -> None:
    pool = PagePool(5, 2)
    pool.release(filled(pool, [1, 2, 3, 4]))
    pool.allocate(2)
    assert len(pool.match([1, 2, 3, 4, 0])[0]) == 2


def test_of_an_old_prefix_the_end_is_evicted_before_the_beginning() -> None:
    pool = PagePool(4, 2)
    pages = filled(pool, [1, 2, 3, 4, 5, 6])
    pool.release(pages)
    assert pool.allocate(1) == pages[2:]
    assert pool.allocate(1) == pages[1:2]
    assert pool.match([1, 2, 0])[0] == pages[:1]


def test_the_least_recently_released_is_evicted_first() -> None:
    pool = PagePool(4, 2)
    first, second, third = (filled(pool, [n, n]) for n in range(3))
    for pages in (second, first, third):
        pool.release(pages)
    pool.release(pool.match([1, 1, 0])[0])  # the second is used once more
    assert [pool.allocate(1) for _ in range(3)] == [first, third, second]


def test_an_evicted_page_is_not_found() -> None:
    pool = PagePool(3, 2)
    pool.release(filled(pool, [1, 2, 3, 4]))
    pool.allocate(2)
    assert pool.match([1, 2, 3, 4, 5]) == ([], [])


def test_content_that_is_known_already_is_not_published_twice() -> None:
    pool = PagePool(5, 2)
    first, again = filled(pool, [1, 2]), filled(pool, [1, 2])
    pool.release(again)
    assert pool.num_cached == 0
    assert pool.match([1, 2, 3])[0] == first


def test_without_caching_nothing_is_found_and_all_becomes_free() -> None:
    pool = PagePool(4, 2, enable_caching=False)
    pages = filled(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4, 5]) == ([], [])
    pool.release(pages)
    assert pool.num_free == 3


def test_after_a_reset_nothing_is_found_and_holders_keep_their_pages() -> None:
    pool = PagePool(6, 2)
    held = filled(pool, [1, 2])
    pool.release(filled(pool, [3, 4]))
    pool.reset_prefix_cache()
    assert pool.match([1, 2, 0]) == pool.match([3, 4, 0]) == ([], [])
    assert (pool.num_held, pool.num_cached, pool.num_free) == (1, 0, 4)
    pool.release(held)
    assert pool.num_free == 5


def test_a_sequence_under_way_at_a_reset_publishes_nothing_that_can_be_found() -> None:
    pool = PagePool(8, 2)
    first, second = pool.allocate(2)
    root = pool.root()
    pool.reset_prefix_cache()
    parent = pool.publish(first, root, [1, 2])
    pool.publish(second, parent, [3, 4])
    assert pool.match([1, 2, 3, 4, 5]) == ([], [])
    anew = filled(pool, [1, 2])
    assert pool.match([1, 2, 3, 4, 5])[0] == anew


@pytest.mark.parametrize("times", [1, 2])
def test_releasing_what_nobody_holds_is_an_error(times: int) -> None:
    pool = PagePool(4, 2)
    pages = pool.allocate(1)
    for _ in range(times):
        pool.retain(pages)
        pool.release(pages)
    pool.release(pages)
    with pytest.raises(PoolError, match=f"page {pages[0]} released but nobody holds it"):
        pool.release(pages)


def test_a_cached_page_cannot_be_released_again() -> None:
    pool = PagePool(4, 2)
    pages = filled(pool, [1, 2])
    pool.release(pages)
    with pytest.raises(PoolError, match="nobody holds it"):
        pool.release(pages)


def test_a_free_page_cannot_be_retained() -> None:
    with pytest.raises(PoolError, match="page 2 is free"):
        PagePool(4, 2).retain([2])


# Any order of operations


@dataclass
class Holder:
    """What a sequence is to the pool: pages in order, the tokens of the first of them, and their digests."""

    pages: list[int]
    salt: bytes = b""
    token_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    root: bytes = b""
    resets: int = 0  # that there had been when it began


class PoolMachine(RuleBasedStateMachine):
    """The pool and, beside it, who holds what, what is cached in order of release, what is known where."""

    @initialize(num_pages=st.integers(2, 12), page_size=st.sampled_from([1, 2, 4]))
    def start(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.holders: list[Holder] = []
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.known: dict[tuple, int] = {}  # (resets before, salt, all tokens up to the page's end) -> page
        self.num_resets = 0

    def references(self) -> Counter[int]:
        return Counter(page for holder in self.holders for page in holder.pages)

    def take(self, count: int) -> list[int]:
        """Allocate, and follow in the model what that must evict."""
        free = set(range(1, self.pool.num_pages)) - self.references().keys() - self.cached.keys()
        num_evicted = max(0, count - len(free))
        if num_evicted > len(self.cached):
            with pytest.raises(PoolError):
                self.pool.allocate(count)
            return []
        evicted = list(self.cached)[:num_evicted]
        pages = self.pool.allocate(count)
        assert len(pages) == len(set(pages)) == count
        assert set(evicted) <= set(pages) <= free | set(evicted)
        for page in evicted:
            del self.cached[page]
        self.known = {content: page for content, page in self.known.items() if page not in evicted}
        return pages

    @rule(count=st.integers(0, 6), salt=st.sampled_from([b"", b"a"]))
    def allocate(self, count: int, salt: bytes) -> None:
        self.holders.append(Holder(self.take(count), salt, root=self.pool.root(salt), resets=self.num_resets))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 3))
    def extend(self, data: st.DataObject, count: int) -> None:
        data.draw(st.sampled_from(self.holders)).pages += self.take(count)

    @precondition(lambda self: any(len(h.digests) < len(h.pages) for h in self.holders))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([h for h in self.holders if len(h.digests) < len(h.pages)]))
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=self.pool.page_size, max_size=self.pool.page_size))
        page = holder.pages[len(holder.digests)]
        parent = holder.digests[-1] if holder.digests else holder.root
        holder.digests.append(self.pool.publish(page, parent, tokens))
        holder.token_ids += tokens
        content = (holder.resets, holder.salt, tuple(holder.token_ids))
        if page not in self.known.values():
            self.known.setdefault(content, page)

    @rule(data=st.data(), salt=st.sampled_from([b"", b"a"]), others=st.lists(st.integers(0, 1), max_size=5))
    def match(self, data: st.DataObject, salt: bytes, others: list[int]) -> None:
        start = data.draw(st.sampled_from(self.holders)).token_ids if self.holders else []
        tokens = start[: data.draw(st.integers(0, len(start)))] + others
        expected: list[int] = []
        size = self.pool.page_size
        for end in range(size, len(tokens), size):
            page = self.known.get((self.num_resets, salt, tuple(tokens[:end])))
            if page is None:
                break
            expected.append(page)
        pages, digests = self.pool.match(tokens, salt)
        assert pages == expected
        assert len(digests) == len(pages)
        for page in pages:
            self.cached.pop(page, None)
        found = tokens[: len(pages) * size]
        self.holders.append(Holder(pages, salt, found, digests, self.pool.root(salt), self.num_resets))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.retain(holder.pages)
        count = len(holder.digests)
        self.pool.release(holder.pages[count:])  # pages without content are written by one alone
        again = replace(holder, pages=holder.pages[:count], token_ids=[*holder.token_ids], digests=[*holder.digests])
        self.holders.append(again)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(holder.pages)
        left = self.references()
        for page in reversed(holder.pages):
            if page not in left and page in self.known.values():
                self.cached[page] = None

    @rule(data=st.data())
    def release_what_nobody_holds(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(0, self.pool.num_pages - 1))
        if page not in self.references():
            with pytest.raises(PoolError):
                self.pool.release([page])

    @rule(data=st.data())
    def retain_what_is_free(self, data: st.DataObject) -> None:
        page = data.draw(st.integers(0, self.pool.num_pages - 1))
        if page not in self.references() and page not in self.cached:
            with pytest.raises(PoolError):
                self.pool.retain([page])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.holders)).pages
        self.pool.unpublish(pages)
        self.known = {content: page for content, page in self.known.items() if page not in pages}

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        self.num_resets += 1
        self.known, self.cached = {}, OrderedDict()

    @invariant()
    def every_page_is_free_held_or_cached(self) -> None:
        held = self.references()
        assert [self.pool.references(p) for p in range(self.pool.num_pages)] == [
            held[p] for p in range(self.pool.num_pages)
        ]
        assert self.pool.num_held == len(held)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == self.pool.num_pages - 1 - len(held) - len(self.cached)
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached
        assert NULL_PAGE not in held


def run(max_examples: int, steps: int) -> type:
    case = type("TestAnyOrder", (PoolMachine,), {}).TestCase
    case.settings = settings(max_examples=max_examples, stateful_step_count=steps, deadline=None)
    return case


TestAnyOrder = run(100, 40)
TestAnyOrderForLong = pytest.mark.slow(run(1000, 100))
