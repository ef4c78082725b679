"""The Mosaic decode kernel: run in Mosaic's interpreter with its race detector, lowered for CUDA, refused elsewhere.

With --device gpu it is compiled and run there, and no race is looked for.
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
from jaxpaged.kernels.tiles import current_device

has_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not (INTERPRET or current_device().capability == 9.0),
    reason="needs jax 0.11 or later, and on a GPU Hopper",
)
SINKS = np.asarray([3.0, -2.0, 0.5, 1.0], np.float32)
LENS = [1, 77, 0, 128]


def mosaic(pool, q, *, scale, options=Options(), **sizes):  # noqa: B008
    """The kernel, in whose interpreter there must be no race between its warpgroups and its copies."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from jaxpaged.kernels import mosaic_attention

    op = jax.jit(
        partial(
            mosaic_attention.paged_attention,
            scale=scale,
            window=options.window,
            softcap=options.softcap,
            interpret=plgpu.InterpretGPUParams(detect_races=True) if INTERPRET else None,
            **({"block_k": 64, "num_stages": 2, "num_splits": 1} | sizes),
        )
    )
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    got = np.asarray(op(q, pool.pages, pool.table, pool.kv_lens, sinks=sinks), np.float32)
    assert not (INTERPRET and get_races().races_found)
    return got


def reference(pool, q, *, scale, options=Options()):  # noqa: B008
    sinks = None if options.sinks is None else jnp.asarray(options.sinks)
    pages = pool.pages.astype(np.float32)
    options = {"window": options.window, "softcap": options.softcap, "sinks": sinks}
    op = jax.jit(partial(paged_attention, scale=scale, backend="reference", **options))
    return np.asarray(op(q.astype(np.float32), pages, pool.table, pool.kv_lens))


def case(heads=4, kv_heads=2, dim=64, page_size=16, dtype=jnp.bfloat16, lens=LENS):
    rng = np.random.default_rng(0)
    pool = Pool(rng, lens, page_size, kv_heads, dim, dtype=dtype)
    return pool, rng.standard_normal((len(lens), heads, dim)).astype(dtype)


@has_interpreter
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ({}, {}),
        ({"heads": 3, "kv_heads": 1, "dim": 128, "page_size": 8}, {"num_splits": 2}),
        ({"page_size": 128, "dtype": jnp.float16}, {"num_splits": 3}),  # a page of several blocks
        pytest.param({"dim": 128, "page_size": 32}, {"num_stages": 3}, marks=pytest.mark.slow),
        pytest.param({"heads": 16, "kv_heads": 1, "lens": [300, 5]}, {"block_k": 128}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decode_equals_the_reference_without_a_race(shape, sizes):
    pool, q = case(**shape)
    got = mosaic(pool, q, scale=0.1, **sizes)
    np.testing.assert_allclose(got, reference(pool, q, scale=0.1), atol=2e-2)
    assert np.all(got[pool.kv_lens == 0] == 0)


@has_interpreter
@pytest.mark.parametrize(
    "options",
    [
        Options(23, 1.5, SINKS),
        pytest.param(Options(window=100), marks=pytest.mark.slow),
        pytest.param(Options(sinks=SINKS), marks=pytest.mark.slow),
    ],
    ids=["all", "window", "sinks"],
)
def test_options_mean_what_they_mean_in_the_reference(options):
    pool, q = case()
    got = mosaic(pool, q, scale=0.2, options=options, num_splits=2)
    np.testing.assert_allclose(got, reference(pool, q, scale=0.2, options=options), atol=2e-2)


@has_interpreter
def test_the_public_op_reaches_it():
    pool, q = case(lens=[20, 3])
    op = jax.jit(partial(paged_attention, scale=0.1, backend="mosaic", interpret=INTERPRET))
    got = np.asarray(op(q, pool.pages, pool.table, pool.kv_lens), np.float32)
    np.testing.assert_allclose(got, reference(pool, q, scale=0.1), atol=2e-2)


@has_interpreter
@pytest.mark.parametrize(("dim", "page_size"), [(64, 16), (128, 8), (128, 256)])
def test_it_lowers_for_hopper(dim, page_size):
    text = lower(dim=dim, page_size=page_size).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has it")
def test_an_older_jax_is_told_apart():
    with pytest.raises(ValueError, match=r"the mosaic backend needs jax 0\.11 or later, and this is 0\.10"):
        lower(dim=64, name="NVIDIA H200")


@has_interpreter
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"name": "NVIDIA A100-SXM4-80GB"}, r"compute capability 9\.0; NVIDIA A100-SXM4-80GB has 8\.0: use triton"),
        ({"dim": 80}, "heads of 64 or 128; they are of 80"),
        ({"dtype": jnp.float32}, "bfloat16 or float16 q and pages"),
        ({"page_size": 48}, "a page_size that is a power of two from 8 on; it is 48"),
    ],
)
def test_what_it_cannot_do_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        lower(**how)


def test_chunks_are_refused():
    pages, q = jnp.zeros((4, 16, 2, 2, 64), jnp.bfloat16), jnp.zeros((3, 4, 64), jnp.bfloat16)
    table, cu_q_lens, lens = jnp.zeros((1, 2), jnp.int32), jnp.asarray([0, 3], jnp.int32), jnp.asarray([9], jnp.int32)
    with pytest.raises(ValueError, match="the mosaic backend has decode only"):
        ragged_paged_attention(q, pages, table, cu_q_lens, lens, scale=1.0, backend="mosaic")


def lower(*, dim=64, name="NVIDIA H200", dtype=jnp.bfloat16, page_size=16):
    struct, ints = jax.ShapeDtypeStruct, jnp.int32
    args = (
        struct((4, 8, dim), dtype),
        struct((64, page_size, 2, 2, dim), dtype),
        struct((4, 32), ints),
        struct((4,), ints),
    )
    gpu = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=gpu)):
        traced = jax.jit(partial(paged_attention, scale=1.0, backend="mosaic")).trace(*args)
        return traced.lower(lowering_platforms=("cuda",))
