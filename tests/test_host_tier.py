"""Pages that the pool gave away come back from the host, as they were, to those that may have them alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hash_engine import HashEngine

from jaxpaged.engine.host_pages import HostPages, pages_worth_moving
from jaxpaged.engine.host_tier import Content, HostTier
from jaxpaged.engine.request import Sequence

PROMPT, OTHER = [0, 1, 2, 0, 1, 2, 2], [1, 1, 0, 2, 0, 2, 1, 0, 0]


def alone(engine: HashEngine, prompt: list[int], **given: object) -> Sequence:
    """A request run to its end; the model itself says whether its tokens are right."""
    sequence = engine.add(prompt, 1, **given)
    engine.run()
    return sequence


def evicted(engine: HashEngine) -> None:
    """Every cached page given away."""
    engine.pool.release(engine.pool.allocate(engine.pool.num_available))


# What comes back


@pytest.mark.parametrize("host_pages", [0, 8])
def test_an_evicted_prefix_comes_back_where_there_is_a_host_tier(host_pages: int) -> None:
    engine = HashEngine(num_pages=6, page_size=2, host_pages=host_pages)
    alone(engine, PROMPT)
    alone(engine, OTHER)  # takes all five pages
    again = alone(engine, PROMPT)
    assert again.num_cached_tokens == (6 if host_pages else 0)
    assert engine.scheduler.host_cache_hits == engine.host.num_moved_in * 2 == again.num_cached_tokens


def test_what_is_in_the_pool_still_is_shared_and_only_the_rest_moves_in() -> None:
    engine = HashEngine(num_pages=8, page_size=2, host_pages=8)
    alone(engine, PROMPT)
    engine.pool.release(engine.pool.allocate(5))  # the end of the prefix goes first
    again = alone(engine, PROMPT)
    assert again.num_cached_tokens == 6
    assert 0 < engine.host.num_moved_in < 3


def test_a_preempted_sequence_finds_its_pages_on_the_host() -> None:
    counts = []
    for host_pages in (0, 32):
        engine = HashEngine(num_pages=9, page_size=2, host_pages=host_pages)
        for prompt in ([0] * 4, [1, 2] * 2, [2, 0] * 2):
            engine.add(prompt, max_tokens=10)
        engine.run()
        assert engine.scheduler.num_preemptions > 0
        counts.append(engine.scheduler.prefix_cache_queries - engine.scheduler.prefix_cache_hits)
    assert engine.scheduler.host_cache_hits > 0
    assert counts[1] < counts[0]


def test_two_that_begin_alike_share_what_moved_in_for_the_first() -> None:
    engine = HashEngine(page_size=2, host_pages=8)
    alone(engine, PROMPT)
    evicted(engine)
    for _ in range(2):
        engine.add(PROMPT)
    plan = engine.step()
    assert len(plan.moves_in) == 3
    assert engine.pool.num_held == 3 + 2
    engine.run()


def test_what_has_moved_in_need_not_move_out_again() -> None:
    engine = HashEngine(page_size=2, host_pages=8)
    alone(engine, PROMPT)
    for _ in range(3):
        evicted(engine)
        alone(engine, PROMPT)
    assert engine.host.num_moved_in == 9
    assert engine.host.num_moved_out == 3


def test_the_least_recently_used_content_makes_room() -> None:
    engine = HashEngine(page_size=2, host_pages=4)
    for token in (0, 1):
        alone(engine, [token] * 5)
        evicted(engine)
    alone(engine, [0] * 5)
    evicted(engine)
    alone(engine, [2] * 5)
    evicted(engine)
    assert engine.host.num_held == 4
    assert [alone(engine, [token] * 5).num_cached_tokens for token in (2, 0, 1)] == [4, 4, 0]


def test_a_few_pages_are_computed_anew_where_that_is_cheaper() -> None:
    engine = HashEngine(page_size=2, host_pages=8, min_host_pages=3)
    alone(engine, PROMPT)
    cached = []
    for length in (5, 7):
        evicted(engine)
        cached.append(alone(engine, PROMPT[:length]).num_cached_tokens)
    assert cached == [0, 6]


def test_what_is_on_the_host_waits_for_its_pages_like_any_other() -> None:
    engine = HashEngine(num_pages=9, page_size=2, host_pages=8)
    alone(engine, PROMPT)
    evicted(engine)
    engine.add([2] * 9, max_tokens=4)
    engine.step()  # leaves three pages
    again = engine.add(PROMPT)
    assert engine.step().moves_in == []
    assert engine.scheduler.waiting == [again]
    engine.run()
    assert engine.host.num_moved_in == 3


def test_only_what_the_window_still_reaches_moves_in() -> None:
    engine = HashEngine(page_size=2, window=4, host_pages=32)
    prompt = [0, 1, 2, 2, 1, 0] * 3
    alone(engine, prompt)
    evicted(engine)
    again = alone(engine, [*prompt, 1])
    assert again.num_cached_tokens == 18
    assert engine.host.num_moved_in == 2  # of nine


# What does not


def test_the_host_gives_to_the_same_salt_only() -> None:
    engine = HashEngine(page_size=2, host_pages=32)
    alone(engine, PROMPT, cache_salt=b"a")
    evicted(engine)
    assert [alone(engine, PROMPT, cache_salt=salt).num_cached_tokens for salt in (b"b", b"", b"a")] == [0, 0, 6]


@pytest.mark.parametrize("forget", ["reset", "new weights"])
def test_the_host_forgets_with_the_prefix_cache(forget: str) -> None:
    engine = HashEngine(page_size=2, host_pages=8)
    alone(engine, PROMPT)
    evicted(engine)
    if forget == "reset":
        engine.pool.reset_prefix_cache()
    else:
        engine.update_weights(recompute=False)
    assert engine.host.num_held == 0
    assert alone(engine, PROMPT).num_cached_tokens == 0


def test_keys_of_old_weights_that_move_out_late_are_found_by_nobody() -> None:
    engine = HashEngine(page_size=2, host_pages=8)
    kept = engine.add(PROMPT, max_tokens=6)
    engine.step()
    engine.update_weights(recompute=False)
    engine.run()
    evicted(engine)
    assert alone(engine, kept.token_ids).num_cached_tokens == 0


def test_after_an_error_nothing_of_the_sequence_is_kept() -> None:
    engine = HashEngine(page_size=2, host_pages=8)
    alone(engine, PROMPT)
    evicted(engine)
    failed = engine.add(PROMPT)
    engine.step()
    assert failed.num_cached_tokens == 6
    engine.finish(failed, "error")
    engine.run()
    assert alone(engine, PROMPT).num_cached_tokens == 0


def test_prompt_logprobs_leave_the_host_alone() -> None:
    engine = HashEngine(page_size=2, host_pages=8)
    alone(engine, PROMPT)
    evicted(engine)
    assert alone(engine, PROMPT, prompt_logprobs=0).num_cached_tokens == 0


# The slots


def content(number: int) -> Content:
    return Content(bytes([number]), b"", (number,))


def test_a_slot_to_be_read_is_not_filled_with_something_else_before() -> None:
    host = HostTier(2)
    for number in (0, 1):
        host.keep(content(number), page=number + 1)
    host.take_moves()
    host.pin([b"\0", b"\1"])
    host.keep(content(2), page=3)
    host.bring(b"\0", page=3)
    assert host.find(b"\2") is None
    assert host.take_moves() == ([], [(3, host._kept[b"\0"].slot)])
    host.keep(content(3), page=4)
    assert host.find(b"\0") is None


def test_of_two_pages_that_would_move_to_one_slot_only_the_last_does() -> None:
    host = HostTier(1)
    host.keep(content(0), page=5)
    host.keep(content(1), page=6)
    assert host.take_moves() == ([(6, 0)], [])


def test_what_is_evicted_once_more_has_been_used_since() -> None:
    host = HostTier(2)
    for number in (0, 1, 0, 2):
        host.keep(content(number), page=1)
    assert [host.find(bytes([number])) is not None for number in range(3)] == [True, False, True]


# The bytes


def test_pages_come_back_bit_by_bit_whatever_pools_are_made_of() -> None:
    """Also a pool of pages and scales, and slots that are filled again before anybody has looked."""
    rng = np.random.default_rng(0)
    pools = tuple(
        {"pages": jnp.zeros((9, 4, 2, 1, 8), dtype), "scales": jnp.zeros((9, 4), jnp.float32)}
        for dtype in (jnp.bfloat16, jnp.int8)
    )
    pages = HostPages(pools, 3)

    def draw() -> tuple[dict[str, jnp.ndarray], ...]:
        return tuple(
            {name: jnp.asarray(rng.integers(-99, 99, (2, *a.shape[1:])), a.dtype) for name, a in pool.items()}
            for pool in pools
        )

    first, second = draw(), draw()
    pages.put(np.asarray([2, 0]), first)
    pages.put(np.asarray([0, -1]), second)
    found = pages.get(np.asarray([0, 2, 0]))
    for got, old, new in zip(found, first, second, strict=True):
        for name in got:
            assert got[name].dtype == old[name].dtype
            np.testing.assert_array_equal(got[name], np.stack([new[name][0], old[name][0], new[name][0]]))


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "num_params", "platform", "pages"),
    [(32, 8, 128, 8e9, "gpu", 1), (12, 12, 64, 124e6, "gpu", 8), (30, 3, 64, 135e6, "cpu", 1)],
    ids=["8B", "GPT-2", "SmolLM2 on a CPU"],
)
def test_a_page_is_worth_its_way_where_computing_it_takes_longer(
    layers: int, kv_heads: int, head_dim: int, num_params: float, platform: str, pages: int
) -> None:
    page_bytes = layers * 2 * kv_heads * head_dim * 2 * 16
    assert pages_worth_moving(8 * page_bytes, 16, int(num_params), platform, 8) == pages
