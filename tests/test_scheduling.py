"""What the engine promises of order, limits, salts, forks and windows, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache

import jax
import numpy as np
import pytest

from jaxpaged import Engine, EngineConfig, QueueFullError, RequestError, SamplingParams
from jaxpaged.engine.scheduler import Plan
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

VOCAB, LENGTH = 64, 96
_NORM = Norm("rms", 1e-5)


def spec(window: int | None = None) -> Decoder:
    mixer = Attention(4, 2, 8, 8**-0.5, Rope(1e4, 8), window=window)
    return Decoder(VOCAB, 32, LENGTH, (Block(mixer, Mlp(48, "silu"), _NORM),) * 2, _NORM, 32, tied_head=False)


PARAMS = jax.tree.map(lambda w: w * 3, dummy_params(spec(), seed=1))
ROOMY = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_pages": 64, "page_size": 4}
PROMPTS = [np.random.default_rng(i).integers(0, VOCAB, n).tolist() for i, n in enumerate((5, 17, 1, 30, 9, 4, 23, 12))]


def make(window: int | None = None, **settings: object) -> Engine:
    return Engine(spec(window), PARAMS, EngineConfig(warmup=False, **(ROOMY | settings)))


def run(engine: Engine) -> dict[str, list[list[int]]]:
    """The tokens of each request's completions, in the order in which requests finished."""
    done = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = [c.token_ids for c in output.outputs]
    stats = engine.stats()
    assert (stats.pages_held, stats.pages_leaked) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    return done


def watched(engine: Engine) -> list[Plan]:
    """The plans that it will make."""
    plans: list[Plan] = []
    (shard,) = engine.shards
    schedule = shard.scheduler.schedule

    def watched_schedule() -> Plan:
        plans.append(schedule())
        return plans[-1]

    shard.scheduler.schedule = watched_schedule
    return plans


def greedy(count: int, **params: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, **params)


# Order


def test_first_come_first_served() -> None:
    engine = make(max_num_seqs=1)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, greedy(2))
    assert list(run(engine)) == [str(index) for index in range(len(PROMPTS))]


