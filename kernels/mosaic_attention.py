"""Paged decode attention in Pallas for Mosaic GPU: Hopper's TMA and wgmma. Needs jax 0.11 or later.

A program computes one work item (see work.py) for one kv head with two warpgroups. One asks TMA for pages of keys and
values, `num_stages` blocks ahead, and has few registers; the other multiplies (wgmma, 64 rows, of which the group's
query heads use G) and keeps the softmax. They hand blocks over through barriers: *_ready says that all copies of a
block have arrived, *_free that it has been read.

The kernel gives each item's unnormalised sum, maximum and denominator. Parts of a sequence are put together in jnp, and
sinks are added there. Whole pages are copied, so what a page holds past its sequence's end must be finite: it is
multiplied by 0. TMA moves tiles of 8 rows by 64 numbers, hence pages of a multiple of 8 and heads of 64 or 128.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.work import decode_work

plgpu: Any = mosaic_gpu  # its types leave out much of it

_LOG2_E = math.log2(math.e)
_FLOOR = -1e30  # where a row's maximum starts: finite, so that a row that sees nothing yields 0 and not NaN
_ROWS = 64  # what one warpgroup's wgmma takes
_MEMORY_REGISTERS, _COMPUTE_REGISTERS = 40, 232


class _Plan(NamedTuple):
    """The static facts of a call."""

    page_size: int
    block_k: int
    num_stages: int
    scale: float
    window: int | None
    softcap: float | None
    is_interpreted: bool

    @property
    def rows_per_copy(self) -> int:
        return min(self.page_size, self.block_k)

    @property
    def copies(self) -> int:
        """Copies that fill a block of keys."""
        return self.block_k // self.rows_per_copy


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
    block_k: int,
    num_stages: int,
    num_splits: int,
    interpret: Any = None,
) -> Float[Array, "S H D"]:
    """One query a sequence, keys cut in S x num_splits items. `interpret` takes Mosaic's interpreter's parameters."""
    num_seqs, heads, dim = q.shape
    kv_heads = pages.shape[3]
    group = heads // kv_heads
    stored_rows = -(-group // 8) * 8
    work, start = decode_work(kv_lens, window=window, block_k=block_k, num_splits=num_splits)
    num_items = work.seq.shape[0]
    plan = _Plan(pages.shape[1], block_k, num_stages, scale, window, softcap, interpret is not None)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def body(*refs: Any) -> None:
        scratch = {
            "q": plgpu.SMEM((_ROWS, dim), q.dtype, transforms=tiled),
            "k": plgpu.SMEM((num_stages, block_k, dim), q.dtype, transforms=tiled),
            "v": plgpu.SMEM((num_stages, block_k, dim), q.dtype, transforms=tiled),
            "out": plgpu.SMEM((_ROWS, dim), jnp.float32),
            "stats": plgpu.SMEM((2, _ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(),
            "k_ready": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=num_stages),
            "v_ready": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=num_stages),
            "k_free": plgpu.Barrier(num_barriers=num_stages),
            "v_free": plgpu.Barrier(num_barriers=num_stages),
        }
        if plan.is_interpreted:  # the interpreter's wgmma reads both operands from shared memory
            scratch["weights"] = plgpu.SMEM((_ROWS, block_k), q.dtype, transforms=tiled)
        pl.run_scoped(partial(_program, refs, plan, stored_rows), **scratch, collective_axes="wg")

    shape = (num_items, kv_heads, stored_rows)
    float32 = jnp.float32
    acc, stats = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((*shape, dim), float32), jax.ShapeDtypeStruct((*shape[:2], 2, _ROWS), float32)],
        grid=(num_items, kv_heads),
        grid_names=("item", "kv_head"),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(
        jnp.pad(q.reshape(num_seqs, kv_heads, group, dim), ((0, 0), (0, 0), (0, _ROWS - group), (0, 0))),
        pages,
        page_table,
        jnp.stack([work.seq, work.position, work.begin, work.end]),
    )
    acc, top, total = acc[:, :, :group], stats[:, :, 0, :group], stats[:, :, 1, :group]
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, group) * _LOG2_E
    return _merge(acc, top, total, start, sink).reshape(q.shape).astype(q.dtype)


def _program(refs: tuple[Any, ...], plan: _Plan, stored_rows: int, **scratch: Any) -> None:
    q_ref, pages_ref, table_ref, work_ref, acc_ref, stats_ref = refs
    item, kv_head, warpgroup = lax.axis_index("item"), lax.axis_index("kv_head"), lax.axis_index("wg")
    seq, position, begin, end = (work_ref[field, item] for field in range(4))
    num_blocks = lax.div(end - begin + plan.block_k - 1, jnp.int32(plan.block_k))

    @pl.when(warpgroup == 1)
    def _copy() -> None:
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")

        def copy_block(block: Array, nothing: tuple[()]) -> tuple[()]:
            stage = lax.rem(block, jnp.int32(plan.num_stages))

            @pl.when(block >= plan.num_stages)
            def _wait() -> None:
                plgpu.barrier_wait(scratch["k_free"].at[stage])
                plgpu.barrier_wait(scratch["v_free"].at[stage])

            for side, (rows, ready) in enumerate((("k", "k_ready"), ("v", "v_ready"))):
                for copy in range(plan.copies):
                    token = begin + block * plan.block_k + copy * plan.rows_per_copy
                    nth = jnp.minimum(lax.div(token, jnp.int32(plan.page_size)), table_ref.shape[1] - 1)
                    page = jnp.where(token < end, table_ref[seq, nth], 0)  # past the end: the null page
                    slots: Any = slice(None)
                    if plan.page_size > plan.block_k:
                        slot = pl.multiple_of(lax.rem(token, jnp.int32(plan.page_size)), plan.block_k)
                        slots = pl.ds(slot, plan.block_k)
                    plgpu.copy_gmem_to_smem(
                        pages_ref.at[page, slots, side, kv_head, :],
                        scratch[rows].at[stage, pl.ds(copy * plan.rows_per_copy, plan.rows_per_copy)],
                        scratch[ready].at[stage],
                    )
            return nothing

        lax.fori_loop(0, num_blocks, copy_block, ())

    @pl.when(warpgroup == 0)
    def _compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        plgpu.copy_gmem_to_smem(q_ref.at[seq, kv_head], scratch["q"], scratch["q_ready"])
        plgpu.barrier_wait(scratch["q_ready"])
        by_row = plgpu.Layout.WGMMA.reduce(1)
        dim = scratch["q"].shape[1]
        carry = (
            plgpu.layout_cast(jnp.full((_ROWS, dim), 0, jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((_ROWS,), _FLOOR, jnp.float32), by_row),
            plgpu.layout_cast(jnp.full((_ROWS,), 0, jnp.float32), by_row),
        )
        turn = partial(_turn, plan=plan, position=position, begin=begin, scratch=scratch)
        acc, top, total = lax.fori_loop(0, num_blocks, turn, carry)
        scratch["out"][...] = acc
        scratch["stats"][0, :] = top
        scratch["stats"][1, :] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch["out"].at[pl.ds(0, stored_rows)], acc_ref.at[item, kv_head])
        plgpu.copy_smem_to_gmem(scratch["stats"], stats_ref.at[item, kv_head])
        plgpu.wait_smem_to_gmem(0)


def _turn(
    block: Array,
    carry: tuple[Array, Array, Array],
    *,
    plan: _Plan,
    position: Array,
    begin: Array,
    scratch: dict[str, Any],
) -> tuple[Array, Array, Array]:
    """One block of keys and values into the softmax."""
    acc, top, total = carry
    stage = lax.rem(block, jnp.int32(plan.num_stages))
    tile = (_ROWS, plan.block_k)

    def multiply_keys(out: Any) -> Array:
        plgpu.wgmma(out, scratch["q"], scratch["k"].at[stage].transpose((1, 0)))
        return jnp.asarray(out[...])

    plgpu.barrier_wait(scratch["k_ready"].at[stage])
    scores = pl.run_scoped(multiply_keys, plgpu.ACC(tile, jnp.float32)) * plan.scale
    plgpu.barrier_arrive(scratch["k_free"].at[stage])
    if plan.softcap is not None:
        scores = plan.softcap * jnp.tanh(scores * (1.0 / plan.softcap))
    key = plgpu.broadcasted_iota(jnp.int32, tile, 1, layout=plgpu.Layout.WGMMA) + (begin + block * plan.block_k)
    seen = key <= position if plan.window is None else (key <= position) & (key > position - plan.window)
    scores = jnp.where(seen, scores * _LOG2_E, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, tile, [0]))
    total = total * shrink + weights.sum(axis=1)

    def multiply_values(out: Any) -> Array:
        left = weights.astype(scratch["v"].dtype)
        if plan.is_interpreted:
            scratch["weights"][...] = left
            plgpu.commit_smem()
            left = scratch["weights"]
        plgpu.wgmma(out, left, scratch["v"].at[stage])
        return jnp.asarray(out[...])

    plgpu.barrier_wait(scratch["v_ready"].at[stage])
    # A fresh accumulator and an addition: the interpreter knows no accumulator that is handed on.
    added = pl.run_scoped(multiply_values, plgpu.ACC(acc.shape, jnp.float32))
    plgpu.barrier_arrive(scratch["v_free"].at[stage])
    return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + added, new_top, total


def _merge(
    acc: Float[Array, "W K G D"],
    top: Float[Array, "W K G"],
    total: Float[Array, "W K G"],
    start: Int[Array, " bounds"],
    sink: Float[Array, "K G"] | None,
) -> Float[Array, "S K G D"]:
    """Each sequence's items, start[s] to start[s + 1], as one softmax, to whose denominator a sink adds."""
    index = jnp.arange(acc.shape[0], dtype=jnp.int32)
    member = ((index[None] >= start[:-1, None]) & (index[None] < start[1:, None]))[:, :, None, None]
    highest = jnp.where(member, top[None], _FLOOR).max(1)  # [S, K, G]
    if sink is not None:
        highest = jnp.maximum(highest, sink[None])
    weights = jnp.where(member, jnp.exp2(jnp.minimum(top[None] - highest[:, None], 0.0)), 0.0)
    divisor = (weights * total[None]).sum(1)
    if sink is not None:
        divisor += jnp.exp2(sink[None] - highest)
    merged = jnp.einsum("swkg,wkgd->skgd", weights, acc, precision=lax.Precision.HIGHEST)
    return merged / jnp.where(divisor > 0.0, divisor, 1.0)[..., None]
