"""Paged attention in Pallas for Triton: A100 and later. One kernel does decode and prompts, another merges splits.

A program computes one work item (see work.py) for one kv head. Its tile packs the item's tokens and the query heads
that share the kv head: row r is token r // G of the item and head r % G of the group, G = H / K. So decode with G heads
is a tile of G rows (16 at least, what mma takes), and a prompt's tile of 128 rows reaches wgmma on Hopper.

Where keys hold their values (`v_dim`: latents), a program takes some of the heads that share them, and reads a key in
two parts, each padded to a power of two: what is its value too, once for both products, and the rest.

Keys are taken `block_k` at a time with an online softmax in base 2 (arXiv 2205.14135), each token's row looked up in
the page table: rows are copied one by one (cp.async, `num_stages` blocks in flight), so a small page costs nothing.

Traps met: block shapes must be powers of two, so all arrays are whole in global memory and loads are masked; in
interpret mode a masked store writes the old value back, so masked rows must not alias live ones; Python integers as the
only indices of a load are refused there.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.tiles import Tiles, heads_together
from jaxpaged.kernels.work import chunk_work, decode_work

_LOG2_E = math.log2(math.e)
_FLOOR = -1e30  # where a row's maximum starts: finite, so that a row that sees nothing yields 0 and not NaN
_MERGE_ROWS = 16  # partial results that the merge takes at a time


class _Inputs(NamedTuple):
    """What a kernel reads: arrays outside, references inside."""

    q: Any  # [T, H, D]
    pages: Any  # [P, page_size, sides, K, D]
    page_table: Any  # [S, max_pages]
    work: Any  # Work
    sinks: Any = None  # [H]
    scales: Any = None  # [P, page_size, 2, K]


class _Meaning(NamedTuple):
    """The options that change what is computed."""

    scale: float
    window: int | None
    softcap: float | None
    v_dim: int | None


def paged_attention(
    q: Float[Array, "S H D"],
    pages: Array,
    page_table: Int[Array, "S max_pages"],
    kv_lens: Int[Array, " S"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
    scales: Array | None,
    tiles: Tiles,
    num_splits: int,
    interpret: bool,
    v_dim: int | None = None,
) -> Float[Array, "S H V"]:
    """One query a sequence. With `num_splits` > 1, partial results of S x num_splits items and their merge."""
    work, start = decode_work(kv_lens, window=window, block_k=tiles.block_k, num_splits=num_splits)
    inputs = _Inputs(q, pages, page_table, work, sinks, scales)
    meaning = _Meaning(scale, window, softcap, v_dim)
    if num_splits == 1:
        out: Array = _attend(inputs, meaning, tiles, interpret, name="paged_attention_decode")
        return out
    partial, lse = _attend(inputs, meaning, tiles, interpret, name="paged_attention_decode_split", split=True)
    return _merge(partial, lse, start, q.dtype, interpret)


def ragged_paged_attention(
    q: Float[Array, "T H D"],
    pages: Array,
    page_table: Int[Array, "S max_pages"],
    cu_q_lens: Int[Array, " S+1"],
    kv_lens: Int[Array, " S"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
    scales: Array | None,
    tiles: Tiles,
    interpret: bool,
    v_dim: int | None = None,
) -> Float[Array, "T H V"]:
    """Any number of newest tokens a sequence, in runs of `tiles.block_q`."""
    work = chunk_work(
        cu_q_lens, kv_lens, num_tokens=q.shape[0], window=window, block_q=tiles.block_q, block_k=tiles.block_k
    )
    inputs = _Inputs(q, pages, page_table, work, sinks, scales)
    meaning = _Meaning(scale, window, softcap, v_dim)
    out: Array = _attend(inputs, meaning, tiles, interpret, name="paged_attention_ragged")
    return out


def _attend(
    inputs: _Inputs, meaning: _Meaning, tiles: Tiles, interpret: bool, *, name: str, split: bool = False
) -> Any:
    """[T, H, V] in q's dtype; or of a split one, each item's result [W, H, V] and log2 of its denominator [W, H]."""
    num_items, (rows, heads, dim) = inputs.work.seq.shape[0], inputs.q.shape
    v_dim = dim if meaning.v_dim is None else meaning.v_dim
    out: Any = jax.ShapeDtypeStruct((rows, heads, v_dim), inputs.q.dtype)
    if split:
        shape = num_items, heads, v_dim
        out = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], jnp.float32))
    return pl.pallas_call(
        functools.partial(_attend_kernel, meaning=meaning, tiles=tiles, split=split),
        grid=(num_items, heads // _group(inputs, meaning)),
        in_specs=[jax.tree.map(lambda _: _WHOLE, inputs)],
        out_specs=jax.tree.map(lambda _: _WHOLE, out),
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name=name,
    )(inputs)


def _group(inputs: _Inputs, meaning: _Meaning) -> int:
    """Query heads that a program takes."""
    heads, kv_heads = inputs.q.shape[1], inputs.pages.shape[3]
    return heads_together(heads, kv_heads, meaning.v_dim, inputs.pages.dtype)


_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def _attend_kernel(ins: _Inputs, *outs: Any, meaning: _Meaning, tiles: Tiles, split: bool) -> None:
    item, part = pl.program_id(0), pl.program_id(1)
    num_rows = plt.load(ins.work.num_rows.at[item])

    @pl.when(num_rows > 0)
    def _() -> None:
        _attend_item(ins, outs, item, part, num_rows, meaning=meaning, tiles=tiles, split=split)


def _attend_item(
    ins: _Inputs,
    outs: tuple[Any, ...],
    item: Array,
    part: Array,
    num_rows: Array,
    *,
    meaning: _Meaning,
    tiles: Tiles,
    split: bool,
) -> None:
    head_dim, (page_size, sides) = ins.q.shape[2], ins.pages.shape[1:3]
    v_dim = head_dim if meaning.v_dim is None else meaning.v_dim
    group = _group(ins, meaning)
    kv_head = part * group // (ins.q.shape[1] // ins.pages.shape[3])
    tile_rows = max(16, pl.next_power_of_2(tiles.block_q * group))
    dtype = _multiply_dtype(ins.q.dtype, ins.pages.dtype)
    # Full float32 products where the data are float32; the hardware's one precision below that.
    dot = functools.partial(plt.dot, allow_tf32=False) if dtype == jnp.float32 else plt.dot

    seq, first_row = plt.load(ins.work.seq.at[item]), plt.load(ins.work.row.at[item])
    first_position = plt.load(ins.work.position.at[item])
    begin, end = plt.load(ins.work.begin.at[item]), plt.load(ins.work.end.at[item])
    row = jnp.arange(tile_rows, dtype=jnp.int32)
    token, head = row // group, part * group + row % group
    is_row = token < num_rows
    position = first_position + token

    def columns(begin: int, end: int) -> tuple[Array, Array | None]:
        """A head's numbers from `begin` on, as many as a power of two, and which are before `end` (None: all are)."""
        dim = begin + jnp.arange(pl.next_power_of_2(end - begin), dtype=jnp.int32)
        return dim, None if dim.shape[0] == end - begin else dim < end

    def in_head(mask: Array, own: Array | None) -> Array:
        """[N] -> [N, D]: true in the lanes that exist."""
        return mask[:, None] if own is None else mask[:, None] & own[None, :]

    def load(ref: Any, mask: Array) -> Array:
        return plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))

    value_columns = columns(0, v_dim)
    key_columns = (value_columns, columns(v_dim, head_dim)) if v_dim < head_dim else (value_columns,)

    def q_part(dim: Array, own: Array | None) -> Array:
        ref = ins.q.at[(first_row + token)[:, None], head[:, None], dim[None, :]]
        return load(ref, in_head(is_row, own) & jnp.ones((tile_rows, dim.shape[0]), jnp.bool_)).astype(dtype)

    q = [q_part(*some) for some in key_columns]

    def turn(block: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        acc, top, total = carry
        key = block * tiles.block_k + jnp.arange(tiles.block_k, dtype=jnp.int32)
        is_key = key < end
        page, slot = load(ins.page_table.at[seq, key // page_size], is_key), key % page_size

        def rows_of(side: int, dim: Array, own: Array | None) -> Array:
            ref = ins.pages.at[page[:, None], slot[:, None], side, kv_head, dim[None, :]]
            return load(ref, in_head(is_key, own) & jnp.ones((tiles.block_k, dim.shape[0]), jnp.bool_)).astype(dtype)

        keys = [rows_of(0, *some) for some in key_columns]
        products = [dot(q_some, k_some, trans_b=True) for q_some, k_some in zip(q, keys, strict=True)]
        scores = sum(products[1:], start=products[0]) * meaning.scale
        if ins.scales is not None:
            scores *= load(ins.scales.at[page, slot, 0, kv_head], is_key).astype(jnp.float32)[None, :]
        if meaning.softcap is not None:
            scores = meaning.softcap * jnp.tanh(scores / meaning.softcap)
        scores *= _LOG2_E
        if masked:
            behind = position[:, None] - key[None, :]
            seen = behind >= 0 if meaning.window is None else (behind >= 0) & (behind < meaning.window)
            scores = jnp.where(seen, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(1))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(scores - new_top[:, None])
        total = total * shrink + weights.sum(1)
        if ins.scales is not None:
            weights *= load(ins.scales.at[page, slot, 1, kv_head], is_key).astype(jnp.float32)[None, :]
        values = keys[0] if sides == 1 else rows_of(1, *value_columns)
        return acc * shrink[:, None] + dot(weights.astype(dtype), values), new_top, total

    top, total = jnp.full(tile_rows, _FLOOR, jnp.float32), jnp.zeros(tile_rows, jnp.float32)
    if ins.sinks is not None:
        leads = plt.load(ins.work.leading.at[item]) > 0
        sink = plt.load(ins.sinks.at[head]).astype(jnp.float32) * _LOG2_E
        top, total = jnp.where(leads, sink, top), jnp.where(leads, 1.0, total)
    dim, own = value_columns
    carry = (jnp.zeros((tile_rows, dim.shape[0]), jnp.float32), top, total)
    first_block, last_block = begin // tiles.block_k, (end + tiles.block_k - 1) // tiles.block_k
    if tiles.block_q > 1 and meaning.window is None:
        # Blocks that every row sees whole need no mask.
        diagonal = jnp.clip((first_position + 1) // tiles.block_k, first_block, last_block)
        carry = lax.fori_loop(first_block, diagonal, functools.partial(turn, masked=False), carry)
        first_block = diagonal
    acc, top, total = lax.fori_loop(first_block, last_block, functools.partial(turn, masked=True), carry)

    divisor = jnp.where(total > 0.0, total, 1.0)
    out_row = item * tiles.block_q + token if split else first_row + token
    out_ref = outs[0].at[out_row[:, None], head[:, None], dim[None, :]]
    mask = in_head(is_row, own) & jnp.ones(acc.shape, jnp.bool_)
    plt.store(out_ref, (acc / divisor[:, None]).astype(outs[0].dtype), mask=mask)
    if split:
        plt.store(outs[1].at[out_row, head], top + jnp.log2(divisor), mask=is_row)


def _merge(
    partial: Float[Array, "W H D"], lse: Float[Array, "W H"], start: Int[Array, " S_and_1"], dtype: Any, interpret: bool
) -> Float[Array, "S H D"]:
    """The softmax-weighted mean of each sequence's items, start[s] to start[s + 1]; zeros where it has none."""
    num_seqs, (_, heads, head_dim) = start.shape[0] - 1, partial.shape
    merged: Array = pl.pallas_call(
        _merge_kernel,
        grid=(num_seqs, heads),
        in_specs=[_WHOLE] * 3,
        out_specs=_WHOLE,
        out_shape=jax.ShapeDtypeStruct((num_seqs, heads, head_dim), dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention_merge",
    )(partial, lse, start)
    return merged


def _merge_kernel(partial: Any, lse: Any, start: Any, out: Any) -> None:
    seq, head = pl.program_id(0), pl.program_id(1)
    head_dim = partial.shape[2]
    dim = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    begin, end = plt.load(start.at[seq]), plt.load(start.at[seq + 1])

    def turn(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, top, total = carry
        item = begin + i * _MERGE_ROWS + jnp.arange(_MERGE_ROWS, dtype=jnp.int32)
        is_item = item < end
        log_total = plt.load(lse.at[item, head], mask=is_item, other=-jnp.inf)
        mask = is_item[:, None] & (dim < head_dim)[None, :]
        values = plt.load(partial.at[item[:, None], head, dim[None, :]], mask=mask, other=0.0)
        new_top = jnp.maximum(top, log_total.max(0))
        shrink, weights = jnp.exp2(top - new_top), jnp.exp2(log_total - new_top)
        return acc * shrink + (values * weights[:, None]).sum(0), new_top, total * shrink + weights.sum(0)

    floor = jnp.full((), _FLOOR, jnp.float32)
    carry = (jnp.zeros(dim.shape, jnp.float32), floor, jnp.zeros((), jnp.float32))
    acc, _, total = lax.fori_loop(0, (end - begin + _MERGE_ROWS - 1) // _MERGE_ROWS, turn, carry)
    result = acc / jnp.where(total > 0.0, total, 1.0)
    plt.store(out.at[seq, head, dim], result.astype(out.dtype), mask=dim < head_dim)


def _multiply_dtype(q: Any, pages: Any) -> Any:
    """What keys and queries are multiplied in. 8-bit values are exact in any of q's types."""
    return jnp.dtype(q) if jnp.dtype(pages).itemsize == 1 or q == pages else jnp.dtype(jnp.float32)
