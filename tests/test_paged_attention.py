"""Paged attention against plain numpy in float64, on ugly shapes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention
from jaxpaged.kernels.reference import attention


class Options(NamedTuple):
    """What an attention layer may ask for."""

    window: int | None = None
    softcap: float | None = None
    sinks: np.ndarray | None = None


def exact(q, k, v, scale, options):
    """Attention of the last len(q) of len(k) tokens, a query and a head at a time, in float64."""
    out = np.zeros(q.shape, np.float64)
    group = q.shape[1] // k.shape[1]
    for row in range(len(q)):
        position = len(k) - len(q) + row
        first = 0 if options.window is None else max(0, position - options.window + 1)
        for head in range(q.shape[1]):
            keys, values = k[first : position + 1, head // group], v[first : position + 1, head // group]
            scores = keys.astype(np.float64) @ q[row, head].astype(np.float64) * scale
            if options.softcap is not None:
                scores = options.softcap * np.tanh(scores / options.softcap)
            weights = np.exp(scores)
            total = weights.sum() + (0 if options.sinks is None else np.exp(np.float64(options.sinks[head])))
            out[row, head] = weights @ values.astype(np.float64) / total
    return out


class Pool:
    """Sequences of random keys and values scattered over the pages of a pool; unused pages hold noise."""

    def __init__(self, rng, kv_lens, page_size, kv_heads, dim, dtype=np.float32, num_pages=None, width=None):
        used = [-(-n // page_size) for n in kv_lens]
        shape = (num_pages or sum(used) + 3, page_size, 2, kv_heads, dim)
        self.pages = rng.standard_normal(shape).astype(dtype)
        # past a sequence's length its row of the table holds anything, ids that do not exist too
        self.table = rng.integers(-5, len(self.pages) + 5, (len(kv_lens), width or max(used) + 2)).astype(np.int32)
        ids = rng.permutation(np.arange(1, len(self.pages)))
        self.k, self.v = [], []
        for s, (length, count) in enumerate(zip(kv_lens, used, strict=True)):
            self.table[s, :count], ids = ids[:count], ids[count:]
            tokens = self.pages[self.table[s, :count]].reshape(-1, 2, kv_heads, dim)[:length]
            self.k.append(tokens[:, 0])
            self.v.append(tokens[:, 1])
        self.kv_lens = np.asarray(kv_lens, np.int32)


class Latents(Pool):
    """Keys of one head whose first `v_dim` numbers are their values."""

    def __init__(self, rng, kv_lens, page_size, dim, v_dim):
        super().__init__(rng, kv_lens, page_size, 1, dim)
        self.pages, self.v = self.pages[:, :, :1], [k[..., :v_dim] for k in self.k]


def ragged(pool, q, q_lens, scale, options):
    """The op under test, jitted, and the expected rows."""
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    op = jax.jit(ragged_paged_attention, static_argnames=("scale", "window", "softcap"))
    got = op(
        q,
        pool.pages,
        pool.table,
        cu,
        pool.kv_lens,
        scale=scale,
        window=options.window,
        softcap=options.softcap,
        sinks=sinks,
    )
    want = np.zeros(q.shape, np.float64)
    for s, length in enumerate(q_lens):
        rows = slice(cu[s], cu[s] + length)
        want[rows] = exact(np.asarray(q[rows], np.float32), pool.k[s], pool.v[s], scale, options)
    return np.asarray(got, np.float32), want


SHAPES = [(9, 3, 64), (4, 4, 80), (4, 1, 96), (8, 2, 128), (2, 1, 256), (1, 1, 16)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_decode_reads_each_sequence_through_its_pages(heads, kv_heads, dim):
    rng = np.random.default_rng(0)
    lens = [1, 16, 17, 0, 33, 70, 5]
    pool = Pool(rng, lens, 16, kv_heads, dim)
    q = rng.standard_normal((len(lens), heads, dim)).astype(np.float32)
    got = jax.jit(partial(paged_attention, scale=dim**-0.5))(q, pool.pages, pool.table, pool.kv_lens)
    for s, length in enumerate(lens):
        want = exact(q[s : s + 1], pool.k[s], pool.v[s], dim**-0.5, Options())[0] if length else 0.0
        np.testing.assert_allclose(got[s], want, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_chunks_see_their_own_past_only(heads, kv_heads, dim):
    rng = np.random.default_rng(1)
    kv_lens, q_lens = [20, 1, 0, 64, 37, 16], [20, 1, 0, 1, 18, 15]
    pool = Pool(rng, kv_lens, 16, kv_heads, dim)
    q = rng.standard_normal((sum(q_lens) + 9, heads, dim)).astype(np.float32)
    got, want = ragged(pool, q, q_lens, dim**-0.5, Options())
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("q_lens", [[1, 9, 0, 3, 8, 4], [17, 5, 1, 0, 40, 2]], ids=["drafts", "chunks"])
def test_chunks_of_any_mean_length_come_out_whole(q_lens):
    rng = np.random.default_rng(8)
    kv_lens = [n and n + 7 * i for i, n in enumerate(q_lens)]
    pool = Pool(rng, kv_lens, 16, 2, 16)
    for num_tokens in (sum(q_lens), 2 * sum(q_lens), 8 * sum(q_lens)):
        q = rng.standard_normal((num_tokens, 4, 16)).astype(np.float32)
        got, want = ragged(pool, q, q_lens, 0.25, Options())
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("used", [[], [30], [0, 5, 17, 31]], ids=str)
def test_rows_in_use_may_stand_anywhere_among_empty_ones(used):
    rng = np.random.default_rng(9)
    lens = [20 + s if s in used else 0 for s in range(32)]
    pool = Pool(rng, lens, 16, 2, 16)
    q = rng.standard_normal((32, 4, 16)).astype(np.float32)
    got = jax.jit(partial(paged_attention, scale=0.25))(q, pool.pages, pool.table, pool.kv_lens)
    for s, length in enumerate(lens):
        want = exact(q[s : s + 1], pool.k[s], pool.v[s], 0.25, Options())[0] if length else 0.0
        np.testing.assert_allclose(got[s], want, atol=1e-5)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
def test_any_page_size(page_size):
    rng = np.random.default_rng(2)
    pool = Pool(rng, [page_size, page_size + 1, 3, 300], page_size, 2, 32)
    q = rng.standard_normal((28, 4, 32)).astype(np.float32)
    got, want = ragged(pool, q, [1, 4, 3, 20], 0.2, Options())
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        Options(window=5),
        Options(window=1),
        Options(window=100),
        Options(softcap=2.0),
        Options(sinks=np.asarray([3.0, -2.0, 0.5, 1.0], np.float32)),
        Options(7, 1.5, np.asarray([3.0, -2.0, 0.5, 1.0], np.float32)),
    ],
    ids=["window", "window of one", "window over all", "softcap", "sinks", "all"],
)
def test_options_mean_the_same_paged_and_dense(options):
    rng = np.random.default_rng(3)
    kv_lens, q_lens = [150, 6, 90, 1], [30, 6, 1, 1]
    pool = Pool(rng, kv_lens, 16, 2, 32)
    q = rng.standard_normal((38, 4, 32)).astype(np.float32) * 2
    got, want = ragged(pool, q, q_lens, 0.3, options)
    np.testing.assert_allclose(got, want, atol=1e-5)
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    q, k, v = (jnp.asarray(x) for x in (q[:30], pool.k[0], pool.v[0]))
    dense = attention(q, k, v, scale=0.3, window=options.window, softcap=options.softcap, sinks=sinks)
    np.testing.assert_allclose(dense, want[:30], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_pools(dtype):
    rng = np.random.default_rng(4)
    pool = Pool(rng, [40, 17], 16, 2, 64, dtype=jnp.dtype(dtype))
    q = rng.standard_normal((21, 6, 64)).astype(dtype)
    got, want = ragged(pool, q, [4, 17], 0.125, Options())
    np.testing.assert_allclose(got, want, atol=2e-2)


def test_eight_bit_pool_is_multiplied_by_its_scales():
    rng = np.random.default_rng(5)
    pool = Pool(rng, [40, 17], 16, 2, 64)
    scales = (np.abs(pool.pages).max(-1) / 127).astype(np.float32)
    pages = np.round(pool.pages / scales[..., None]).astype(np.int8)
    q = rng.standard_normal((2, 4, 64)).astype(np.float32)
    op = jax.jit(partial(paged_attention, scale=0.125))
    got = op(q, pages, pool.table, pool.kv_lens, scales=scales)
    same = op(q, pages.astype(np.float32) * scales[..., None], pool.table, pool.kv_lens)
    np.testing.assert_allclose(got, same, atol=1e-6)


def test_rows_past_the_last_sequence_are_zero():
    rng = np.random.default_rng(6)
    pool = Pool(rng, [10], 16, 1, 16)
    q = rng.standard_normal((40, 1, 16)).astype(np.float32)
    got, _ = ragged(pool, q, [10], 0.25, Options())
    assert np.all(got[10:] == 0)
    assert np.all(got[:10] != 0)


@settings(deadline=None, max_examples=25)
@given(
    kv_lens=st.lists(st.integers(0, 50), min_size=5, max_size=5),
    cut=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch(kv_lens, cut, seed):
    rng = np.random.default_rng(seed)
    q_lens = [min(n, 1 + int(share * n)) for n, share in zip(kv_lens, cut, strict=True)]
    pool = Pool(rng, kv_lens, 8, 2, 16, num_pages=40, width=9)  # one shape, so that one compilation serves all
    q = rng.standard_normal((256, 4, 16)).astype(np.float32)
    got, want = ragged(pool, q, q_lens, 0.25, Options())
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_sequences_numbers_do_not_depend_on_its_batch():
    rng = np.random.default_rng(7)
    lens = [70, 3, 16, 33, 64, 65, 1, 40]
    pool = Pool(rng, lens, 16, 3, 64)
    q = rng.standard_normal((len(lens), 9, 64)).astype(np.float32)
    op = jax.jit(partial(paged_attention, scale=0.125))
    together = np.asarray(op(q, pool.pages, pool.table, pool.kv_lens))
    order = np.asarray([3, 0, 7, 5, 1, 2, 6, 4])
    shuffled = np.asarray(op(q[order], pool.pages, pool.table[order], pool.kv_lens[order]))
    assert np.array_equal(shuffled, together[order])


def test_a_broken_sequence_breaks_no_other():
    rng = np.random.default_rng(10)
    lens = [200, 90, 80, 70, 0, 60, 50, 40]
    pool = Pool(rng, lens, 16, 2, 32)
    pool.pages[pool.table[0, :13]] = np.nan  # the longest, so that others are computed where it was
    table = np.where(np.arange(pool.table.shape[1])[None] * 16 < pool.kv_lens[:, None], pool.table, 0)
    q = rng.standard_normal((len(lens), 4, 32)).astype(np.float32)
    got = jax.jit(partial(paged_attention, scale=0.2))(q, pool.pages, table, pool.kv_lens)
    assert np.all(np.isnan(got[0]))
    for s in (1, 2, 3, 5, 6, 7):
        np.testing.assert_allclose(got[s], exact(q[s : s + 1], pool.k[s], pool.v[s], 0.2, Options())[0], atol=1e-5)


def test_wrong_shapes_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    pages = jnp.zeros((4, 16, 2, 2, 32))
    table, lens = jnp.zeros((3, 2), jnp.int32), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="q has 5 heads of 32, pages 2 of 32"):
        paged_attention(jnp.zeros((3, 5, 32)), pages, table, lens, scale=1.0)
    with pytest.raises(ValueError, match="q has 2 rows but kv_lens has 3"):
        paged_attention(jnp.zeros((2, 4, 32)), pages, table, lens, scale=1.0)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; known: auto, reference, triton, mosaic"):
        paged_attention(jnp.zeros((3, 4, 32)), pages, table, lens, scale=1.0, backend="cuda")


@pytest.mark.parametrize("options", [Options(), Options(5, 1.5, np.asarray([1.0, -2.0, 0.5], np.float32))])
def test_keys_may_begin_with_their_values(options):
    rng = np.random.default_rng(0)
    kv_lens, q_lens, v_dim = [20, 1, 0, 64, 37, 16], [20, 1, 0, 1, 18, 15], 10
    pool = Latents(rng, kv_lens, 8, 16, v_dim)
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    meaning = {"scale": 0.3, "window": options.window, "softcap": options.softcap, "sinks": sinks, "v_dim": v_dim}
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    q = rng.standard_normal((cu[-1] + 9, 3, 16)).astype(np.float32)

    chunks = jax.jit(partial(ragged_paged_attention, **meaning))(q, pool.pages, pool.table, cu, pool.kv_lens)
    decoded = jax.jit(partial(paged_attention, **meaning))(q[:6], pool.pages, pool.table, pool.kv_lens)

    def wanted(rows, s):
        padded = np.pad(pool.v[s], ((0, 0), (0, 0), (0, 16 - v_dim)))  # `exact` wants one size of keys and values
        return exact(rows, pool.k[s], padded, 0.3, options)[..., :v_dim]

    want = np.zeros((len(q), 3, v_dim))
    for s, length in enumerate(q_lens):
        want[cu[s] : cu[s] + length] = wanted(q[cu[s] : cu[s] + length], s)
        np.testing.assert_allclose(decoded[s], wanted(q[s : s + 1], s)[0] if kv_lens[s] else 0.0, atol=1e-5)
    np.testing.assert_allclose(chunks, want, atol=1e-5)


def test_pages_that_do_not_hold_what_is_asked_are_refused():
    pool, q = jax.tree.map(jnp.asarray, vars(Latents(np.random.default_rng(1), [5], 4, 16, 10))), jnp.zeros((1, 2, 16))
    where = pool["pages"], pool["table"], pool["kv_lens"]
    with pytest.raises(ValueError, match=r"page_size, 2, K, D\]"):
        paged_attention(q, *where, scale=1.0)
    with pytest.raises(ValueError, match="v_dim is 17; it must be from 1 to the 16"):
        paged_attention(q, *where, scale=1.0, v_dim=17)
    with pytest.raises(ValueError, match=r"\(scales\) cannot hold keys that are values too"):
        paged_attention(q, *where, scale=1.0, v_dim=10, scales=jnp.ones((5, 4, 2, 1)))
