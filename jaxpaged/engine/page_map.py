"""A picture of the page pool: who holds which page, how many tokens are in it, what is found again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from jaxpaged.engine.page_pool import NULL_PAGE, PagePool
from jaxpaged.engine.request import Sequence


class PageInfo(NamedTuple):
    """One page. `holders` are (request id, index of the completion); held by several, it is shared.

    `num_tokens` counts those computed by whoever has filled it furthest; `is_findable` where the prefix cache knows it.
    """

    page: int
    state: Literal["free", "held", "cached"]
    holders: tuple[tuple[str, int], ...]
    num_tokens: int
    is_findable: bool


def page_map(pool: PagePool, running: Iterable[Sequence]) -> list[PageInfo]:
    """Every page but the null page, in order."""
    holders: dict[int, list[tuple[str, int]]] = {}
    num_tokens: dict[int, int] = {}
    for sequence in running:
        for index, page in enumerate(sequence.pages):
            if page != NULL_PAGE:
                filled = min(sequence.num_computed_tokens - index * pool.page_size, pool.page_size)
                holders.setdefault(page, []).append((sequence.request_id, sequence.index))
                num_tokens[page] = max(filled, num_tokens.get(page, 0))
    pages = []
    for page in range(NULL_PAGE + 1, pool.num_pages):
        is_findable = pool.is_findable(page)
        is_held = pool.references(page) > 0
        state: Literal["free", "held", "cached"] = "held" if is_held else "cached" if is_findable else "free"
        filled = num_tokens.get(page, pool.page_size if state == "cached" else 0)
        pages.append(PageInfo(page, state, tuple(holders.get(page, ())), filled, is_findable))
    return pages
