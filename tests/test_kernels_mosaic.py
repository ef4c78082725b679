"""The Mosaic kernels: run in Mosaic's interpreter with its race detector, lowered for CUDA, refused elsewhere.

With --device gpu they are compiled and run there, and no race is looked for.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import INTERPRET
from test_paged_attention import Options, Pool

from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention
from jaxpaged.kernels.tiles import Tiles, current_device

has_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not (INTERPRET or current_device().capability == 9.0),
    reason="needs jax 0.11 or later, and on a GPU Hopper",
)
# Rows that no query owns are multiplied like the others, and hold anything.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
SINKS = np.asarray([3.0, -2.0, 0.5, 1.0], np.float32)
EVERYTHING = Options(23, 1.5, SINKS)
PLAIN = Options()
LENS = [1, 77, 0, 128]
Q_LENS = [1, 5, 0, 30]
PADDING = 3  # rows past the last sequence


def case(heads=4, kv_heads=2, dim=64, page_size=16, dtype=jnp.bfloat16, lens=LENS, rows=4):
    """A pool with NaN wherever no sequence has a token, the null page included, and queries."""
    rng = np.random.default_rng(0)
    pool = Pool(rng, lens, page_size, kv_heads, dim, dtype=dtype)
    held = np.zeros(pool.pages.shape[:2], bool)
    for row, length in zip(pool.table, lens, strict=True):
        held[row[np.arange(length) // page_size], np.arange(length) % page_size] = True
    pool.pages[~held] = np.nan
    return pool, rng.standard_normal((rows, heads, dim)).astype(dtype)


def run(op, pool, q, *args, options, interpret, **how):
    """`op` on the pool's pages, and that its interpreter saw no race between warpgroups and copies."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    op = jax.jit(partial(op, window=options.window, softcap=options.softcap, interpret=interpret, **how))
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    got = np.asarray(op(q, pool.pages, pool.table, *args, pool.kv_lens, sinks=sinks), np.float32)
    assert not (interpret and get_races().races_found)
    return got


def expected(op, pool, q, *args, options):
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    pages = np.nan_to_num(pool.pages.astype(np.float32))
    op = jax.jit(partial(op, scale=0.1, window=options.window, softcap=options.softcap, backend="reference"))
    return np.asarray(op(q.astype(np.float32), pages, pool.table, *args, pool.kv_lens, sinks=sinks))


def check_decode(shape, block_k=64, num_stages=2, num_splits=1, options=PLAIN):
    from jaxpaged.kernels import mosaic_attention as mosaic

    pool, q = case(**shape, rows=len(shape.get("lens", LENS)))
    how = {"tiles": Tiles(1, block_k, 4, num_stages), "num_splits": num_splits, "interpret": interpreter()}
    got = run(mosaic.paged_attention, pool, q, options=options, scale=0.1, scales=None, **how)
    np.testing.assert_allclose(got, expected(paged_attention, pool, q, options=options), atol=2e-2)
    assert np.all(got[pool.kv_lens == 0] == 0)


def check_chunks(shape, block_q=16, block_k=64, num_stages=2, q_lens=Q_LENS, padding=PADDING, options=PLAIN):
    from jaxpaged.kernels import mosaic_attention as mosaic

    pool, q = case(**shape, rows=sum(q_lens) + padding)
    cu_q_lens = np.cumsum([0, *q_lens]).astype(np.int32)
    how = {"tiles": Tiles(block_q, block_k, 4, num_stages), "interpret": interpreter()}
    got = run(mosaic.ragged_paged_attention, pool, q, cu_q_lens, options=options, scale=0.1, scales=None, **how)
    want = expected(ragged_paged_attention, pool, q, cu_q_lens, options=options)
    np.testing.assert_allclose(got, want, atol=2e-2)
    assert np.all(got[sum(q_lens) :] == 0)


def interpreter():
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams(detect_races=True) if INTERPRET else False


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@has_interpreter
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({}, {"num_splits": 2, "options": EVERYTHING}),
        slow({}, {}),
        slow({"heads": 3, "kv_heads": 1, "dim": 128, "page_size": 8}, {"num_splits": 2}),
        slow({"page_size": 128, "dtype": jnp.float16}, {"num_splits": 3}),  # a page of several blocks
        slow({"page_size": 48, "dim": 256}, {"num_splits": 2, "num_stages": 1}),
        slow({"dim": 80, "page_size": 32}, {"num_stages": 3}),
        slow({"heads": 16, "kv_heads": 1, "lens": [300, 5]}, {"block_k": 128}),
        slow({"heads": 71, "kv_heads": 1, "lens": [70, 5]}, {"num_splits": 2}),  # more than one warpgroup's rows
        slow({}, {"options": Options(window=100)}),
        slow({}, {"num_splits": 3, "options": Options(sinks=SINKS)}),
    ],
    ids=str,
)
def test_decode_equals_the_reference_without_a_race(shape, how):
    check_decode(shape, **how)


