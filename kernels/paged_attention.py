"""Paged attention: softmax attention whose keys and values lie in pages, found through a page table.

These two functions are the public ops, useful without the engine. `pages` is one layer's pool,
`[P, page_size, 2, K, D]` with keys at index 0 and values at index 1; `page_table[s]` lists the pages of sequence s in
order. The tokens of a sequence, new ones included, have been written to their pages before the call. With `v_dim` pages
are `[P, page_size, 1, K, D]`: a key's first `v_dim` numbers are its value (multi-head latent attention, absorbed).

Every sequence is causal within itself. `scale` multiplies q.k, `softcap` bounds the scores as softcap * tanh(x /
softcap), `window` counts the keys that a query sees with itself among them, `sinks` [H] adds one logit per head to the
softmax's denominator, `scales` [P, page_size, 2, K] multiplies K and V of an 8-bit pool. A sequence with kv_lens 0 and
rows of q past the last sequence give zeros; page-table entries past a sequence's length may hold anything.

Backends: "reference" is plain jnp and runs everywhere; "triton" is a Pallas kernel for NVIDIA GPUs from A100 on;
"mosaic" is one for Hopper; "auto" is triton on NVIDIA GPUs, or mosaic where it was measured to be faster (tiles.py) and
can do what is asked, and the reference elsewhere. All are forward only. The sizes (block_q tokens, block_k keys,
num_splits, num_warps, num_stages) cut the kernel's work and change nothing but rounding and speed; left out, they are
chosen by device and shape (tiles.py). `interpret` runs the kernel without a GPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.kernels import reference
from jaxpaged.kernels.forward_only import forward_only
from jaxpaged.kernels.tiles import (
    SHARED,
    Device,
    Op,
    Tiles,
    backend_for,
    current_device,
    heads_together,
    mosaic_shared_bytes,
    splits_for,
    tiles_for,
)

Backend = Literal["auto", "reference", "triton", "mosaic"]
_BACKENDS = ("auto", "reference", "triton", "mosaic")
LARGEST_8_BIT_POOL = 2**31  # bytes of a layer's pages; those of more than twice as many are readable again
_POOL_DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")


def paged_attention(
    q: Float[Array, "S H D"],
    pages: Array,
    page_table: Int[Array, "S max_pages"],
    kv_lens: Int[Array, " S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    scales: Float[Array, "P page_size 2 K"] | None = None,
    v_dim: int | None = None,
    backend: Backend = "auto",
    interpret: bool = False,
    block_k: int | None = None,
    num_splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Float[Array, "S H V"]:
    """Decode: row s of q is the newest of sequence s's kv_lens[s] tokens.

    `num_splits` is into how many parts sequences are cut on average, the long ones into more. Raises ValueError on
    wrong shapes, and on a pool that the backend cannot read on this device.
    """
    _check(q, pages, page_table, kv_lens, scales, v_dim)
    if q.shape[0] != kv_lens.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but kv_lens has {kv_lens.shape[0]}; decode takes one query each")
    device = current_device()
    if _choose(backend, device, interpret) == "reference":
        op: _Function = partial(reference.paged_attention, scale=scale, window=window, softcap=softcap, v_dim=v_dim)
        return _forward_only(op, q, pages, page_table, kv_lens, sinks=sinks, scales=scales)
    given = {"block_k": block_k, "num_warps": num_warps, "num_stages": num_stages}
    kernels, sizes = _kernels("decode", q, pages, scales, scale, v_dim, backend, device, interpret, **given)
    if num_splits is None:
        parts = q.shape[1] // heads_together(q.shape[1], pages.shape[3], v_dim, pages.dtype)
        num_splits = _splits(pages, parts, page_table, device, window, sizes.block_k)
    if num_splits < 1:
        raise ValueError(f"num_splits is {num_splits}; it must be at least 1")
    op = partial(
        kernels.paged_attention,
        scale=scale,
        window=window,
        softcap=softcap,
        tiles=sizes,
        num_splits=num_splits,
        interpret=interpret,
        **({} if v_dim is None else {"v_dim": v_dim}),
    )
    return _forward_only(op, q, pages, page_table, kv_lens, sinks=sinks, scales=scales)


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    pages: Array,
    page_table: Int[Array, "S max_pages"],
    cu_q_lens: Int[Array, " S+1"],
    kv_lens: Int[Array, " S"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    scales: Float[Array, "P page_size 2 K"] | None = None,
    v_dim: int | None = None,
    backend: Backend = "auto",
    interpret: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Float[Array, "T H V"]:
    """Any mix of prompt chunks and single tokens: rows cu_q_lens[s]:cu_q_lens[s + 1] of q are the newest of kv_lens[s].

    Raises ValueError on wrong shapes, and on a pool that the backend cannot read on this device.
    """
    _check(q, pages, page_table, kv_lens, scales, v_dim)
    if cu_q_lens.shape[0] != kv_lens.shape[0] + 1:
        raise ValueError(f"cu_q_lens has {cu_q_lens.shape[0]} entries; {kv_lens.shape[0]} sequences need one more")
    device = current_device()
    if _choose(backend, device, interpret) == "reference":
        meaning: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "v_dim": v_dim}
        op: _Function = partial(reference.ragged_paged_attention, **meaning)
        return _forward_only(op, q, pages, page_table, cu_q_lens, kv_lens, sinks=sinks, scales=scales)
    given = {"block_q": block_q, "block_k": block_k, "num_warps": num_warps, "num_stages": num_stages}
    kernels, sizes = _kernels("ragged", q, pages, scales, scale, v_dim, backend, device, interpret, **given)
    op = partial(
        kernels.ragged_paged_attention,
        scale=scale,
        window=window,
        softcap=softcap,
        tiles=sizes,
        interpret=interpret,
        **({} if v_dim is None else {"v_dim": v_dim}),
    )
    return _forward_only(op, q, pages, page_table, cu_q_lens, kv_lens, sinks=sinks, scales=scales)


_Function = Callable[..., Array]


def _forward_only(op: _Function, *args: Array, **kwargs: Array | None) -> Array:
    result: Array = forward_only(
        op,
        "paged attention has no gradient, for pages are written in place; "
        "differentiate dense attention instead: jaxpaged.kernels.reference.attention, jaxpaged.model.decoder.apply",
    )(*args, **kwargs)
    return result


def _choose(backend: str, device: Device, interpret: bool) -> str:
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    if backend != "auto":
        return backend
    return "triton" if interpret or (device.platform == "gpu" and "NVIDIA" in device.name) else "reference"


def _check(q: Array, pages: Array, page_table: Array, kv_lens: Array, scales: Array | None, v_dim: int | None) -> None:
    sides = 2 if v_dim is None else 1
    if q.ndim != 3 or pages.ndim != 5 or pages.shape[2] != sides:
        raise ValueError(
            f"q must be [T, H, D] and pages [P, page_size, {sides}, K, D]; got {q.shape} and {pages.shape}"
        )
    if v_dim is not None and not 1 <= v_dim <= pages.shape[4]:
        raise ValueError(f"v_dim is {v_dim}; it must be from 1 to the {pages.shape[4]} numbers of a key")
    if v_dim is not None and scales is not None:
        raise ValueError("8-bit pages (scales) cannot hold keys that are values too (v_dim) yet; leave out one")
    if q.shape[1] % pages.shape[3] or q.shape[2] != pages.shape[4]:
        raise ValueError(
            f"q has {q.shape[1]} heads of {q.shape[2]}, pages {pages.shape[3]} of {pages.shape[4]}; "
            "query heads must be a multiple of kv heads, and head sizes equal"
        )
    if page_table.shape[0] != kv_lens.shape[0]:
        raise ValueError(f"page_table has {page_table.shape[0]} rows but kv_lens has {kv_lens.shape[0]}")


def unreadable(pages: jax.ShapeDtypeStruct, backend: Backend = "auto") -> str | None:
    """Why the backend would not read such pages on this device, and what to do; None where it would."""
    device = current_device()
    return _unreadable(pages, device) if _choose(backend, device, False) == "triton" else None


def _unreadable(pages: Array | jax.ShapeDtypeStruct, device: Device) -> str | None:
    """What the compiler would get wrong, or die of."""
    dtype = jnp.dtype(pages.dtype)
    if dtype.name not in _POOL_DTYPES:
        return f"the triton backend reads pools of {', '.join(_POOL_DTYPES)}; this one is {dtype.name}"
    if dtype.name == "float8_e4m3fn" and device.platform == "gpu" and device.capability < 8.9:
        return (
            f"float8_e4m3fn pools need compute capability 8.9; {device.name} has {device.capability}: use int8 instead"
        )
    # Pallas computes 32-bit offsets up to 2**32 bytes, which 1-byte numbers overflow from 2**31 on.
    if dtype.itemsize == 1 and LARGEST_8_BIT_POOL < pages.size <= 2 * LARGEST_8_BIT_POOL:
        page = pages.size // pages.shape[0]
        most, least = LARGEST_8_BIT_POOL // page, 2 * LARGEST_8_BIT_POOL // page + 1
        return (
            f"the pool's {pages.shape[0]:,} pages are {pages.size:,} bytes, and {dtype.name} pools between "
            f"{LARGEST_8_BIT_POOL:,} and {2 * LARGEST_8_BIT_POOL:,} would be read at wrong places; "
            f"take at most {most:,} pages, or at least {least:,}"
        )
    return None


def _splits(pages: Array, parts: int, page_table: Array, device: Device, window: int | None, block_k: int) -> int:
    num_seqs, max_pages = page_table.shape
    max_keys = max_pages * pages.shape[1]
    return splits_for(
        device,
        num_seqs=num_seqs,
        kv_heads=parts,
        max_keys=max_keys if window is None else min(max_keys, window),
        block_k=block_k,
    )


def _kernels(
    op: Op,
    q: Array,
    pages: Array,
    scales: Array | None,
    scale: float,
    v_dim: int | None,
    backend: str,
    device: Device,
    interpret: bool,
    **given: Any,
) -> tuple[Any, Tiles]:
    """The module whose kernels are taken, and their sizes. Raises ValueError where it cannot do what is asked."""
    group = heads_together(q.shape[1], pages.shape[3], v_dim, pages.dtype)
    facts: dict[str, Any] = {"group": group, "head_dim": q.shape[2], "pool": pages.dtype}
    if backend == "mosaic" or (backend == "auto" and not interpret and backend_for(op, device, **facts) == "mosaic"):
        sizes = tiles_for(op, device, **facts, backend="mosaic", **given)
        needs = _unmet_by_mosaic(op, q, pages, scales, scale, sizes, device, interpret)
        if not needs:
            from jaxpaged.kernels import mosaic_attention  # Pallas is slow to import

            return mosaic_attention, sizes
        if backend == "mosaic":
            raise ValueError(f"the mosaic backend needs {'; '.join(needs)}: use triton instead")
    from jaxpaged.kernels import triton_attention  # as above, and jax plans to drop its Triton

    if problem := _unreadable(pages, device):
        raise ValueError(problem)
    sizes = tiles_for(op, device, **facts, **given)
    if sizes.block_k < 16 or sizes.block_k & (sizes.block_k - 1):
        raise ValueError(f"block_k is {sizes.block_k}; it must be a power of two and at least 16")
    return triton_attention, sizes


def _unmet_by_mosaic(
    op: Op,
    q: Array,
    pages: Array,
    scales: Array | None,
    scale: float,
    sizes: Tiles,
    device: Device,
    interpret: bool,
) -> list[str]:
    """What the mosaic backend needs and has not; it can do what is asked where that is nothing."""
    page_size, dim, group = pages.shape[1], pages.shape[4], q.shape[1] // pages.shape[3]
    has_types = q.dtype == pages.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
    rows, shared = sizes.block_q * group, mosaic_shared_bytes(op, group, dim, sizes)
    needs = {
        f"jax 0.11 or later, and this is {jax.__version__}": jax.__version_info__ >= (0, 11),
        f"compute capability 9.0; {device.name} has {device.capability}": device.capability == 9.0 or interpret,
        f"bfloat16 or float16 q and pages of one type; they are {q.dtype} and {pages.dtype}": has_types,
        "a pool without scales": scales is None,
        "keys and values apart, without v_dim": pages.shape[2] == 2,
        f"a scale above 0; it is {scale}": scale > 0,
        f"heads of a multiple of 16 up to 256; they are of {dim}": dim % 16 == 0 and dim <= 256,
        f"a page_size that is a multiple of 8; it is {page_size}": page_size % 8 == 0,  # rows of a tile of TMA's
        f"a block_k of 64, 128, 192 or 256; it is {sizes.block_k}": sizes.block_k in (64, 128, 192, 256),  # wgmma's
        f"block_q x query heads a kv head of at most 128; they are {sizes.block_q} x {group}": rows <= 128,
        f"at most {SHARED >> 10} KB of shared memory; a block_k of {sizes.block_k} and {sizes.num_stages} stages take "
        f"{shared >> 10} KB": shared <= SHARED,
    }
    return [need for need, is_met in needs.items() if not is_met]
