"""What the attention ops mean, in jnp: dense attention in a few lines, and paged attention as CPU and TPU run it.

The paged ops walk the page table a few pages at a time with an online softmax (arXiv 1805.02867), so work grows with
the pages in use, never with the table's width. A tile is a run of queries of one sequence: one query in decode, part
of a chunk otherwise. Tiles are sorted by length and taken in groups, so that a group's loop has little to skip; groups
of padding alone are not taken. A tile's numbers do not depend on its group: pages past its end add exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Measured on two x86 cores (9 query / 3 kv heads of 64, pages of 16, 64 sequences, mean length 185): groups of 4 with
# 4 pages a turn take 2.1 ms, 1 with 8 pages 3.8 ms, 16 with 4 pages 3.0 ms. Tiles as long as a chunk is on average are
# within 20 % of the best of 4, 8, 16 and 32 queries: with 256 tokens for 64 sequences tiles of 4 take 4.7 ms, of 32
# 18 ms; with 192 for 16, all of one long sequence, tiles of 4 take 12.9 ms, of 16 7.6 ms, of 32 9.0 ms. Tiles of 64
# cost short prompts 60 % more.
_GROUP = 4
_TOKENS_PER_TURN = 64
_SHORTEST_TILE, _LONGEST_TILE = 4, 32
_FLOOR = -1e30  # stands for minus infinity: finite, so that a masked row yields 0 and not NaN


def attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "U K D"],
    v: Float[Array, "U K D"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "T H D"]:
    """Causal softmax attention of the last T of U tokens of one sequence; float32 inside, q's dtype out."""
    num_q, heads, dim = q.shape
    num_k, kv_heads, _ = k.shape
    grouped = q.astype(jnp.float32).reshape(num_q, kv_heads, -1, dim)
    scores = jnp.einsum("tkgd,ukd->kgtu", grouped, k.astype(jnp.float32)) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    behind = (jnp.arange(num_q) + num_k - num_q)[:, None] - jnp.arange(num_k)[None]
    seen = (behind >= 0) & (behind < (window if window is not None else num_k))
    scores = jnp.where(seen[None, None], scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(kv_heads, -1, 1, 1), (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, column], -1)
    weights = jax.nn.softmax(scores, -1)[..., :num_k]
    return jnp.einsum("kgtu,ukd->tkgd", weights, v.astype(jnp.float32)).reshape(num_q, heads, dim).astype(q.dtype)


