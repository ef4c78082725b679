"""Sequences and pages split over a data axis: the same tokens, own pages, no word between shards, even queues."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from everything import everything
from hlo import groups, moved
from jax.sharding import Mesh
from real_model import smollm2_gguf
from test_sharding import ENGINE, MODELS, PROMPTS, llama, tokens_of, weights

from jaxpaged import LLM, EngineConfig, SamplingParams, ShardingRules
from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Sequence
from jaxpaged.engine.scheduler import Scheduler
from jaxpaged.engine.shards import Shards
from jaxpaged.errors import ConfigError, QueueFullError, RequestError
from jaxpaged.model.params import flatten
from jaxpaged.model.sharding import Placement, parallel
from jaxpaged.server.async_engine import AsyncEngine, Inbox, NewRequest

GREEDY = SamplingParams(temperature=0, max_tokens=6)
SPEC = replace(llama(), blocks=llama().blocks[:1])
SHAPES = [(2, 1), (8, 1), (2, 4)]  # data, tensor


def engine_of(data: int, tensor: int = 1, **settings) -> LLM:
    return LLM((SPEC, weights(SPEC)), data_parallel_size=data, tensor_parallel_size=tensor, **(ENGINE | settings))


@cache
def tokens_of_one(name: str) -> list[list[int]]:
    return tokens_of(LLM((MODELS[name], weights(MODELS[name])), **ENGINE))


@pytest.mark.parametrize(
    ("name", "data", "tensor"),
    [("llama", 2, 4)]
    + [
        pytest.param(name, *sizes, marks=(pytest.mark.slow, *([pytest.mark.long] if sizes[1] == 1 else [])))
        for name in ("llama", "gpt2", "gemma")
        for sizes in SHAPES
        if (name, *sizes) != ("llama", 2, 4)
    ],
)
def test_data_shards_give_the_tokens_of_one_device(name, data, tensor):
    spec = MODELS[name]
    params = weights(spec)
    cut = LLM((spec, params), data_parallel_size=data, tensor_parallel_size=tensor, **ENGINE)
    assert tokens_of(cut) == tokens_of_one(name)
    served = [shard.scheduler.num_arrivals for shard in cut.engine.shards]
    assert sorted(served, reverse=True) == ([2, 1] if data == 2 else [1, 1, 1, 0, 0, 0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(2, 4), pytest.param(8, 1, marks=pytest.mark.long)])
def test_smollm2_answers_the_same_from_data_shards(data, tensor):
    assert answers(data, tensor) == answers(1, 1)


@cache
def answers(data: int, tensor: int) -> list[list[int]]:
    """SmolLM2's."""
    sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor, "max_model_len": 128, "num_pages": 64}
    llm = LLM(smollm2_gguf(), max_num_seqs=4, warmup=False, **sizes)
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs]


@pytest.mark.slow
def test_all_that_a_step_can_do_is_done_for_every_shard():
    (tokens, one), (cut_tokens, cut) = (everything(engine_of(n, n, num_pages=24)) for n in (1, 2))
    assert cut_tokens == tokens
    for a, b in zip(one, cut, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seats", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_pool_too_small_for_all_serves_all_on_every_shard(seats):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 64, n).tolist() for n in rng.integers(1, 50, 8 * seats)]
    params = [SamplingParams(temperature=float(i % 2), seed=i, max_tokens=20) for i in range(len(prompts))]
    said = []
    for data in (1, 2):
        llm = engine_of(data, num_pages=24, max_num_seqs=seats)
        said.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
    assert said[0] == said[1]
    assert llm.engine.stats().num_preemptions > 0 or seats == 1
    assert llm.engine.stats().pages_held == 0


def test_each_device_holds_its_shards_pages_and_all_shards_have_the_weights():
    engine = engine_of(2, 4).engine
    for leaf in jax.tree.leaves(engine.runner.cache):
        assert leaf.shape[0] == 2 * ENGINE["num_pages"]
        for shard in leaf.addressable_shards:
            assert shard.data.shape == (ENGINE["num_pages"], *leaf.shape[1:3], leaf.shape[3] // 4, leaf.shape[4])
        assert {shard.index[0].start for shard in leaf.addressable_shards} == {0, ENGINE["num_pages"]}
    for path, leaf in flatten(engine.params):
        parts = 1 if "norm" in path else 4
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // parts}, path
    assert engine.stats().pages_total == 2 * (ENGINE["num_pages"] - 1)


def test_no_compiled_function_lets_shards_talk_and_a_step_moves_neither_weights_nor_pages():
    runner = engine_of(2, 2, max_num_seqs=2, max_num_batched_tokens=8).engine.runner
    bucket, of = runner.buckets[-1], runner.functions
    step = of.forward(bucket)
    compiled = [step, of.prompt_logprobs(bucket.num_tokens), of.copy_pages(), of.scrub()]
    compiled += [function(bucket.num_rows) for function in (of.sample, of.logprobs, of.edit, of.restrict)]
    for function in compiled:
        together = groups(function.as_text())
        assert bool(together) == bool(moved(function.as_text()))
        assert all({0, 1} >= set(group) or {2, 3} >= set(group) for group in together)
    assert groups(of.sample(bucket.num_rows).as_text())
    sums = moved(step.as_text())
    assert {array.kind for array in sums} == {"all-reduce"}
    assert sums.total() == 2 * len(SPEC.blocks) + 1
    pools = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.cache))
    assert step.memory_analysis().alias_size_in_bytes >= pools / 4


