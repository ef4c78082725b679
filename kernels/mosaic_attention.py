"""Paged attention in Pallas for Mosaic GPU: Hopper's TMA and wgmma. Needs jax 0.11 or later.

Both ops are the same kernel over different lists of work (work.py): what a program does with its item stands in
mosaic_program.py. Decode's parts of a sequence come with their denominators and are put together in jnp.

TMA moves 8 tokens of a page at the least, hence page sizes are multiples of 8. Rows it moves singly take multiples of
128 bytes: q and the result of heads of other sizes are padded, keys and values never are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.mosaic_program import FLOOR, LOG2_E, ROWS, Plan, plgpu, run_program, scratch_of
from jaxpaged.kernels.tiles import Tiles
from jaxpaged.kernels.work import Work, chunk_work, decode_work


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
    scales: None,
    tiles: Tiles,
    num_splits: int,
    interpret: Any,
) -> Float[Array, "S H D"]:
    """One query a sequence, keys cut in S x num_splits items. `interpret` may be parameters of Mosaic's interpreter."""
    work, start = decode_work(kv_lens, window=window, block_k=tiles.block_k, num_splits=num_splits)
    meaning: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    attend = partial(_attend, q, pages, page_table, work, sinks, tiles._replace(block_q=1), interpret, **meaning)
    if num_splits == 1:
        return attend(name="paged_attention_decode")[0]
    parts, lse = attend(name="paged_attention_decode_split", is_split=True)
    return _merge(parts, lse, start).astype(q.dtype)


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
    scales: None,
    tiles: Tiles,
    interpret: Any,
) -> Float[Array, "T H D"]:
    """Any number of newest tokens a sequence, in runs of `tiles.block_q`."""
    work = chunk_work(
        cu_q_lens, kv_lens, num_tokens=q.shape[0], window=window, block_q=tiles.block_q, block_k=tiles.block_k
    )
    meaning: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    return _attend(q, pages, page_table, work, sinks, tiles, interpret, name="paged_attention_ragged", **meaning)[0]


def _attend(
    q: Array,
    pages: Array,
    page_table: Array,
    work: Work,
    sinks: Array | None,
    tiles: Tiles,
    interpret: Any,
    *,
    name: str,
    is_split: bool = False,
    **meaning: Any,
) -> list[Array]:
    """[T, H, D] in q's dtype; or of a split one, each item's result [W, H, D] and log2 of its denominator [W, H]."""
    (num_tokens, heads, dim), kv_heads, num_items = q.shape, pages.shape[3], work.seq.shape[0]
    plan = Plan(
        **meaning,
        group=heads // kv_heads,
        head_dim=dim,
        page_size=pages.shape[1],
        block_q=tiles.block_q,
        block_k=tiles.block_k,
        num_stages=tiles.num_stages,
        is_split=is_split,
        has_sinks=sinks is not None,
        is_interpreted=bool(interpret),
    )
    rows = plan.warpgroups * ROWS
    # A tile's q is copied whole, so there must be enough of it.
    q = jnp.pad(q, ((0, max(0, plan.block_q - num_tokens)), (0, 0), (0, plan.pitch - dim)))
    inputs = [q, pages, page_table, jnp.stack(work)]
    if sinks is not None:
        of_rows = jnp.repeat(sinks.astype(jnp.float32).reshape(kv_heads, plan.group) * LOG2_E, plan.block_q, axis=1)
        inputs.append(jnp.pad(of_rows, ((0, 0), (0, rows - of_rows.shape[1]))))
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if is_split:
        outputs = [
            jax.ShapeDtypeStruct((num_items, heads, plan.pitch), jnp.float32),
            jax.ShapeDtypeStruct((num_items, kv_heads, rows), jnp.float32),
        ]

    def body(*refs: Any) -> None:
        named = dict(
            zip(("q", "pages", "table", "work", *["sinks"] * plan.has_sinks, "out", "lse"), refs, strict=False)
        )
        pl.run_scoped(partial(run_program, plan, named), scratch_of(plan, q.dtype), collective_axes="wg")

    out, *lse = plgpu.kernel(
        body,
        out_type=outputs,
        grid=(num_items, kv_heads),
        grid_names=("item", "kv_head"),
        num_threads=plan.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        **({"interpret": plgpu.InterpretGPUParams() if interpret is True else interpret} if interpret else {}),
    )(*inputs)
    if is_split:
        return [out[..., :dim], lse[0][..., : plan.group].reshape(num_items, heads)]
    return [out[:num_tokens, :, :dim]]


def _merge(
    parts: Float[Array, "W H D"], lse: Float[Array, "W H"], start: Int[Array, " S_and_1"]
) -> Float[Array, "S H D"]:
    """The softmax-weighted mean of each sequence's items, start[s] to start[s + 1]; zeros where it has none."""
    index = jnp.arange(parts.shape[0], dtype=jnp.int32)
    member = ((index[None] >= start[:-1, None]) & (index[None] < start[1:, None]))[:, :, None]
    top = jnp.where(member, lse[None], FLOOR).max(1)  # [S, H]
    weights = jnp.where(member, jnp.exp2(lse[None] - top[:, None]), 0.0)
    total = weights.sum(1)
    written = jnp.where((index < start[-1])[:, None, None], parts, 0.0)
    merged = jnp.einsum("swh,whd->shd", weights, written, precision=lax.Precision.HIGHEST)
    return merged / jnp.where(total > 0.0, total, 1.0)[..., None]
