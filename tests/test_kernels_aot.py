"""The kernels compiled ahead of time for H200 and A100: no register spills, asynchronous copies, wgmma, one CUDA graph.

Skipped where the compiler's wheels are absent; `make test-aot` installs them in an environment of their own.
"""

from __future__ import annotations

import json
import re
from functools import partial

import aot
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxpaged.kernels import tiles
from jaxpaged.kernels.expert_product import expert_product
from jaxpaged.kernels.paged_attention import paged_attention, ragged_paged_attention
from jaxpaged.model.cache import cache_shapes
from jaxpaged.model.params import map_specs, quantized_as
from jaxpaged.model.sampling import SamplingInputs, sample
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Moe, Norm, Rope
from jaxpaged.model.step import StepInputs, forward

pytestmark = [
    pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing())),
    # jax 0.11 announces the end of its Triton lowering, which our range of versions has.
    pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning"),
]
INT = jnp.int32
LLAMA_FFN = Mlp(14336, "silu")
POOL_BYTES = 4096 * 16 * 2 * 8 * 128 * 2  # of a layer of the step below


@pytest.fixture(autouse=True)
def _compile_anew():
    """A program from the persistent cache leaves no PTX."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def compiled(gpu, op, dump, *, pool="bfloat16", q=None, dim=128, group=4, page_size=16, num_pages=8192, **options):
    """32 sequences of up to 4096 tokens, 8 kv heads; the q dtype is the pool's unless that is of 8 bits."""
    struct = jax.ShapeDtypeStruct
    pages = struct((num_pages, page_size, 2, 8, dim), jnp.dtype(pool))
    table, lens = struct((32, 256), INT), struct((32,), INT)
    q = jnp.dtype(pool) if pages.dtype.itemsize > 1 else jnp.bfloat16
    scales = struct(pages.shape[:-1], jnp.float32) if pages.dtype.itemsize == 1 else None
    sinks = struct((8 * group,), q) if options.pop("sinks", False) else None
    if op is paged_attention:
        args = (struct((32, 8 * group, dim), q), pages, table, lens)
    else:
        args = (struct((2048, 8 * group, dim), q), pages, table, struct((33,), INT), lens)

    def program(*args, sinks, scales):
        return op(*args, scale=dim**-0.5, sinks=sinks, scales=scales, **options)

    return aot.compile_for(gpu, lambda a, s, c: program(*a, sinks=s, scales=c), args, sinks, scales, dump=dump)


EVERYTHING = {"window": 1000, "softcap": 30.0, "sinks": True}
CASES = [
    *({"dim": dim} for dim in (64, 80, 96, 128, 256)),
    *({"group": group} for group in (1, 3, 7, 16)),
    *({"pool": pool, "dim": dim} for pool in ("float16", "float32", "int8") for dim in (128, 256)),
    EVERYTHING,
    EVERYTHING | {"dim": 256, "pool": "int8"},
]
ON_HOPPER = [{"pool": "float8_e4m3fn", "dim": dim} for dim in (128, 256)]


@pytest.mark.parametrize("op", [paged_attention, ragged_paged_attention])
@pytest.mark.parametrize(
    ("gpu", "case"), [*(("H200", c) for c in CASES + ON_HOPPER), *(("A100", c) for c in CASES)], ids=str
)
def test_default_sizes_spill_no_register_and_copy_asynchronously(gpu, case, op, tmp_path):
    program = compiled(gpu, op, tmp_path, **case)
    kernels = [k for name, k in program.kernels.items() if name != "paged_attention_merge"]
    assert len(kernels) == 1
    assert kernels[0].spilled_bytes == 0
    copies = kernels[0].instructions
    assert copies["cp.async.cg"] + copies["cp.async.ca"] + copies["cp.async.bulk.tensor"] > 0
    if gpu == "H200" and op is ragged_paged_attention and case.get("pool") != "float32":
        assert copies["wgmma.mma_async"] > 0