def test_a_request_comes_back_to_the_shard_that_has_its_prefix():
    llm = engine_of(2)
    talks = [list(range(start, start + 24)) for start in (0, 30)]
    first = llm.generate(talks, GREEDY, use_tqdm=False)
    for turn in (1, 0, 1):
        before = [shard.scheduler.num_arrivals for shard in llm.engine.shards]
        asked = talks[turn] + list(first[turn].outputs[0].token_ids) + [1, 2, 3]
        (again,) = llm.generate([asked], GREEDY, use_tqdm=False)
        after = [shard.scheduler.num_arrivals for shard in llm.engine.shards]
        assert again.num_cached_tokens >= 24
        assert [a - b for a, b in zip(after, before, strict=True)] == [1 - turn, turn]


def shards_of(count: int, num_pages: int = 500) -> Shards:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "max_num_chunks": 4, "max_pages": 64}
    return Shards([Scheduler(PagePool(num_pages, 4), **limits) for _ in range(count)])


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence("a", 0, SamplingParams(), len(token_ids), token_ids, 5, (0, 0))


def test_requests_of_any_length_are_spread_evenly():
    rng = np.random.default_rng(2)
    shards = shards_of(4)
    lengths = rng.integers(1, 120, 200)
    queued = [0] * 4
    for length in lengths:
        queued[shards.add(sequence(rng.integers(0, 50_000, length).tolist())).index] += length
    assert max(queued) - min(queued) <= 120
    shards.schedule()  # what runs counts as what waits did
    least = min(shards, key=lambda s: s.pool.num_held * 4 + sum(w.num_tokens for w in s.scheduler.waiting))
    assert shards.add(sequence([1])) is least
    (emptied,) = [shard for shard in shards if shard.index == 2]
    for one in (*emptied.scheduler.running, *emptied.scheduler.waiting):
        emptied.scheduler.finish(one, "abort")
    shards.schedule()
    assert [shards.add(sequence(rng.integers(0, 50_000, 40).tolist())).index for _ in range(3)] == [2, 2, 2]


def test_a_beginning_that_all_share_does_not_draw_all_to_one_shard():
    shards = shards_of(2)
    system = list(range(64))
    placed = []
    for number in range(40):
        added = sequence([*system, *range(100 + number, 110 + number)])
        placed.append(shards.add(added).index)
        shards.schedule()
        if number % 4 == 3:
            for shard in shards:
                for running in list(shard.scheduler.running):
                    shard.scheduler.finish(running, "stop")
    assert 12 <= placed.count(0) <= 28
    assert shards.sum(lambda shard: shard.scheduler.prefix_cache_hits) >= 64 * 36