@has_interpreter
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({"dim": 128, "page_size": 8}, {"block_q": 64, "num_stages": 1}),  # two warpgroups compute
        slow({}, {}),  # one
        ({"lens": [40, 77, 0, 128]}, {"q_lens": [40, 5, 0, 70], "block_q": 40, "options": EVERYTHING}),
        slow({"page_size": 256}, {"block_k": 128, "block_q": 32}),
        slow({"page_size": 48}, {"block_k": 128, "block_q": 32, "num_stages": 1}),
        slow({"lens": [20, 9]}, {"q_lens": [3, 1], "padding": 0, "block_q": 32}),  # fewer rows than a tile has
        *(slow({"dim": dim}, {"block_q": 64, "num_stages": 1}) for dim in (16, 80, 96, 256)),
        *(slow({"heads": g, "kv_heads": 1}, {"block_q": 128 // g}) for g in (1, 3, 6, 7, 8, 16, 128)),
        slow({"dtype": jnp.float16}, {"block_q": 64, "num_stages": 3, "options": Options(window=64)}),
        slow({}, {"block_q": 64, "options": Options(sinks=SINKS)}),
        slow({"lens": [300, 260]}, {"q_lens": [300, 1], "block_q": 64, "block_k": 128}),
    ],
    ids=str,
)
def test_chunks_equal_the_reference_without_a_race(shape, how):
    check_chunks(shape, **how)


@has_interpreter
@pytest.mark.parametrize("op", [slow(paged_attention), ragged_paged_attention])
def test_the_public_op_reaches_it(op):
    pool, q = case(lens=[20, 3], kv_heads=4, rows=2)
    args = [np.asarray([0, 1, 2], np.int32)] if op is ragged_paged_attention else []
    got = run(op, pool, q, *args, options=PLAIN, backend="mosaic", scale=0.1, interpret=INTERPRET)
    np.testing.assert_allclose(got, expected(op, pool, q, *args, options=PLAIN), atol=2e-2)


OPS = pytest.mark.parametrize("op", [paged_attention, ragged_paged_attention])


@has_interpreter
@OPS
@pytest.mark.parametrize(("dim", "page_size"), [(64, 16), (80, 48), (128, 8), (256, 256)])
def test_it_lowers_for_hopper(op, dim, page_size):
    assert "mosaic_gpu" in lower(op, dim=dim, page_size=page_size).as_text()


@OPS
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has it")
def test_an_older_jax_is_told_apart(op):
    with pytest.raises(ValueError, match=r"the mosaic backend needs jax 0\.11 or later, and this is 0\.10"):
        lower(op)


@OPS
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"name": "NVIDIA A100-SXM4-80GB"}, r"compute capability 9\.0; NVIDIA A100-SXM4-80GB has 8\.0.*: use triton"),
        ({"dim": 72}, "heads of a multiple of 16 up to 256; they are of 72"),
        ({"dim": 512}, "heads of a multiple of 16 up to 256; they are of 512"),
        ({"dtype": jnp.float32}, "bfloat16 or float16 q and pages"),
        ({"page_size": 12}, "a page_size that is a multiple of 8; it is 12"),
        ({"block_k": 32}, "a block_k of 64, 128, 192 or 256; it is 32"),
        ({"num_stages": 9}, r"at most 227 KB of shared memory; .* take \d+ KB"),
        ({"scale": 0.0}, r"a scale above 0; it is 0\.0"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(op, how, message):
    with pytest.raises(ValueError, match=message):
        lower(op, **how)


def test_tiles_of_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="block_q x query heads a kv head of at most 128; they are 64 x 4"):
        lower(ragged_paged_attention, block_q=64)


def lower(op, *, dim=128, name="NVIDIA H200", dtype=jnp.bfloat16, page_size=16, scale=1.0, **sizes):
    struct, ints = jax.ShapeDtypeStruct, jnp.int32
    args = [
        struct((4, 8, dim), dtype),
        struct((64, page_size, 2, 2, dim), dtype),
        struct((4, 32), ints),
        *[struct((5,), ints)] * (op is ragged_paged_attention),
        struct((4,), ints),
    ]
    gpu = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)):
        traced = jax.jit(partial(op, scale=scale, backend="mosaic", **sizes)).trace(*args)
        return traced.lower(lowering_platforms=("cuda",))
