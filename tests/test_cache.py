"""The KV cache: what is written is read back, 8-bit numbers near enough, and nothing copies a pool."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import PROMPTS, SPEC, greedy, make, run
from test_kernels_dispatch import on
from test_paged_attention import Options, exact

from jaxpaged import ConfigError, EngineConfig, SamplingParams, functional
from jaxpaged.engine import memory_budget
from jaxpaged.engine.pool_fit import PoolFit
from jaxpaged.functional import Span
from jaxpaged.kernels.paged_attention import ragged_paged_attention
from jaxpaged.model.cache import KVCache, Pool, copy_pages, init_cache, page_bytes, pool_dtype, scrub, write
from jaxpaged.model.decoder import apply
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

EIGHT_BITS = pytest.mark.parametrize("dtype", ["int8", "fp8"])
# Of a number's head's largest: half a step of 127, or of a float with 3 bits behind the point.
STEP = {"int8": 0.5 / 127, "fp8": 2**-4}


def empty(num_pages, kv_heads, head_dim, dtype, page_size=4):
    block = Block(Attention(kv_heads, kv_heads, head_dim, 1.0, None), Mlp(4, "silu"), Norm("rms", 1e-5))
    return init_cache(Decoder(4, 4, 4, (block,), None, 4, tied_head=True), num_pages, page_size, dtype).pools[0]


def values(pool):
    return np.asarray(pool.pages.astype(jnp.float32) * pool.scales[..., None])


def random_kv(rng, tokens, kv_heads, dim, dtype=np.float32):
    """Keys and values of very different sizes from head to head."""
    kv = rng.standard_normal((2, tokens, kv_heads, dim)) * 10.0 ** rng.integers(-6, 6, (2, tokens, kv_heads, 1))
    return jnp.asarray(kv[0], dtype), jnp.asarray(kv[1], dtype)


@EIGHT_BITS
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_eight_bits_hold_each_head_to_a_share_of_its_largest_number(dtype, given):
    k, v = random_kv(np.random.default_rng(0), 9, 3, 16, given)
    slots = jnp.asarray([4, 5, 6, 7, 19, 18, 8, 24, 40], jnp.int32)  # the last past the pool
    pool = jax.jit(write)(empty(7, 3, 16, dtype), k, v, slots)
    want = np.stack([k, v], 1).astype(np.float32)[:8]
    got = values(pool).reshape(-1, 2, 3, 16)
    error = np.abs(got[np.asarray(slots[:8])] - want)
    assert (error <= 1.001 * STEP[dtype] * np.abs(want).max(-1, keepdims=True)).all()
    np.testing.assert_allclose(np.abs(got).max(-1)[np.asarray(slots[:8])], np.abs(want).max(-1), rtol=1e-6)
    untouched = np.setdiff1d(np.arange(28), slots)
    assert not got[untouched].any()


@EIGHT_BITS
def test_zeros_stay_zeros_and_a_broken_token_is_read_as_nan_without_harm_to_others(dtype):
    k = jnp.zeros((3, 2, 8)).at[1, 0, 3].set(jnp.nan).at[2, 1, 0].set(jnp.inf)
    pool = write(empty(2, 2, 8, dtype), k, jnp.zeros_like(k), jnp.asarray([4, 5, 6], jnp.int32))
    got = values(pool)[1]
    assert np.isnan(got[1, 0, 0]).any() and np.isnan(got[2, 0, 1]).any()
    broken = np.zeros(got.shape, bool)
    broken[1, 0, 0] = broken[2, 0, 1] = True
    assert not got[~broken].any()


@EIGHT_BITS
def test_attention_over_written_pages_stays_near_float32(dtype):
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.standard_normal((70, 2, 64)), jnp.float32) for _ in range(2))
    q = rng.standard_normal((70, 4, 64)).astype(np.float32)
    table = jnp.asarray(rng.permutation(np.arange(1, 20))[None, :18], jnp.int32)
    place = np.arange(70)
    pool = write(empty(20, 2, 64, dtype), k, v, table[0, place // 4] * 4 + place % 4)
    lens = jnp.asarray([70], jnp.int32)
    op = jax.jit(partial(ragged_paged_attention, scale=0.125))
    got = op(q, pool.pages, table, jnp.asarray([0, 70], jnp.int32), lens, scales=pool.scales)
    error = np.abs(got - exact(q, np.asarray(k), np.asarray(v), 0.125, Options())).max()
    assert error < {"int8": 0.02, "fp8": 0.2}[dtype]  # of values around 1, whose largest are 4


def test_a_page_of_eight_bits_takes_its_numbers_and_its_scales():
    mixer = Attention(32, 8, 128, 1.0, Rope(1e4, 128))
    spec = Decoder(8, 8, 8, (Block(mixer, Mlp(8, "silu"), Norm("rms", 1e-5)),) * 32, None, 8, tied_head=True)
    assert page_bytes(spec, 16, "bfloat16") == 32 * 16 * 2 * 8 * 128 * 2
    assert page_bytes(spec, 16, "int8") == page_bytes(spec, 16, "fp8") == 32 * 16 * 2 * 8 * (128 + 4)
    for dtype in ("float16", "int8", "fp8_e4m3"):
        cache = init_cache(SPEC, 5, 4, dtype)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 5 * page_bytes(SPEC, 4, dtype)


def test_what_no_pool_can_be_of_is_refused():
    with pytest.raises(ValueError, match=r"a pool cannot be of uint8; known: float32.*int8, float8_e4m3fn, fp8"):
        init_cache(SPEC, 4, 4, "uint8")
    assert pool_dtype("fp8") == pool_dtype("fp8_e4m3") == pool_dtype(jnp.float8_e4m3fn) == jnp.float8_e4m3fn


def test_scrubbing_and_copying_take_scales_along():
    rng = np.random.default_rng(2)
    pool = Pool(jnp.asarray(rng.integers(-127, 128, (6, 4, 2, 1, 8)), jnp.int8), jnp.asarray(rng.random((6, 4, 2, 1))))
    (scrubbed,) = scrub(KVCache((pool,)), jnp.asarray([2, 9], jnp.int32)).pools
    (copied,) = copy_pages(KVCache((pool,)), jnp.asarray([1, 2], jnp.int32), jnp.asarray([2, 3], jnp.int32)).pools
    for before, zeroed, moved in zip(pool, scrubbed, copied, strict=True):
        np.testing.assert_array_equal(
            zeroed, np.where((np.arange(6) == 2).reshape(-1, *[1] * (before.ndim - 1)), 0, before)
        )
        np.testing.assert_array_equal(moved, np.asarray(before)[[0, 1, 1, 2, 4, 5]])


# Through the model and the engine


@EIGHT_BITS
def test_logits_through_eight_bit_pools_stay_near_the_dense_models(dtype):
    params = dummy_params(SPEC, seed=1)
    cache = functional.init_cache(SPEC, 16, 4, dtype)
    step = jax.jit(functional.step, static_argnames="spec", donate_argnums=1)
    _, outputs = step(params, cache, functional.pack([Span(PROMPTS[3], 0, range(1, 16))], cache), spec=SPEC)
    want = apply(params, jnp.asarray(PROMPTS[3], jnp.int32), SPEC)[-1]
    assert np.abs(outputs.logits[0] - want).max() < {"int8": 0.02, "fp8": 0.1}[dtype] * np.abs(want).max()


@pytest.fixture(scope="module")
def int8_llm():
    return make(cache_dtype="int8", max_num_seqs=2)


def test_greedy_tokens_through_int8_are_mostly_the_dense_models(int8_llm):
    got = run(int8_llm, PROMPTS, SamplingParams(temperature=0, max_tokens=12))
    same = np.asarray(got) == np.asarray([greedy(p, 12) for p in PROMPTS])
    assert same.mean() > 0.8


@pytest.mark.slow
def test_float8_pools_serve_too():
    llm = make(cache_dtype="fp8", max_num_seqs=2)
    assert len(run(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4)).token_ids) == 4
    assert llm.engine.runner.cache.pools[0].pages.dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize(
    "cut",
    [
        {"max_num_batched_tokens": 7},
        pytest.param({"num_pages": 14, "max_model_len": 48, "max_num_seqs": 4}, marks=pytest.mark.slow),
    ],
    ids=["chunked", "preempted"],
)
def test_sharing_copying_and_computing_pages_again_change_no_token(int8_llm, cut):
    """Completions fork and copy pages, prompts share prefixes, and scales go with their pages."""
    prompts = [PROMPTS[3], [*PROMPTS[3][:20], 1], PROMPTS[1], [*PROMPTS[3][:20], 1, 2]]
    params = SamplingParams(n=3, max_tokens=9, seed=7, temperature=0.7)

    def tokens(llm):
        return [[c.token_ids for c in o.outputs] for o in llm.generate(prompts, params, use_tqdm=False)]

    want = tokens(make(cache_dtype="int8", max_num_seqs=2, enable_prefix_caching=False))
    assert tokens(int8_llm) == want
    assert int8_llm.engine.stats().prefix_cache_hits > 0
    tight = make(cache_dtype="int8", **({"max_num_seqs": 2} | cut))
    assert tokens(tight) == want
    assert tight.engine.stats().num_preemptions > 0 or "num_pages" not in cut


def test_no_step_copies_an_eight_bit_pool(int8_llm):
    engine = int8_llm.engine.runner
    pool_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.cache))
    calls = [
        engine.functions.scrub(),
        engine.functions.copy_pages(),
        *(engine.functions.forward(b) for b in (engine.buckets[0], engine.buckets[-1])),
    ]
    assert all(call.memory_analysis().alias_size_in_bytes >= pool_bytes for call in calls)


def test_eight_bit_pools_hold_more_pages_in_the_same_memory(monkeypatch):
    monkeypatch.setattr(memory_budget, "_CPU_POOL_BYTES", 10_000)
    for dtype in ("bfloat16", "int8"):
        engine = make(cache_dtype=dtype, num_pages=None).engine.runner
        assert engine.cache.num_pages == 10_000 // page_bytes(SPEC, 4, dtype)


# Whether attention can read the pool


def fit(gpu, backend="auto", cache_dtype="int8", dtype=jnp.bfloat16):
    """For 32 kv heads of 128: 2 ** 17 numbers a page of 16 tokens."""
    mixer = Attention(32, 32, 128, 1.0, Rope(1e4, 128))
    spec = Decoder(8, 8, 8, (Block(mixer, Mlp(8, "silu"), Norm("rms", 1e-5)),) * 2, None, 8, tied_head=True)
    config = EngineConfig(attention_backend=backend, cache_dtype=cache_dtype)
    with on(gpu):
        made = PoolFit(spec, dtype, pool_dtype(cache_dtype), config)
        return [(n, made.most(n)) for n in (100, 2**14, 2**14 + 1, 2**15, 2**15 + 1)], made.check


def test_the_engine_takes_no_number_of_pages_that_would_be_read_at_wrong_places(caplog):
    sizes, check = fit("NVIDIA H200")
    assert sizes == [(100, 100), (2**14, 2**14), (2**14 + 1, 2**14), (2**15, 2**14), (2**15 + 1, 2**15 + 1)]
    assert "the pool gets 16384 pages, though there is memory for 16385" in caplog.text
    with on("NVIDIA H200"):
        for possible in (2**14, 2**15 + 1):
            assert check(possible) == possible
        with pytest.raises(ConfigError, match=r"num_pages is 20,000.*take at most 16,384 pages, or at least 32,769"):
            check(20_000)
    for how in ({"backend": "reference"}, {"cache_dtype": "bfloat16"}):
        assert all(got == wanted for wanted, got in fit("NVIDIA H200", **how)[0])


REFUSED = [
    ("NVIDIA A100-SXM4-80GB", "auto", "fp8", "compute capability 8.9; NVIDIA A100.* has 8.0: use int8 instead"),
    ("NVIDIA H200", "mosaic", "int8", "attention_backend is 'mosaic' and cache_dtype 'int8': the mosaic backend"),
    (
        "TPU v5e",
        "triton",
        "bfloat16",
        "'triton', which needs an NVIDIA GPU, and this is a tpu; use 'auto' or 'reference'",
    ),
]


@pytest.mark.parametrize(("gpu", "backend", "dtype", "message"), REFUSED, ids=["float8", "mosaic", "no GPU"])
def test_what_the_backend_cannot_serve_is_refused_before_the_pool_is_made(gpu, backend, dtype, message):
    with pytest.raises(ConfigError, match=message):
        fit(gpu, backend, dtype)


def test_the_engine_refuses_a_kernel_where_there_is_no_gpu():
    with pytest.raises(
        ConfigError, match="attention_backend is 'mosaic', which needs an NVIDIA GPU, and this is a cpu"
    ):
        make(attention_backend="mosaic")
