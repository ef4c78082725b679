"""What the attention ops mean, in jnp: dense attention in a few lines, and paged attention as CPU and TPU run it.

The paged ops walk the page table a few pages at a time with an online softmax (arXiv 1805.02867), so work grows with
the pages in use, never with the table's width. A tile is a run of queries of one sequence: one query in decode, part
of a chunk otherwise. One loop has a few lanes, each at a tile of its own; a lane that is done takes the longest tile
left, so that lanes end together, and empty tiles are not taken at all. A tile's numbers do not depend on those beside
it: it is summed in the order of its own pages, and positions past its end add exactly 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Measured on two x86 cores (9 query / 3 kv heads of 64, pages of 16, mean lengths 130 to 300). Lanes: 8 decode 64
# sequences in 0.9 of the time that 4 take, but 16 rows with 10 in use in 1.1 of it; 2 decode 4 sequences in 0.55. Turns
# of 32 tokens a lane cost 10 %, of 128 35 %. Tiles as long as a chunk is on average are within 20 % of the best of 4,
# 8, 16 and 32 queries: with 256 tokens for 64 sequences tiles of 4 take 4.7 ms, of 32 18 ms; with 192 for 16, all of
# one long sequence, tiles of 4 take 12.9 ms, of 16 7.6 ms, of 32 9.0 ms. Tiles of 64 cost short prompts 60 % more.
_TOKENS_PER_TURN = 64
_SHORTEST_TILE, _LONGEST_TILE = 4, 32
_FLOOR = -1e30  # stands for minus infinity: finite, so that a masked row yields 0 and not NaN


def attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "U K D"],
    v: Float[Array, "U K V"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "T H V"]:
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
    return jnp.einsum("kgtu,ukd->tkgd", weights, v.astype(jnp.float32)).reshape(num_q, heads, -1).astype(q.dtype)


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
    v_dim: int | None = None,
) -> Float[Array, "S H V"]:
    """One query per sequence, the newest token of `kv_lens`. See `jaxpaged.kernels.paged_attention`."""
    tiles = _Tiles(q[:, None], page_table, kv_lens - 1, jnp.minimum(kv_lens, 1))
    return _attend(tiles, pages, scale, window, softcap, sinks, scales, v_dim)[:, 0]


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
) -> Float[Array, "T H V"]:
    """Any number of newest tokens per sequence. See `jaxpaged.kernels.paged_attention`."""
    num_tokens, num_seqs = q.shape[0], kv_lens.shape[0]
    tile = _tile_size(num_tokens, num_seqs)
    num_tiles = -(-num_tokens // tile) + num_seqs
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    tile_counts = -(-q_lens // tile)
    tile_ends = jnp.cumsum(tile_counts)
    first_tiles = tile_ends - tile_counts
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right"), num_seqs - 1)
    within = (index - first_tiles[seq]) * tile
    lengths = jnp.where(index < tile_ends[-1], jnp.clip(q_lens[seq] - within, 0, tile), 0)
    rows = (cu_q_lens[seq] + within)[:, None] + jnp.arange(tile, dtype=jnp.int32)[None]
    real = jnp.arange(tile, dtype=jnp.int32)[None] < lengths[:, None]
    tiles = _Tiles(q[jnp.where(real, rows, 0)], page_table[seq], kv_lens[seq] - q_lens[seq] + within, lengths)
    out = _attend(tiles, pages, scale, window, softcap, sinks, scales, v_dim)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(cu_q_lens[1:], token, side="right"), num_seqs - 1)
    within = token - cu_q_lens[seq]
    found = out.reshape(-1, *out.shape[2:])[first_tiles[seq] * tile + within]
    return jnp.where((token < cu_q_lens[-1])[:, None, None], found, jnp.zeros((), out.dtype))


def _tile_size(num_tokens: int, num_seqs: int) -> int:
    """Queries a tile: the power of two from the tokens that a sequence has on average."""
    mean = -(-num_tokens // max(num_seqs, 1))
    return min(max(1 << (mean - 1).bit_length(), _SHORTEST_TILE), _LONGEST_TILE)


class _Lanes(NamedTuple):
    """Which tile each lane is at, which run of its pages comes next, and its softmax so far."""

    tile: Int[Array, " L"]
    run: Int[Array, " L"]
    top: Float[Array, "L K rows"]
    total: Float[Array, "L K rows"]
    acc: Float[Array, "L K rows V"]


def _attend(
    tiles: _Tiles,
    pages: Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
    scales: Array | None,
    v_dim: int | None,
) -> Float[Array, "N Q H V"]:
    """Attention of every tile over its pages."""
    num_tiles, size, heads, dim = tiles.q.shape
    page_size, sides, kv_heads = pages.shape[1:4]
    v_dim = dim if v_dim is None else v_dim
    lanes = min(max(num_tiles // 4, 2), 8 if size == 1 else 4, num_tiles)
    turn = max(1, _TOKENS_PER_TURN // page_size)  # pages that a lane reads in a turn
    span = turn * page_size
    rows = heads // kv_heads * size  # queries that read one kv head, heads outer

    # One tile more, which is empty: what lanes without work are at.
    starts = jnp.pad(tiles.starts, (0, 1))
    ends = jnp.pad(jnp.where(tiles.lengths > 0, tiles.starts + tiles.lengths, 0), (0, 1))
    order = jnp.argsort(-ends)  # stable, so that the one more is last
    first = jnp.zeros_like(ends) if window is None else jnp.maximum(starts - window + 1, 0) // span
    last = (ends - 1) // span
    # The last run may reach past the table's width; those positions are masked, the ids only have to exist.
    tables = jnp.pad(tiles.tables, ((0, 1), (0, -tiles.tables.shape[1] % turn)))
    tables = jnp.clip(tables, 0, pages.shape[0] - 1).reshape(num_tiles + 1, -1, turn)
    # [N, Q, H, D] -> [N, K, rows, D]
    q = tiles.q.reshape(num_tiles, size, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    q = jnp.pad(q.reshape(num_tiles, kv_heads, rows, dim).astype(jnp.float32) * scale, ((0, 1), (0, 0), (0, 0), (0, 0)))
    offset = jnp.tile(jnp.arange(size, dtype=jnp.int32), rows // size)
    if sinks is None:
        first_top = jnp.full((1, kv_heads, rows), _FLOOR, jnp.float32)
        first_total = jnp.zeros_like(first_top)
    else:
        first_top = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, -1), size, axis=1)[None]
        first_total = jnp.ones_like(first_top)

    def one_turn(state: tuple[_Lanes, Array, Array]) -> tuple[_Lanes, Array, Array]:
        (tile, run, top, total, acc), taken, q = state
        begins = (run == first[tile])[:, None, None]
        top, total = jnp.where(begins, first_top, top), jnp.where(begins, first_total, total)
        ids = tables[tile, run]
        kv = _whole_pages(pages, ids).astype(jnp.float32)
        if scales is not None:
            kv = kv * scales[ids].astype(jnp.float32)[..., None]
        kv = kv.reshape(lanes, span, sides, kv_heads, dim)
        scores = jnp.einsum("nkrd,nukd->nkru", q[tile], kv[:, :, 0])
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        newest = (starts[tile] - run * span)[:, None, None] + offset[None, :, None]  # the span's last key seen
        key = jnp.arange(span, dtype=jnp.int32)[None, None]
        seen = key <= newest if window is None else (key <= newest) & (key > newest - window)
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        # Chosen, not multiplied by 0: the tile before may have left NaN.
        acc = jnp.where(begins[..., None], 0.0, acc * shrink[..., None])
        acc = acc + jnp.einsum("nkru,nukd->nkrd", weights, kv[:, :, sides - 1, :, :v_dim])
        done = run >= last[tile]
        q = q.at[jnp.where(done, tile, num_tiles), :, :, :v_dim].set(acc / jnp.maximum(total, 1e-30)[..., None])
        next_tile = order[jnp.minimum(taken + jnp.cumsum(done, dtype=jnp.int32) - 1, num_tiles)]
        tile = jnp.where(done, next_tile, tile)
        run = jnp.where(done, first[tile], run + 1)
        return _Lanes(tile, run, new_top, total, acc), taken + jnp.sum(done, dtype=jnp.int32), q

    def is_busy(state: tuple[_Lanes, Array, Array]) -> Array:
        return jnp.any(ends[state[0].tile] > 0)

    # What a lane begins with means nothing. Zeros would be laid out for all layers at once before the first one runs, 4
    # MB each for 512 tokens, which took a tenth of the step; so a result goes where its query was.
    tile = order[:lanes]
    begin = _Lanes(tile, first[tile], q[tile, ..., 0], q[tile, ..., 0], q[tile, ..., :v_dim])
    _, _, out = lax.while_loop(is_busy, one_turn, (begin, jnp.asarray(lanes, jnp.int32), q))
    # [N, K, rows, D] -> [N, Q, H, V]
    out = out[:num_tiles, ..., :v_dim].astype(tiles.q.dtype)
    out = out.reshape(num_tiles, kv_heads, -1, size, v_dim).transpose(0, 3, 1, 2, 4)
    real = jnp.arange(size, dtype=jnp.int32)[None] < tiles.lengths[:, None]
    return jnp.where(real[:, :, None, None], out.reshape(num_tiles, size, heads, v_dim), jnp.zeros((), out.dtype))


def _whole_pages(pages: Array, ids: Int[Array, "N C"]) -> Array:
    """pages[ids], [N, C, page_size, sides, K, D].

    XLA's gather on CPU copies a page as one row of numbers in 37 us where it takes 58 us for its six axes (16 pages of
    24 kB). A TPU would have to lay out the whole pool anew for that.
    """

    def rows(pages: Array, ids: Array) -> Array:
        return pages.reshape(pages.shape[0], -1)[ids].reshape(*ids.shape, *pages.shape[1:])

    out: Array = lax.platform_dependent(pages, ids, tpu=lambda pages, ids: pages[ids], default=rows)
    return out