def test_pages_are_told_apart_over_all_shards_and_go_back_when_requests_are_aborted():
    llm = engine_of(2)
    for index in range(6):
        llm.engine.add_request(str(index), PROMPTS[index % 3], SamplingParams(max_tokens=20))
    for _ in range(3):
        llm.engine.step()
    pages = llm.engine.page_map()
    assert [info.page for info in pages] == [*range(1, 48), *range(49, 96)]
    cache = np.asarray(llm.engine.runner.cache.pools[0].pages)
    held = {info.page for info in pages if info.holders}
    assert {page for page in range(96) if cache[page].any()} == held
    assert {page // 48 for page in held} == {0, 1}
    for index in range(6):
        assert llm.engine.abort(str(index))
    while llm.engine.has_unfinished:
        llm.engine.step()
    stats = llm.engine.stats()
    assert (stats.pages_held, stats.pages_leaked) == (0, 0)
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_a_broken_page_is_scrubbed_on_its_own_shard():
    runner = engine_of(2).engine.runner
    runner.cache = jax.tree.map(lambda leaf: jax.device_put(leaf + 1, leaf.sharding), runner.cache)
    runner.scrub([3], shard=1)
    pages = np.asarray(runner.cache.pools[0].pages)
    assert [page for page in range(96) if not pages[page].all()] == [48 + 3]


def test_an_engine_of_shards_sleeps_and_takes_other_weights():
    llm = engine_of(2)
    before = tokens_of(llm)
    llm.engine.update_params(jax.tree.map(lambda w: w * 0.5, weights(SPEC)), policy="recompute")
    assert tokens_of(llm) != before
    assert all(shard.pool.num_cached > 0 for shard in llm.engine.shards)
    llm.engine.sleep(2)
    llm.engine.wake_up(weights(SPEC))
    assert tokens_of(llm) == before
    llm.reset_prefix_cache()
    assert llm.engine.stats().pages_cached == 0


def test_the_queue_is_bounded_over_all_shards_together():
    llm = engine_of(2, max_num_queued_requests=3)
    for index in range(3):
        llm.engine.add_request(str(index), [1, 2], GREEDY)
    assert [len(shard.scheduler.waiting) for shard in llm.engine.shards] == [2, 1]
    with pytest.raises(QueueFullError, match="3 requests wait"):
        llm.engine.add_request("3", [1, 2], GREEDY)


def test_a_server_counts_the_seats_and_pages_of_all_shards():
    async def run() -> None:
        async with AsyncEngine(engine_of(2, max_num_seqs=1).engine, max_num_queued_requests=1) as engine:
            assert engine.describe() == "up to 2 sequences of up to 96 tokens, 94 pages of 4 tokens, over 2 data shards"
            inbox = Inbox()
            asked = [NewRequest(str(i), [1, 2], SamplingParams(max_tokens=40), "final") for i in range(4)]
            with pytest.raises(RequestError, match="4 prompts came at once but 3 may run and wait"):
                await engine.submit(asked, inbox)
            await engine.submit(asked[:3], inbox)
            with pytest.raises(QueueFullError):
                await engine.submit(asked[3:], inbox)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "names", "rules"),
    [
        ((4,), ("rows",), ShardingRules.on(None, data="rows")),
        ((2, 2, 2), ("copies", "cut", "rows"), ShardingRules.on("cut", data="rows")),
    ],
    ids=["data alone", "with copies"],
)
def test_the_callers_mesh_may_have_data_on_any_axis(shape, names, rules):
    spec = MODELS["gemma"]
    mesh = Mesh(np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape), names)
    llm = LLM((spec, weights(spec)), mesh=mesh, sharding_rules=rules, **ENGINE)
    assert len(llm.engine.shards) == mesh.shape["rows"]
    assert tokens_of(llm) == tokens_of_one("gemma")


MESH = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
REFUSED = [
    (lambda: parallel(4, 4), "tensor_parallel_size is 4 and data_parallel_size 4, 16 .* JAX sees 8 .* at most 2"),
    (lambda: Placement(MESH, ShardingRules(data="model")), "cut data and heads, kv_heads, ffn, vocab along .*'model'"),
    (lambda: Placement(MESH, ShardingRules(data="rows")), "cut data along mesh axis 'rows', but the mesh has 'data'"),
    (lambda: EngineConfig(data_parallel_size=0), "data_parallel_size is 0"),
    (lambda: engine_of(2, host_cache_gb=2**-14), "host_cache_gb is .* with 2 data shards"),
    (lambda: LLM((SPEC, {}), mesh=MESH, data_parallel_size=2), "data_parallel_size is 2; leave one of them out"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_does_not_go_with_data_shards_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
