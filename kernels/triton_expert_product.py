"""Rows times their expert's matrix in Pallas for Triton: a program for each block of rows and each run of columns.

Programs of blocks that hold nothing end at once: how many there are is known on the device only. Columns are the slower
axis of the grid, so that blocks of one expert read its columns at about the same time, from the L2 cache.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, Shaped

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


class Tile(NamedTuple):
    """What a program multiplies at a time: its block's rows, `block_k` of each one's M numbers, `block_f` columns."""

    rows: int
    block_k: int
    block_f: int


def expert_product(
    rows: Float[Array, "N B M"],
    weights: Shaped[Array, "E M F"],
    experts: Int[Array, " N"],
    num_used: Int[Array, ""],
    scale: Float[Array, "E 1 F"] | None = None,
    *,
    tile: Tile,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Float[Array, "N B F"]:
    """rows[n] @ weights[experts[n]], times its scale, of the first `num_used` blocks; nothing is written for others."""
    num_blocks, _, _ = rows.shape
    columns = weights.shape[2]
    used = jnp.where(jnp.arange(num_blocks, dtype=jnp.int32) < num_used, experts, -1)
    given = (rows, weights, used) if scale is None else (rows, weights, used, scale)
    out: Array = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid=(num_blocks, pl.cdiv(columns, tile.block_f)),
        in_specs=[_WHOLE] * len(given),
        out_specs=_WHOLE,
        out_shape=jax.ShapeDtypeStruct((*rows.shape[:2], columns), rows.dtype),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name="expert_product",
    )(*given)
    return out


def _kernel(rows: Any, weights: Any, experts: Any, *scale_and_out: Any, tile: Tile) -> None:
    *scale, out = scale_and_out
    block, column = pl.program_id(0), pl.program_id(1)
    expert = plt.load(experts.at[block])

    @pl.when(expert >= 0)
    def _() -> None:
        row = jnp.arange(tile.rows, dtype=jnp.int32)[:, None]
        f = (column * tile.block_f + jnp.arange(tile.block_f, dtype=jnp.int32))[None]

        def add(turn: Array, total: Array) -> Array:
            k = turn * tile.block_k + jnp.arange(tile.block_k, dtype=jnp.int32)
            x, w = _load(rows, block, row, k[None]), _load(weights, expert, k[:, None], f)
            more: Array = plt.dot(x, w.astype(x.dtype), allow_tf32=False if x.dtype == jnp.float32 else None)
            return total + more

        total = jnp.zeros((tile.rows, tile.block_f), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(weights.shape[1], tile.block_k), add, total)
        for ref in scale:
            total = total * _load(ref, expert, jnp.zeros((1, 1), jnp.int32), f)
        plt.store(out.at[block, row, f], total.astype(out.dtype), mask=_is_inside(out, row, f))


def _load(ref: Any, first: Any, i: Array, j: Array) -> Array:
    """A tile of the matrix ref[first], zeros outside it; without a mask where no tile has an outside."""
    if ref.shape[1] % i.shape[0] == 0 and ref.shape[2] % j.shape[1] == 0:
        whole: Array = plt.load(ref.at[first, i, j])
        return whole
    inside: Array = plt.load(ref.at[first, i, j], mask=_is_inside(ref, i, j), other=0)
    return inside


def _is_inside(ref: Any, i: Array, j: Array) -> Array:
    is_inside: Array = (i < ref.shape[1]) & (j < ref.shape[2])
    return is_inside
