"""The KV cache: one pool of pages per layer, `[P, page_size, 2, K, D]`, keys at index 0 and values at index 1.

Page 0 is the null page: zeros, never handed out, read where a page table has no page. The pools are a tuple so that
each can be donated and updated in place (a pool stacked over layers would be copied, layer by layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.model.spec import Decoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all computed tokens, a pool per layer (as in any pytree, JAX may put other leaves there)."""

    pools: tuple[Any, ...]

    @property
    def num_pages(self) -> int:
        """Pages of each pool, the null page included."""
        return int(self.pools[0].shape[0])

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return int(self.pools[0].shape[1])


def init_cache(spec: Decoder, num_pages: int, page_size: int, dtype: jnp.dtype | str) -> KVCache:
    """An empty cache of `num_pages` pages, the null page included, on the default device."""
    return KVCache(
        tuple(jnp.zeros((num_pages, page_size, 2, b.mixer.kv_heads, b.mixer.head_dim), dtype) for b in spec.blocks)
    )


def page_bytes(spec: Decoder, page_size: int, dtype: jnp.dtype | str) -> int:
    """Bytes that one page takes over all layers."""
    numbers = sum(2 * b.mixer.kv_heads * b.mixer.head_dim for b in spec.blocks)
    return numbers * page_size * jnp.dtype(dtype).itemsize


def write(pool: Array, k: Float[Array, "T K D"], v: Float[Array, "T K D"], slots: Int[Array, " T"]) -> Array:
    """The pool with token t's key and value at slots[t] = page * page_size + offset; slots past it are dropped."""
    pages, page_size, *rest = pool.shape
    kv = jnp.stack([k, v], 1).astype(pool.dtype)
    return pool.reshape(pages * page_size, *rest).at[slots].set(kv, mode="drop").reshape(pool.shape)


def scrub(cache: KVCache, page_ids: Int[Array, " N"]) -> KVCache:
    """The cache with these pages zeroed; ids past the pool are dropped. Needed where a page may hold NaN: a masked
    position has weight 0, and 0 x NaN would reach whoever gets the page next.
    """
    return KVCache(tuple(pool.at[page_ids].set(jnp.zeros((), pool.dtype), mode="drop") for pool in cache.pools))


def copy_pages(cache: KVCache, sources: Int[Array, " N"], targets: Int[Array, " N"]) -> KVCache:
    """The cache with page sources[n] copied to page targets[n], all at once; targets past the pool are dropped."""
    return KVCache(tuple(pool.at[targets].set(pool[sources], mode="drop") for pool in cache.pools))