@pytest.mark.parametrize("op", [paged_attention, ragged_paged_attention])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("pool", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_latents_spill_no_register_and_are_copied_asynchronously(gpu, pool, heads, op, tmp_path):
    """512 numbers of a latent and 64 rotated ones a token, as of all DeepSeek's models."""
    struct = jax.ShapeDtypeStruct
    q, rows = (32, ()) if op is paged_attention else (2048, (struct((33,), INT),))
    args = struct((q, heads, 576), pool), struct((8192, 16, 1, 1, 576), pool), struct((32, 256), INT), *rows
    program = aot.compile_for(
        gpu, lambda *args: op(*args, scale=0.1, v_dim=512), *args, struct((32,), INT), dump=tmp_path
    )
    kernels = [k for name, k in program.kernels.items() if name != "paged_attention_merge"]
    assert len(kernels) == 1 and all(k.spilled_bytes == 0 for k in program.kernels.values())
    assert kernels[0].instructions["cp.async.cg"] > 0


@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_the_merge_spills_nothing(gpu, tmp_path):
    program = compiled(gpu, paged_attention, tmp_path, num_splits=4)
    assert sorted(program.kernels) == ["paged_attention_decode_split", "paged_attention_merge"]
    assert program.kernels["paged_attention_merge"].spilled_bytes == 0


BY_MOSAIC = [
    *((paged_attention, case) for case in ({}, {"group": 16}, {"page_size": 8}, EVERYTHING, {"dim": 256})),
    *((ragged_paged_attention, {"dim": dim}) for dim in (16, 64, 80, 128, 256)),
    *((ragged_paged_attention, {"group": group}) for group in (1, 7, 16)),
    *((ragged_paged_attention, {"page_size": size}) for size in (8, 48, 256)),
    (ragged_paged_attention, EVERYTHING | {"pool": "float16"}),
]
has_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11 or later")


@has_mosaic
@pytest.mark.parametrize(("op", "case"), BY_MOSAIC)
def test_mosaics_default_sizes_spill_no_register_and_use_tma_and_wgmma(op, case, tmp_path):
    (kernel,) = compiled("H200", op, tmp_path, backend="mosaic", **case).kernels.values()
    # Heads of 256 spill one register, stored once before the loop and loaded at most twice after it.
    assert kernel.spilled_bytes <= (12 if case.get("dim") == 256 else 0)
    assert kernel.instructions["cp.async.bulk.tensor"] > 0
    assert kernel.instructions["wgmma.mma_async"] > 0
    assert kernel.instructions["cp.async.cg"] + kernel.instructions["mma.sync"] == 0


@has_mosaic
def test_a_decode_step_by_mosaic_is_one_cuda_graph_too(tmp_path, monkeypatch):
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"decode": [{"backend": "mosaic"}]}))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    (tmp_path / "dump").mkdir()
    program = step_program(4, 64, 0, tmp_path / "dump")
    assert sorted(program.kernels) == ["paged_attention_decode"]
    assert program.launches["kCommandBuffer"] == 1
    assert set(program.launches) == {"kCommandBuffer", "kCustomKernel", "kCustomCall"}
    assert program.launches["kCustomCall"] == 4
    assert program.launches["kCustomKernel"] <= 4 * 13 + 12
    assert program.aliased_bytes == 4 * POOL_BYTES
    assert program.temporary_bytes < 32 * 2**20


@pytest.mark.parametrize(
    ("pool", "pages"),
    [
        ("bfloat16", {2**16: False, 2**16 + 1: True}),  # of 2**15 numbers: 2**31 of them in all, and more
        ("int8", {2**16: False, 2**17 + 1: True}),  # what lies between is refused
    ],
)
def test_large_pools_are_addressed_in_64_bits(pool, pages, tmp_path):
    """A page's id must be multiplied by its size in 64 bits."""
    wide = {}
    for num_pages in pages:
        (folder := tmp_path / str(num_pages)).mkdir()
        program = compiled("H200", paged_attention, folder, pool=pool, num_pages=num_pages, num_splits=1)
        ptx = program.kernels["paged_attention_decode"].ptx
        wide[num_pages] = re.search(r"mul\.wide\.u32\s+%rd\d+, %r\d+, (32768|65536);", ptx) is not None
    assert wide == pages


