"""The KV cache: one pool of pages per layer, `[P, page_size, 2, K, D]`, keys at index 0 and values at index 1.

Layers whose keys and values are made of latents keep those instead, `[P, page_size, 1, 1, row_dim]`.

Page 0 is the null page: zeros, never handed out, read where a page table has no page. The pools are a tuple so that
each can be donated and updated in place (a pool stacked over layers would be copied, layer by layer). What moves pages
about does so leaf by leaf, page ids first, and needs not know what a pool is made of.

A pool of 8-bit numbers has a float32 scale for each token, side and kv head. A token's are made when it is written and
depend on it alone, so that pages are shared, copied and computed again as those of other pools are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.tiles import current_device
from jaxpaged.model.spec import Attention, Decoder, LatentAttention, Mixer

_NAMES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}  # vLLM's
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_DTYPES = ("float32", "bfloat16", "float16", *_LARGEST)


class Pool(NamedTuple):
    """One layer's keys and values: pages [P, page_size, sides, K, D], and what 8-bit ones are multiplied by."""

    pages: Any
    scales: Any = None  # [P, page_size, sides, K] float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all computed tokens, a pool per layer (as in any pytree, JAX may put other leaves there)."""

    pools: tuple[Pool, ...]

    @property
    def num_pages(self) -> int:
        """Pages of each pool, the null page included."""
        return int(self.pools[0].pages.shape[0])

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return int(self.pools[0].pages.shape[1])


def pool_dtype(name: Any) -> jnp.dtype:
    """The dtype of this name, numpy's or vLLM's; ValueError where pools cannot be of it."""
    dtype = jnp.dtype(_NAMES.get(name, name) if isinstance(name, str) else name)
    if dtype.name not in _DTYPES:
        raise ValueError(f"a pool cannot be of {dtype.name}; known: {', '.join((*_DTYPES, *_NAMES))}")
    return dtype


def auto_dtype(weights: Any) -> np.dtype[Any]:
    """The dtype of pools for weights of this one, where nobody says: the same, but on CPUs float32. XLA there
    writes into 16-bit numbers by turning the whole pool into float32 and back, in each layer of each step.
    """
    return np.dtype(np.float32 if current_device().platform == "cpu" else weights)


def init_cache(spec: Decoder, num_pages: int, page_size: int, dtype: jnp.dtype | str) -> KVCache:
    """An empty cache of `num_pages` pages, the null page included, on the default device."""
    shapes = cache_shapes(spec, num_pages, page_size, dtype)
    return KVCache(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.pools))


def cache_shapes(spec: Decoder, num_pages: int, page_size: int, dtype: jnp.dtype | str) -> KVCache:
    """What `init_cache` would make, in shapes."""
    number = pool_dtype(dtype)

    def pool(mixer: Mixer) -> Pool:
        match mixer:
            case Attention(kv_heads=kv_heads, head_dim=head_dim):
                of_token: tuple[int, ...] = (2, kv_heads, head_dim)
            case LatentAttention(row_dim=row_dim):
                of_token = (1, 1, row_dim)
        pages = jax.ShapeDtypeStruct((num_pages, page_size, *of_token), number)
        return Pool(pages, jax.ShapeDtypeStruct(pages.shape[:-1], jnp.float32) if number.itemsize == 1 else None)

    return KVCache(tuple(pool(b.mixer) for b in spec.blocks))


def page_bytes(spec: Decoder, page_size: int, dtype: jnp.dtype | str) -> int:
    """Bytes that one page takes over all layers, scales included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache_shapes(spec, 1, page_size, dtype)))


def write(pool: Pool, k: Float[Array, "T K D"], v: Float[Array, "T K D"] | None, slots: Int[Array, " T"]) -> Pool:
    """The pool with token t's key and value at slots[t] = page * page_size + offset; slots past it are dropped.

    Latents are keys without values.
    """
    kv = k[:, None] if v is None else jnp.stack([k, v], 1)
    if pool.scales is None:
        return Pool(_put(pool.pages, kv.astype(pool.pages.dtype), slots))
    numbers, scales = _quantise(kv, pool.pages.dtype)
    return Pool(_put(pool.pages, numbers, slots), _put(pool.scales, scales, slots))


def scrub(cache: KVCache, page_ids: Int[Array, " N"]) -> KVCache:
    """The cache with these pages zeroed; ids past the pool are dropped. Needed where a page may hold NaN: a masked
    position has weight 0, and 0 x NaN would reach whoever gets the page next.
    """
    return KVCache(
        jax.tree.map(lambda leaf: leaf.at[page_ids].set(jnp.zeros((), leaf.dtype), mode="drop"), cache.pools)
    )


def copy_pages(cache: KVCache, sources: Int[Array, " N"], targets: Int[Array, " N"]) -> KVCache:
    """The cache with page sources[n] copied to page targets[n], all at once; targets past the pool are dropped."""
    return KVCache(jax.tree.map(lambda leaf: leaf.at[targets].set(leaf[sources], mode="drop"), cache.pools))


def read_pages(cache: KVCache, page_ids: Int[Array, " N"]) -> tuple[Pool, ...]:
    """These pages of each pool, as pools of N pages."""
    pages: tuple[Pool, ...] = jax.tree.map(lambda leaf: leaf[page_ids], cache.pools)
    return pages


def write_pages(cache: KVCache, page_ids: Int[Array, " N"], pages: tuple[Pool, ...]) -> KVCache:
    """The cache with these pages as `read_pages` gave them; ids past the pool are dropped."""
    return KVCache(jax.tree.map(lambda leaf, new: leaf.at[page_ids].set(new, mode="drop"), cache.pools, pages))


def _put(slots_of: Array, values: Array, slots: Int[Array, " T"]) -> Array:
    """values [T, ...] at these slots of pages [P, page_size, ...].

    XLA on CPU would copy the whole pool to write one row: so there are two, of which one is dropped. So it would where
    an axis of 1, such as a single kv head, leaves it to choose the order of axes: so the order is said.
    """
    pages, page_size, *rest = slots_of.shape
    if len(slots) == 1:
        values, slots = jnp.concatenate([values, values]), jnp.pad(slots, (0, 1), constant_values=pages * page_size)
    out = slots_of.reshape(pages * page_size, *rest).at[slots].set(values, mode="drop").reshape(slots_of.shape)
    return with_layout_constraint(out, Layout(tuple(range(out.ndim)))) if 1 in rest else out


def _quantise(kv: Float[Array, "T sides K D"], dtype: Any) -> tuple[Array, Float[Array, "T sides K"]]:
    """Numbers of `dtype`, the largest of a head as large as it can be, and what to multiply them by.

    NaN or infinity in a head make its scale NaN: a broken token is read as one.
    """
    kv = kv.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kv), -1)
    scales = jnp.maximum(largest / _LARGEST[dtype.name], np.finfo(np.float32).tiny)
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    numbers = kv / scales[..., None]
    return (jnp.round(numbers) if dtype == jnp.int8 else numbers).astype(dtype), scales
