"""Which backend and which sizes are taken where, what is refused, and that the kernels are valid for CUDA."""

from __future__ import annotations

import contextlib
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from jaxpaged.kernels import tiles
from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention
from jaxpaged.kernels.tiles import Device, Tiles, backend_for, splits_for, tiles_for

# jax 0.11 announces the end of its Triton lowering, which our range of versions has.
pytestmark = pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")

H200 = Device("gpu", "NVIDIA H200", 9.0, 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", 8.0, 108)
INT = jnp.int32


@contextlib.contextmanager
def on(name):
    """As if traced for this device."""
    platform = "gpu" if "NVIDIA" in name else "tpu"
    device = jax.sharding.AbstractDevice(device_kind=name, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        yield


def shapes(op, *, heads=8, kv_heads=2, dim=128, dtype=jnp.bfloat16, pool=None, pages=64, rows=8):
    """The arguments of an op for 4 sequences."""
    struct = jax.ShapeDtypeStruct
    pool = struct((pages, 16, 2, kv_heads, dim), pool or dtype)
    table, lens = struct((4, 32), INT), struct((4,), INT)
    if op is paged_attention:
        return struct((4, heads, dim), dtype), pool, table, lens
    return struct((rows, heads, dim), dtype), pool, table, struct((5,), INT), lens


OPS = pytest.mark.parametrize("op", [paged_attention, ragged_paged_attention])


@OPS
def test_auto_is_the_kernel_on_nvidia_gpus_and_the_reference_elsewhere(op):
    # Traced anew each time: jax keeps a function's trace, whatever device it was made for.
    here = str(jax.make_jaxpr(partial(op, scale=1.0))(*shapes(op)))
    with on("NVIDIA H200"):
        there = str(jax.make_jaxpr(partial(op, scale=1.0))(*shapes(op)))
    with on("TPU v5e"):
        on_tpu = str(jax.make_jaxpr(partial(op, scale=1.0))(*shapes(op)))
    assert "pallas_call" in there
    assert "pallas_call" not in here + on_tpu


@OPS
@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dim": 80, "heads": 6},
        {"dim": 256, "dtype": jnp.float16},
        {"dtype": jnp.float32},
        {"pool": jnp.int8},
        {"pages": 2**20 + 1},  # over 4 GiB and 2**31 numbers
    ],
    ids=["plain", "padded", "wide", "float32", "int8", "large"],
)
def test_the_kernels_lower_for_cuda(op, gpu, how):
    args = shapes(op, **how)
    kwargs = {"scales": jax.ShapeDtypeStruct(args[1].shape[:-1], jnp.float32)} if how.get("pool") else {}
    kwargs["sinks"] = jax.ShapeDtypeStruct(args[0].shape[1:2], jnp.bfloat16)
    with on(gpu):
        traced = jax.jit(partial(op, scale=1.0, window=100, softcap=30.0)).trace(*args, **kwargs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize("dtype", ["float8_e5m2", "int32"])
def test_pools_that_the_kernel_cannot_read_are_refused(dtype):
    with pytest.raises(ValueError, match=f"reads pools of bfloat16.*this one is {dtype}"):
        trace(paged_attention, pool=jnp.dtype(dtype), backend="triton")


def test_float8_is_refused_where_the_compiler_would_die_of_it():
    with on("NVIDIA A100-SXM4-80GB"), pytest.raises(ValueError, match=r"capability 8\.9.*has 8\.0: use int8"):
        trace(paged_attention, pool=jnp.float8_e4m3fn)
    with on("NVIDIA H200"):
        trace(paged_attention, pool=jnp.float8_e4m3fn)


@OPS
def test_pools_that_would_be_read_at_wrong_places_are_refused(op):
    per_page = 16 * 2 * 2 * 128
    first, last = 2**31 // per_page, 2**32 // per_page
    for pages in (first + 1, last):
        with pytest.raises(ValueError, match="between 2,147,483,648 and 4,294,967,296 would be read at wrong places"):
            trace(op, pool=jnp.int8, pages=pages, backend="triton")
    for pages in (first, last + 1):
        trace(op, pool=jnp.int8, pages=pages, backend="triton")
        trace(op, pages=pages, backend="triton")  # two bytes a number: fine at any size


@OPS
@pytest.mark.parametrize("how", [{"backend": "reference"}, {"backend": "triton", "interpret": True}], ids=str)
def test_asking_for_a_gradient_says_what_to_differentiate_instead(op, how):
    args = [jnp.zeros(a.shape, a.dtype) for a in shapes(op, dtype=jnp.float32, dim=16)]
    op = partial(op, scale=1.0, **how)
    for place in (0, 1):
        with pytest.raises(NotImplementedError, match=r"no gradient.*differentiate dense attention instead"):
            jax.grad(lambda x, place=place: op(*args[:place], x, *args[place + 1 :]).sum())(args[place])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_k": 48}, "block_k is 48; it must be a power of two"),
        ({"block_k": 8}, "block_k is 8; it must be a power of two and at least 16"),
        ({"num_splits": 0}, "num_splits is 0; it must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        trace(paged_attention, backend="triton", **sizes)


@OPS
@pytest.mark.parametrize(("dtype", "programs"), [("bfloat16", 4), ("float32", 8)])
def test_128_heads_that_share_a_latent_are_several_programs_which_lower_for_nvidia(op, dtype, programs):
    struct = jax.ShapeDtypeStruct
    rows = [struct((3,), jnp.int32)] if op is paged_attention else [struct((4,), jnp.int32), struct((3,), jnp.int32)]
    args = struct((3, 128, 576), dtype), struct((9, 16, 1, 1, 576), dtype), struct((3, 2), jnp.int32), *rows
    with on("NVIDIA H200"):
        traced = jax.jit(partial(op, scale=1.0, v_dim=512)).trace(*args)
        assert "gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
        with pytest.raises(ValueError, match=r"needs .*keys and values apart, without v_dim.*: use triton instead"):
            jax.eval_shape(partial(op, scale=1.0, v_dim=512, backend="mosaic"), *args)
    assert 128 // tiles.heads_together(128, 1, 512, dtype) == programs


def test_keys_are_split_until_the_device_is_full():
    splits = partial(splits_for, H200, kv_heads=8, max_keys=8192, block_k=64)
    assert [splits(num_seqs=n) for n in (1, 8, 32, 33, 256)] == [33, 5, 2, 1, 1]
    assert splits_for(H200, num_seqs=1, kv_heads=8, max_keys=300, block_k=64) == 2  # of 128 keys or more
    assert splits_for(H200, num_seqs=1, kv_heads=8, max_keys=16, block_k=64) == 1


def test_measured_sizes_replace_the_rule_and_given_ones_replace_both(tmp_path, monkeypatch):
    rows = [{"group": 4, "pool": "bfloat16", "block_k": 128}, {"head_dim": 64, "num_warps": 2}]
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"decode": rows}))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    choose = partial(tiles_for, "decode", H200, pool=jnp.bfloat16)
    rule = tiles_for("decode", A100, pool=jnp.bfloat16, group=4, head_dim=128)
    assert choose(group=4, head_dim=128) == rule._replace(block_k=128)
    assert choose(group=1, head_dim=64) == rule._replace(num_warps=2)
    assert choose(group=1, head_dim=96) == rule
    assert choose(group=4, head_dim=128, block_k=32, num_stages=None) == rule._replace(block_k=32)