def llama_step(num_layers, num_decodes, num_chunk_tokens, pool, dim=4096, ffn=LLAMA_FFN, quantization=None):
    """A step of the real engine's function, at Llama 3 8B's shape where no other is given: the spec, its arguments."""
    struct, norm = jax.ShapeDtypeStruct, Norm("rms", 1e-5)
    block = Block(Attention(32, 8, 128, 128**-0.5, Rope(5e5, 128)), ffn, norm)
    spec = quantized_as(Decoder(128256, dim, 8192, (block,) * num_layers, norm, dim, tied_head=False), quantization)
    params = map_specs(lambda _, leaf: struct(leaf.shape, leaf.dtype or jnp.bfloat16), spec)
    cache = cache_shapes(spec, 4096, 16, pool)
    num_chunks = 4 if num_chunk_tokens else 0
    rows, tokens = num_decodes + num_chunks, num_decodes + num_chunk_tokens
    inputs = StepInputs(
        *[struct((tokens,), INT)] * 5,
        page_table=struct((rows, 256), INT),
        kv_lens=struct((rows,), INT),
        cu_q_lens=struct((num_chunks + 1,), INT),
        logit_rows=struct((rows,), INT),
    )
    return spec, (params, cache, inputs, struct((rows,), INT))


def step_program(num_layers, num_decodes, num_chunk_tokens, dump, pool="bfloat16", **shape):
    spec, args = llama_step(num_layers, num_decodes, num_chunk_tokens, pool, **shape)
    return aot.compile_for("H200", partial(forward, spec=spec), *args, dump=dump, donate=(1,))