def test_the_lowest_priority_number_comes_first_and_equals_by_arrival() -> None:
    engine = make(max_num_seqs=1, scheduling_policy="priority")
    for name, priority in [("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)]:
        engine.add_request(name, PROMPTS[0], greedy(2), priority=priority)
    assert list(run(engine)) == ["d", "b", "e", "a", "c"]


def test_the_least_urgent_gives_its_pages_back_whoever_came_first() -> None:
    engine = make(num_pages=9, max_model_len=32, scheduling_policy="priority", enable_prefix_caching=False)
    engine.add_request("patient", PROMPTS[0], greedy(20), priority=5)
    engine.step()
    engine.add_request("urgent", PROMPTS[4], greedy(20), priority=0)
    done = {}
    while engine.has_unfinished:
        done |= {o.request_id: o.metrics.num_preemptions for o in engine.step() if o.finished}
    assert done["urgent"] == 0
    assert done["patient"] > 0


def test_a_priority_needs_the_policy() -> None:
    with pytest.raises(RequestError, match="priority is 3 but scheduling_policy is 'fcfs'"):
        make().add_request("x", [1], priority=3)


# Limits


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    engine = make(max_num_seqs=1, max_num_queued_requests=2)
    engine.add_request("a", PROMPTS[0], greedy(2))
    engine.add_request("b", PROMPTS[1], greedy(2, n=3))
    with pytest.raises(QueueFullError, match="2 requests wait and max_num_queued_requests is 2"):
        engine.add_request("c", PROMPTS[2], greedy(2))
    engine.step()
    engine.add_request("c", PROMPTS[2], greedy(2))
    assert run(engine).keys() == {"a", "b", "c"}


def test_a_long_prompt_leaves_room_for_others_in_every_step() -> None:
    engine = make(long_prefill_token_threshold=5)
    engine.add_request("long", PROMPTS[3], greedy(4))
    engine.add_request("short", PROMPTS[2], greedy(1))
    plans = watched(engine)
    done = run(engine)
    assert list(done) == ["short", "long"]
    assert max(c.length for plan in plans for c in plan.chunks) == 5


def test_no_more_prompts_are_under_way_than_allowed() -> None:
    engine = make(long_prefill_token_threshold=4, max_num_partial_prefills=1)
    for index in (3, 6, 1):
        engine.add_request(str(index), PROMPTS[index], greedy(1))
    plans = watched(engine)
    run(engine)
    assert max(sum(not c.samples for c in plan.chunks) for plan in plans) == 1


# Sharing


def test_requests_share_prefixes_only_under_the_same_salt() -> None:
    engine = make()
    cached = []
    for index, salt in enumerate([None, "a", "a", "b", None, ""]):
        engine.add_request(str(index), PROMPTS[3], greedy(1), cache_salt=salt)
        while engine.has_unfinished:
            cached += [o.num_cached_tokens for o in engine.step() if o.finished]
    assert cached == [0, 0, 28, 0, 28, 28]


def test_an_explicit_fork_goes_on_from_the_tokens_so_far_with_a_seed_of_its_own() -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=16)
    alone = make()
    alone.add_request("x", PROMPTS[1], params)
    (expected,) = run(alone)["x"]
    engine = make()
    engine.add_request("x", PROMPTS[1], params)
    for _ in range(6):
        (*_, output) = engine.step() or [None]
    known = len(output.outputs[0].token_ids)
    assert engine.fork("x", 2) == [1, 2]
    shared = [page for page in engine.page_map() if len(page.holders) == 3]
    assert len(shared) >= len(PROMPTS[1]) // 4
    first, second, third = run(engine)["x"]
    assert first == expected
    assert first[:known] == second[:known] == third[:known]
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert len(second) == len(third) == 16


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_completion_that_has_not_begun_can_be_forked(steps: int) -> None:
    engine = make(max_num_batched_tokens=12)
    engine.add_request("x", PROMPTS[1], greedy(6, n=2))
    for _ in range(steps):
        engine.step()
    assert engine.fork("x", index=1) == [2]
    assert run(engine)["x"] == [dense_greedy(PROMPTS[1], 6, None)] * 3


def test_only_what_is_under_way_can_be_forked() -> None:
    engine = make()
    engine.add_request("x", PROMPTS[0], greedy(3))
    with pytest.raises(RequestError, match="completion 1 of request 'x'"):
        engine.fork("x", index=1)
    run(engine)
    with pytest.raises(RequestError, match="no request 'x'"):
        engine.fork("x")


def test_the_page_map_says_who_holds_what() -> None:
    engine = make(num_pages=12, max_model_len=40)
    engine.add_request("old", PROMPTS[4], greedy(1))
    run(engine)
    engine.add_request("a", PROMPTS[0], greedy(9, n=2))
    engine.step()
    pages = engine.page_map()
    assert [p.page for p in pages] == list(range(1, 12))
    assert [p.num_tokens for p in pages if p.holders == (("a", 0), ("a", 1))] == [4, 1]
    assert sum(p.state == "cached" for p in pages) == engine.stats().pages_cached == 2
    assert sum(p.state == "held" for p in pages) == engine.stats().pages_held == 2
    assert sum(p.state == "free" for p in pages) == engine.stats().pages_free == 7


# Windows


@pytest.mark.parametrize(
    ("window", "settings"),
    [
        (1, {}),
        pytest.param(5, {"max_num_batched_tokens": 7}, marks=pytest.mark.slow),
        pytest.param(13, {"num_pages": 26, "max_num_seqs": 8}, marks=pytest.mark.slow),
    ],
)
def test_pages_that_no_window_reaches_are_given_back_and_nobody_misses_them(
    window: int, settings: dict[str, int]
) -> None:
    engine = make(window, **settings)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, greedy(30, n=2 if index == 4 else 1))
    most_held = 0
    done = {}
    while engine.has_unfinished:
        done |= {o.request_id: o.outputs[-1].token_ids for o in engine.step() if o.finished}
        held = [sum(page != 0 for page in s.pages) for shard in engine.shards for s in shard.scheduler.running]
        most_held = max(most_held, *held, 0)
    assert engine.stats().pages_held == 0
    chunk = settings.get("max_num_batched_tokens", 32)
    assert most_held <= -(-(window + chunk) // 4) + 2
    for index, prompt in enumerate(PROMPTS):
        assert done[str(index)] == dense_greedy(prompt, 30, window)


def dense_greedy(prompt: list[int], count: int, window: int | None) -> list[int]:
    model = _windowed(window)
    tokens = list(prompt)
    for _ in range(count):
        padded = np.asarray(tokens + [0] * (LENGTH - len(tokens)), np.int32)
        tokens.append(int(np.argmax(np.asarray(model(padded))[len(tokens) - 1])))
    return tokens[len(prompt) :]


@cache
def _windowed(window: int | None) -> Callable[[np.ndarray], jax.Array]:
    return jax.jit(lambda tokens: apply(PARAMS, tokens, spec(window)))


# Anything at any time


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_greedy_tokens_are_those_of_a_naive_recompute_whatever_the_schedule(seed: int) -> None:
    rng = np.random.default_rng(seed + 10)  # with a host tier, pages come back from it in each of these
    caching, has_host = seed % 4 != 3, seed % 2 == 0
    page_size = int(rng.choice([1, 2, 4] if has_host else [1, 4, 8]))
    engine = make(
        page_size=page_size,
        num_pages=1 + LENGTH // page_size + (0 if has_host else int(rng.integers(0, 48 // page_size))),
        max_num_seqs=int(rng.integers(3, 7) if has_host else rng.integers(1, 7)),
        max_num_batched_tokens=int(rng.integers(6, 40)),
        enable_prefix_caching=caching,
        host_cache_gb=int(rng.choice([12, 64])) * page_size * 256 / 2**30 if has_host else 0,
        long_prefill_token_threshold=int(rng.integers(2, 20)) if rng.random() < 0.5 else None,
        max_num_partial_prefills=1 if rng.random() < 0.3 else None,
        scheduling_policy="priority",
    )
    done: dict[str, list[list[int]]] = {}
    asked: dict[str, tuple[list[int], int]] = {}
    while len(asked) < 24 or engine.has_unfinished:
        if len(asked) < 24 and rng.random() < 0.5:
            prompt = PROMPTS[int(rng.integers(8))]
            prompt = prompt[: int(rng.integers(1, len(prompt) + 1))] + rng.integers(0, VOCAB, rng.integers(4)).tolist()
            name, count = str(len(asked)), int(rng.integers(1, 30))
            asked[name] = (prompt, count)
            n, priority = int(rng.integers(1, 4)), int(rng.integers(-1, 2))
            engine.add_request(name, prompt, greedy(count, n=n), priority=priority)
        under_way = [name for name in asked if name not in done]
        if len(asked) < 24 and under_way and rng.random() < 0.05:
            name = under_way[int(rng.integers(len(under_way)))]
            if engine.abort(name):
                done[name] = []
        elif len(asked) < 24 and under_way and rng.random() < 0.2:
            with suppress(RequestError):  # it has just finished, or completion 0 of it has
                engine.fork(under_way[int(rng.integers(len(under_way)))])
        if rng.random() < 0.03:
            engine.reset_prefix_cache()
        for output in engine.step():
            if output.finished and output.request_id not in done:
                done[output.request_id] = [c.token_ids for c in output.outputs]
    assert engine.stats().pages_held == 0
    assert (engine.stats().host_pages_moved_in > 0) == has_host
    assert sum(bool(completions) for completions in done.values()) >= 12
    for name, completions in done.items():
        prompt, count = asked[name]
        expected = dense_greedy(prompt, count, None)
        assert all(tokens == expected for tokens in completions)