class _Tiles(NamedTuple):
    """Runs of queries, one sequence each. Rows of a tile past `lengths` are padding."""

    q: Float[Array, "N Q H D"]
    tables: Int[Array, "N max_pages"]
    starts: Int[Array, " N"]  # position of the first query in its sequence
    lengths: Int[Array, " N"]  # queries that count; 0 makes the whole tile padding


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
) -> Float[Array, "S H D"]:
    """One query per sequence, the newest token of `kv_lens`. See `jaxpaged.kernels.paged_attention`."""
    tiles = _Tiles(q[:, None], page_table, kv_lens - 1, jnp.minimum(kv_lens, 1))
    return _attend(tiles, pages, scale, window, softcap, sinks, scales)[:, 0]


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
) -> Float[Array, "T H D"]:
    """Any number of newest tokens per sequence. See `jaxpaged.kernels.paged_attention`."""
    num_tokens, num_seqs = q.shape[0], kv_lens.shape[0]
    tile = _tile_size(num_tokens, num_seqs)
    num_tiles = -(-num_tokens // tile) + num_seqs
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    tile_ends = jnp.cumsum(-(-q_lens // tile))
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right"), num_seqs - 1)
    within = (index - (tile_ends[seq] - -(-q_lens[seq] // tile))) * tile
    lengths = jnp.where(index < tile_ends[-1], jnp.clip(q_lens[seq] - within, 0, tile), 0)
    rows = (cu_q_lens[seq] + within)[:, None] + jnp.arange(tile, dtype=jnp.int32)[None]
    real = jnp.arange(tile, dtype=jnp.int32)[None] < lengths[:, None]
    tiles = _Tiles(q[jnp.where(real, rows, 0)], page_table[seq], kv_lens[seq] - q_lens[seq] + within, lengths)
    out = _attend(tiles, pages, scale, window, softcap, sinks, scales)
    # Padded rows of a tile are sent past the end and dropped, so that no two rows of `out` share a destination.
    return jnp.zeros_like(q).at[jnp.where(real, rows, num_tokens)].set(out, mode="drop")


def _tile_size(num_tokens: int, num_seqs: int) -> int:
    """Queries a tile: the power of two from the tokens that a sequence has on average."""
    mean = -(-num_tokens // max(num_seqs, 1))
    return min(max(1 << (mean - 1).bit_length(), _SHORTEST_TILE), _LONGEST_TILE)


def _attend(
    tiles: _Tiles,
    pages: Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
    scales: Array | None,
) -> Float[Array, "N Q H D"]:
    """Attention of every tile over its pages."""
    num_tiles, tile, heads, dim = tiles.q.shape
    page_size, kv_heads = pages.shape[1], pages.shape[3]
    group = min(_GROUP, num_tiles)
    turn = max(1, _TOKENS_PER_TURN // page_size)  # pages a turn of the loop takes
    span = turn * page_size
    padding = -num_tiles % group
    ends = jnp.where(tiles.lengths > 0, tiles.starts + tiles.lengths, 0)
    order = jnp.pad(jnp.argsort(-ends), (0, padding), mode="edge")
    # The last turn may read past the table's width; those positions are masked, the ids only have to exist.
    tables = jnp.pad(tiles.tables, ((0, 0), (0, -tiles.tables.shape[1] % turn)))
    rows = heads // kv_heads * tile  # queries that read one kv head, heads outer
    if sinks is None:
        first_max = jnp.full((group, kv_heads, rows), _FLOOR, jnp.float32)
        first_sum = jnp.zeros_like(first_max)
    else:
        column = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, -1), tile, axis=1)
        first_max = jnp.broadcast_to(column[None], (group, kv_heads, rows))
        first_sum = jnp.ones_like(first_max)

    def one_group(index: Array, out: Array) -> Array:
        members = lax.dynamic_slice_in_dim(order, index * group, group)
        table, start, length = tables[members], tiles.starts[members], tiles.lengths[members]
        # [N, Q, H, D] -> [N, K, rows, D]
        q = tiles.q[members].reshape(group, tile, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
        q = q.reshape(group, kv_heads, rows, dim).astype(jnp.float32) * scale
        offset = jnp.arange(tile, dtype=jnp.int32)
        position = jnp.tile(start[:, None] + offset[None], (1, rows // tile))  # [N, rows]

        def one_turn(turn_index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, acc = carry
            ids = jnp.clip(lax.dynamic_slice_in_dim(table, turn_index * turn, turn, 1), 0, pages.shape[0] - 1)
            kv = _whole_pages(pages, ids).astype(jnp.float32)
            if scales is not None:
                kv = kv * scales[ids].astype(jnp.float32)[..., None]
            kv = kv.reshape(group, span, 2, kv_heads, dim)
            scores = jnp.einsum("nkrd,nukd->nkru", q, kv[:, :, 0])
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            behind = position[:, :, None] - (turn_index * span + jnp.arange(span, dtype=jnp.int32))[None, None]
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + jnp.einsum("nkru,nukd->nkrd", weights, kv[:, :, 1])
            return new_top, total * shrink + weights.sum(-1), acc

        end = jnp.max(ends[members])
        begin = jnp.zeros((), jnp.int32)
        if window is not None:
            begin = jnp.min(jnp.where(length > 0, jnp.maximum(start - window + 1, 0), end)) // span
        acc = jnp.zeros((*first_max.shape, dim), jnp.float32)
        _, total, acc = lax.fori_loop(begin, (end + span - 1) // span, one_turn, (first_max, first_sum, acc))
        # [N, K, rows, D] -> [N, Q, H, D]
        result = (acc / jnp.maximum(total, 1e-30)[..., None]).reshape(group, kv_heads, -1, tile, dim)
        result = result.transpose(0, 3, 1, 2, 4).reshape(group, tile, heads, dim)
        result = jnp.where((offset[None] < length[:, None])[:, :, None, None], result, 0.0).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, result, index * group, 0)

    # Padding comes last in the order; the zeros there are `out` as it begins.
    groups = (jnp.count_nonzero(ends > 0) + group - 1) // group
    out = lax.fori_loop(0, groups, one_group, jnp.zeros((num_tiles + padding, tile, heads, dim), tiles.q.dtype))
    return jnp.zeros_like(tiles.q).at[order].set(out)


def _whole_pages(pages: Array, ids: Int[Array, "N C"]) -> Array:
    """pages[ids], [N, C, page_size, 2, K, D].

    XLA's gather on CPU copies a page as one row of numbers in 37 us where it takes 58 us for its six axes (16 pages of
    24 kB). A TPU would have to lay out the whole pool anew for that.
    """

    def rows(pages: Array, ids: Array) -> Array:
        return pages.reshape(pages.shape[0], -1)[ids].reshape(*ids.shape, *pages.shape[1:])

    out: Array = lax.platform_dependent(pages, ids, tpu=lambda pages, ids: pages[ids], default=rows)
    return out