@pytest.mark.parametrize(
    ("num_decodes", "pool", "kernels_a_layer"),
    [
        (1, "bfloat16", 20),  # of one row XLA makes matrix-vector products, in more pieces
        (4, "bfloat16", 14),
        (32, "bfloat16", 14),
        (64, "bfloat16", 13),
        (4, "int8", 16),  # 8-bit pools are written in three kernels instead of one
        (64, "fp8", 15),
    ],
)
def test_a_decode_step_is_one_cuda_graph_of_few_kernels(num_decodes, pool, kernels_a_layer, tmp_path):
    program = step_program(4, num_decodes, 0, tmp_path, pool)
    once = 12  # the embedding, the ropes, the list of work, the last norm, the head
    assert program.launches["kCommandBuffer"] == 1
    assert set(program.launches) == {"kCommandBuffer", "kCustomKernel"}
    assert program.launches["kCustomKernel"] <= 4 * kernels_a_layer + once
    # The pools are updated in place.
    assert program.aliased_bytes == 4 * (POOL_BYTES if pool == "bfloat16" else POOL_BYTES // 256 * (128 + 4))
    assert program.temporary_bytes < 32 * 2**20


@pytest.mark.parametrize("num_decodes", [4, 64])
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_weights_of_8_bits_become_floats_inside_their_products(quantization, num_decodes, tmp_path):
    """As many kernels as with floats, and no room for a matrix of them."""
    (tmp_path / "floats").mkdir()
    floats = step_program(2, num_decodes, 0, tmp_path / "floats")
    (tmp_path / "quantised").mkdir()
    quantised = step_program(2, num_decodes, 0, tmp_path / "quantised", quantization=quantization)
    assert quantised.launches == floats.launches
    assert quantised.temporary_bytes <= floats.temporary_bytes < 14336 * 4096


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_step_with_experts_of_8_bits_copies_none_of_their_weights(quantization, tmp_path):
    moe = Moe(8, 2, 14336, "silu", renormalize=True)
    program = step_program(2, 64, 0, tmp_path, dim=4096, ffn=moe, quantization=quantization)
    assert program.launches["kCommandBuffer"] == 1
    assert program.temporary_bytes < 40 * 2**20 < moe.dim * 4096 * moe.experts


@pytest.mark.parametrize("num_decodes", [4, 64])
@pytest.mark.parametrize(
    ("dim", "moe"),
    [(4096, Moe(8, 2, 14336, "silu", renormalize=True)), (2048, Moe(128, 8, 768, "silu", renormalize=True))],
    ids=["mixtral-8x7b", "qwen3-30b-a3b"],
)
def test_a_decode_step_with_experts_is_one_cuda_graph_too_and_copies_no_experts_weights(
    dim, moe, num_decodes, tmp_path
):
    program = step_program(2, num_decodes, 0, tmp_path, dim=dim, ffn=moe)
    assert program.launches["kCommandBuffer"] == 1
    assert set(program.launches) == {"kCommandBuffer", "kCustomKernel", "kCopy"}
    assert program.launches["kCustomKernel"] <= 2 * 27 + 12  # routing and sorting among them
    assert program.temporary_bytes < 40 * 2**20 < 3 * moe.dim * dim * 2 * moe.experts


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_experts_products_spill_nothing_and_load_asynchronously(gpu, dtype, rows, tmp_path):
    struct = jax.ShapeDtypeStruct
    args = struct((40, rows, 2048), dtype), struct((128, 2048, 768), dtype), struct((40,), INT), struct((), INT)
    (kernel,) = aot.compile_for(gpu, expert_product, *args, dump=tmp_path).kernels.values()
    assert kernel.spilled_bytes == 0
    assert kernel.instructions["cp.async.cg"] > 0
    if dtype == "bfloat16":
        assert kernel.instructions["mma.sync"] + kernel.instructions["wgmma.mma_async"] > 0


@pytest.mark.parametrize(("gpu", "weights"), [("H200", "int8"), ("A100", "int8"), ("H200", "float8_e4m3fn")])
def test_experts_products_of_8_bits_spill_nothing(gpu, weights, tmp_path):
    struct = jax.ShapeDtypeStruct
    args = struct((40, 64, 2048), jnp.bfloat16), struct((128, 2048, 768), weights), struct((40,), INT), struct((), INT)
    program = aot.compile_for(gpu, expert_product, *args, struct((128, 1, 768), jnp.float32), dump=tmp_path)
    (kernel,) = program.kernels.values()
    assert kernel.spilled_bytes == 0
    assert kernel.instructions["mma.sync"] + kernel.instructions["wgmma.mma_async"] > 0


def test_a_mixed_step_runs_both_kernels_and_copies_no_pool(tmp_path):
    program = step_program(2, 32, 480, tmp_path)
    assert sorted(program.kernels) == [
        "paged_attention_decode_split",
        "paged_attention_merge",
        "paged_attention_ragged",
    ]
    assert program.aliased_bytes == 2 * POOL_BYTES
    assert program.temporary_bytes < POOL_BYTES // 2


SAMPLING = [(gpu, *shape) for gpu in ("H200", "A100") for shape in ((128256, 64), (262144, 1), (32001, 3), (50257, 16))]


@pytest.mark.parametrize(("gpu", "vocab", "rows"), SAMPLING)
def test_a_token_is_drawn_in_one_kernel_that_spills_nothing_and_nothing_waits_for_the_host(gpu, vocab, rows, tmp_path):
    struct, floats = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((rows,), jnp.float32)
    whole = struct((rows,), INT)
    inputs = SamplingInputs(floats, whole, floats, floats, struct((rows, 2), jnp.uint32), whole)
    program = aot.compile_for(gpu, sample, struct((rows, vocab), jnp.float32), inputs, dump=tmp_path)
    assert sorted(program.kernels) == ["sampling_draw"]
    assert program.kernels["sampling_draw"].spilled_bytes == 0
    assert set(program.launches) <= {"kCommandBuffer", "kCustomKernel"}
    assert program.launches["kCustomKernel"] <= 12
