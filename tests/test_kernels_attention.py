"""The Triton attention kernels against the reference ops: in Pallas' interpreter or, with --device gpu, compiled."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import INTERPRET
from test_paged_attention import SHAPES, Latents, Options, Pool

from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention
from jaxpaged.kernels.tiles import heads_together

LENS = [1, 16, 17, 0, 33, 70, 5]
Q_LENS = [1, 5, 17, 0, 1, 30, 2]
KERNEL = {"backend": "triton", "interpret": INTERPRET, "block_k": 16}
REFERENCE = {"backend": "reference"}
PLAIN = Options()
SINKS = np.asarray([3.0, -2.0, 0.5, 1.0], np.float32)


# The interpreter takes a second or two to compile a case, so that part of the grid is left to `make test-slow`.
FEW_SHAPES = [s if s[2] in (64, 80, 256) else pytest.param(*s, marks=pytest.mark.slow) for s in SHAPES]


def decode(pool, q, how, scale=0.2, options=PLAIN, scales=None, pages=None):
    op = jax.jit(partial(paged_attention, scale=scale, window=options.window, softcap=options.softcap, **how))
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    pages = pool.pages if pages is None else pages
    return np.asarray(op(q, pages, pool.table, pool.kv_lens, sinks=sinks, scales=scales), np.float32)


def ragged(pool, q, q_lens, how, scale=0.2, options=PLAIN, scales=None, pages=None):
    op = jax.jit(partial(ragged_paged_attention, scale=scale, window=options.window, softcap=options.softcap, **how))
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    pages = pool.pages if pages is None else pages
    return np.asarray(op(q, pages, pool.table, cu, pool.kv_lens, sinks=sinks, scales=scales), np.float32)


def queries(rng, rows, heads, dim, dtype=np.float32):
    return rng.standard_normal((rows, heads, dim)).astype(dtype)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), FEW_SHAPES)
def test_decode_equals_the_reference(heads, kv_heads, dim, num_splits):
    rng = np.random.default_rng(0)
    pool = Pool(rng, LENS, 16, kv_heads, dim)
    q = queries(rng, len(LENS), heads, dim)
    got = decode(pool, q, KERNEL | {"num_splits": num_splits}, dim**-0.5)
    np.testing.assert_allclose(got, decode(pool, q, REFERENCE, dim**-0.5), atol=1e-5)
    assert np.all(got[LENS.index(0)] == 0)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), FEW_SHAPES)
def test_chunks_equal_the_reference(heads, kv_heads, dim):
    rng = np.random.default_rng(1)
    pool = Pool(rng, LENS, 16, kv_heads, dim)
    q = queries(rng, sum(Q_LENS) + 9, heads, dim)
    got = ragged(pool, q, Q_LENS, KERNEL | {"block_q": 8}, dim**-0.5)
    np.testing.assert_allclose(got, ragged(pool, q, Q_LENS, REFERENCE, dim**-0.5), atol=1e-5)
    assert np.all(got[sum(Q_LENS) :] == 0)


@pytest.mark.parametrize("page_size", [8, 256, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 32, 64, 128))])
def test_any_page_size_beside_any_block_of_keys(page_size):
    rng = np.random.default_rng(2)
    lens = [page_size, page_size + 1, 3, 300]
    pool = Pool(rng, lens, page_size, 2, 32)
    q = queries(rng, 4, 4, 32)
    got = decode(pool, q, KERNEL | {"block_k": 64, "num_splits": 2})
    np.testing.assert_allclose(got, decode(pool, q, REFERENCE), atol=1e-5)
    q = queries(rng, 28, 4, 32)
    got = ragged(pool, q, [1, 4, 3, 20], KERNEL | {"block_k": 64, "block_q": 16})
    np.testing.assert_allclose(got, ragged(pool, q, [1, 4, 3, 20], REFERENCE), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        Options(window=5),
        pytest.param(Options(window=1), marks=pytest.mark.slow),
        pytest.param(Options(window=100), marks=pytest.mark.slow),
        pytest.param(Options(softcap=2.0), marks=pytest.mark.slow),
        pytest.param(Options(sinks=SINKS), marks=pytest.mark.slow),
        Options(23, 1.5, SINKS),
    ],
    ids=["window", "window of one", "window over all", "softcap", "sinks", "all"],
)
def test_options_mean_what_they_mean_in_the_reference(options):
    rng = np.random.default_rng(3)
    lens, q_lens = [150, 6, 90, 0, 1], [30, 6, 1, 0, 1]
    pool = Pool(rng, lens, 16, 2, 32)
    q = queries(rng, len(lens), 4, 32) * 2
    want = decode(pool, q, REFERENCE, options=options)
    for num_splits in (1, 3):
        got = decode(pool, q, KERNEL | {"num_splits": num_splits}, options=options)
        np.testing.assert_allclose(got, want, atol=1e-5)
    q = queries(rng, 40, 4, 32) * 2
    got = ragged(pool, q, q_lens, KERNEL | {"block_q": 8}, options=options)
    np.testing.assert_allclose(got, ragged(pool, q, q_lens, REFERENCE, options=options), atol=1e-5)


@pytest.mark.parametrize(
    ("q_dtype", "pool_dtype"),
    [
        ("bfloat16", "bfloat16"),
        pytest.param("float16", "float16", marks=pytest.mark.slow),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
    ],
)
def test_half_precision_stays_near_float32(q_dtype, pool_dtype):
    rng = np.random.default_rng(4)
    pool = Pool(rng, LENS, 16, 2, 64, dtype=jnp.dtype(pool_dtype))
    exact = pool.pages.astype(np.float32)
    q = queries(rng, len(LENS), 6, 64, jnp.dtype(q_dtype))
    got = decode(pool, q, KERNEL | {"num_splits": 2}, 0.125)
    want = decode(pool, q.astype(np.float32), REFERENCE, 0.125, pages=exact)
    np.testing.assert_allclose(got, want, atol=2e-2)
    q = queries(rng, sum(Q_LENS), 6, 64, jnp.dtype(q_dtype))
    got = ragged(pool, q, Q_LENS, KERNEL, 0.125)
    np.testing.assert_allclose(
        got, ragged(pool, q.astype(np.float32), Q_LENS, REFERENCE, 0.125, pages=exact), atol=2e-2
    )


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_eight_bit_pools_are_multiplied_by_their_scales(dtype):
    rng = np.random.default_rng(5)
    pool = Pool(rng, LENS, 16, 2, 64)
    scales = (np.abs(pool.pages).max(-1) / 120).astype(np.float32)
    pages = np.round(pool.pages / scales[..., None]).astype(jnp.dtype(dtype))
    how = {"scales": jnp.asarray(scales), "pages": pages, "scale": 0.125}
    q = queries(rng, len(LENS), 4, 64)
    got = decode(pool, q, KERNEL | {"num_splits": 2}, **how)
    np.testing.assert_allclose(got, decode(pool, q, REFERENCE, **how), atol=1e-5)
    q = queries(rng, sum(Q_LENS), 4, 64)
    got = ragged(pool, q, Q_LENS, KERNEL, **how)
    np.testing.assert_allclose(got, ragged(pool, q, Q_LENS, REFERENCE, **how), atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "options"),
    [(4, Options(23, 1.5, SINKS)), pytest.param(24, PLAIN, marks=pytest.mark.slow)],
    ids=["options", "heads"],
)
def test_keys_that_hold_their_values_equal_the_reference(heads, options):
    """24 heads are two programs of 12; 40 numbers are read as 32 and 8, and 10 of 26 as 16 and 16."""
    assert heads_together(24, 1, 32, np.float32) == 12
    rng = np.random.default_rng(10)
    dim, v_dim = (40, 32) if heads == 24 else (26, 10)
    pool = Latents(rng, LENS, 16, dim, v_dim)
    q = queries(rng, len(LENS), heads, dim)
    want = decode(pool, q, REFERENCE | {"v_dim": v_dim}, options=options)
    got = decode(pool, q, KERNEL | {"v_dim": v_dim, "num_splits": 3}, options=options)
    np.testing.assert_allclose(got, want, atol=1e-5)
    q = queries(rng, sum(Q_LENS) + 9, heads, dim)
    want = ragged(pool, q, Q_LENS, REFERENCE | {"v_dim": v_dim}, options=options)
    got = ragged(pool, q, Q_LENS, KERNEL | {"v_dim": v_dim, "block_q": 8}, options=options)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_splits_change_nothing_but_rounding():
    rng = np.random.default_rng(6)
    lens = [700, 1, 0, 129, 64]
    pool = Pool(rng, lens, 16, 2, 32)
    q = queries(rng, len(lens), 4, 32)
    options = Options(sinks=SINKS)
    whole = decode(pool, q, KERNEL | {"num_splits": 1}, options=options)
    for num_splits in (2, 5, 24):  # 24 x 5 items: more than the merge takes in a turn for the long one
        parts = decode(pool, q, KERNEL | {"num_splits": num_splits}, options=options)
        np.testing.assert_allclose(parts, whole, atol=2e-6)


def test_tile_sizes_change_nothing_but_rounding():
    rng = np.random.default_rng(7)
    pool = Pool(rng, LENS, 16, 1, 32)
    q = queries(rng, sum(Q_LENS), 3, 32)
    got = [ragged(pool, q, Q_LENS, KERNEL | {"block_q": n, "block_k": k}) for n, k in [(1, 16), (5, 32), (64, 128)]]
    np.testing.assert_allclose(got[1], got[0], atol=2e-6)
    np.testing.assert_allclose(got[2], got[0], atol=2e-6)


def test_values_beyond_a_sequence_reach_no_result():
    """Not even as 0 x NaN: what a page holds past its sequence's end, and what the table holds, are never read."""
    rng = np.random.default_rng(8)
    lens = [5, 20, 0]
    pool = Pool(rng, lens, 16, 1, 32)
    q = queries(rng, 3, 2, 32)
    split = KERNEL | {"num_splits": 2}
    clean = decode(pool, q, split), ragged(pool, q, [1, 2, 0], KERNEL)
    mine = np.zeros(pool.pages.shape[:2], bool)
    for s, length in enumerate(lens):
        for t in range(length):
            mine[pool.table[s, t // 16], t % 16] = True
    pool.pages[~mine] = np.nan
    assert np.array_equal(decode(pool, q, split), clean[0])
    assert np.array_equal(ragged(pool, q, [1, 2, 0], KERNEL), clean[1])


def test_sequences_may_share_pages_and_the_null_page_is_as_good_as_any():
    rng = np.random.default_rng(9)
    pool = Pool(rng, [40, 40], 16, 1, 32)
    pool.table[1] = pool.table[0]
    pool.table[:, 1], pool.pages[0] = 0, 0.0
    q = queries(rng, 2, 2, 32)
    got = decode(pool, q, KERNEL)
    np.testing.assert_allclose(got, decode(pool, q, REFERENCE), atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(
    kv_lens=st.lists(st.integers(0, 50), min_size=5, max_size=5),
    cut=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch(kv_lens, cut, seed):
    rng = np.random.default_rng(seed)
    q_lens = [min(n, 1 + int(share * n)) for n, share in zip(kv_lens, cut, strict=True)]
    pool = Pool(rng, kv_lens, 8, 2, 16, num_pages=40, width=9)  # one shape, so that one compilation serves all
    q = queries(rng, 256, 4, 16)
    got = _ragged_kernel(q, pool.pages, pool.table, np.cumsum([0, *q_lens]).astype(np.int32), pool.kv_lens)
    np.testing.assert_allclose(got, ragged(pool, q, q_lens, REFERENCE, 0.25), atol=1e-5)
    got = _decode_kernel(q[:5], pool.pages, pool.table, pool.kv_lens)
    np.testing.assert_allclose(got, decode(pool, q[:5], REFERENCE, 0.25), atol=1e-5)


_ragged_kernel = jax.jit(partial(ragged_paged_attention, scale=0.25, block_q=8, **KERNEL))
_decode_kernel = jax.jit(partial(paged_attention, scale=0.25, num_splits=2, **KERNEL))