@OPS
@pytest.mark.parametrize(
    ("how", "taken"),
    [
        ({}, "mosaic_gpu"),
        ({"dim": 64}, "gpu.triton"),  # the row is of another head size
        ({"pool": jnp.int8}, "gpu.triton"),  # fits the row, and mosaic cannot
        ({"backend": "triton"}, "gpu.triton"),
    ],
    ids=str,
)
def test_auto_takes_the_backend_that_was_measured_where_it_can(op, how, taken, tmp_path, monkeypatch):
    row = {"head_dim": 128, "backend": "mosaic", "block_k": 64}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"decode": [row], "ragged": [row]}))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    shape = {name: value for name, value in how.items() if name != "backend"}
    with on("NVIDIA H200"):
        traced = jax.jit(partial(op, scale=1.0, backend=how.get("backend", "auto"))).trace(*shapes(op, **shape))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    if jax.__version_info__ < (0, 11):
        taken = "gpu.triton"
    assert [name for name in ("gpu.triton", "mosaic_gpu") if name in text] == [taken]


def test_a_row_gives_sizes_to_its_own_backend_only(tmp_path, monkeypatch):
    rows = [{"backend": "mosaic", "block_k": 64}, {"block_k": 16}]
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"decode": rows}))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    facts = {"group": 4, "head_dim": 128, "pool": jnp.bfloat16}
    assert backend_for("decode", H200, **facts) == "mosaic"
    assert tiles_for("decode", H200, **facts, backend="mosaic").block_k == 64
    assert tiles_for("decode", H200, **facts).block_k == 16
    assert backend_for("ragged", H200, **facts) is None


def test_mosaics_rule_fills_tiles_and_fits_in_shared_memory():
    for group, dim in itertools.product((1, 2, 3, 4, 6, 7, 8, 16, 64, 71), (64, 80, 96, 128, 192, 256)):
        if group > 64 and dim > 128:
            continue  # 128 rows of wide heads: refused
        for op in ("decode", "ragged"):
            sizes = tiles_for(op, H200, group=group, head_dim=dim, pool=jnp.bfloat16, backend="mosaic")
            assert tiles.mosaic_shared_bytes(op, group, dim, sizes) <= tiles.SHARED
            assert sizes.block_q == 1 or (64 if dim <= 128 else 32) < sizes.block_q * group <= 128


def test_tuned_files_with_unknown_words_are_refused(tmp_path, monkeypatch):
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"decode": [{"heads": 4}]}))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    with pytest.raises(ValueError, match=r"nvidia-h200.json: unknown heads; known: group, head_dim"):
        tiles_for("decode", H200, pool=jnp.bfloat16, group=4, head_dim=128)


def test_tuned_files_with_unknown_backends_are_refused(tmp_path, monkeypatch):
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"decode": [{"backend": "cuda"}]}))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    with pytest.raises(ValueError, match=r"nvidia-h200.json: unknown backend 'cuda'; known: triton, mosaic"):
        tiles_for("decode", H200, pool=jnp.bfloat16, group=4, head_dim=128)


def test_a_prompts_tile_has_the_rows_that_wgmma_takes():
    for group in (1, 3, 4, 7, 8, 32):
        sizes = tiles_for("ragged", H200, group=group, head_dim=128, pool=jnp.bfloat16)
        assert isinstance(sizes, Tiles)
        assert 64 < sizes.block_q * group <= 128
        assert sizes.num_warps == 8


def test_an_unknown_gpu_counts_as_the_smallest_known_one():
    with on("NVIDIA Something"):
        assert tiles.current_device() == Device("gpu", "NVIDIA Something", 8.0, 108)
    with on("NVIDIA H100 80GB HBM3"):
        assert tiles.current_device()[2:] == (9.0, 132)
    assert tiles.current_device().platform == "cpu"


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def trace(op, *, backend="auto", pool=None, pages=64, **sizes):
    return jax.eval_shape(partial(op, scale=1.0, backend=backend, **sizes), *shapes(op, pool=pool, pages=pages))
