"""What one program of the Mosaic kernels does: warps with roles, TMA for all that moves, wgmma for all that multiplies.

A program computes one work item for one kv head. Its tile has a row for each of the item's tokens and each query head
of the group, all tokens of a head before the next head's: up to 64 rows for one warpgroup that multiplies, up to 128
for two. One more warpgroup, with few registers, only moves data: it asks TMA for q, then for pages of keys and values
`num_stages` blocks ahead, and stores the rows at the end. They hand memory over through barriers: *_ready says that
all copies of a block have arrived, *_free that all have read it. Two that multiply take turns at the tensor cores:

    mover      q, k0 v0, k1 v1   wait for k0 free: k2, wait for v0 free: v2 ...            store
    compute 0  q.k0 | softmax | p.v0, q.k1 | softmax    | p.v1, q.k2 | ...
    compute 1         q.k0    | softmax    | p.v0, q.k1 | softmax    | ...

wgmma reads tiles of 8 rows, swizzled, and items begin at any row of q: so q and the result pass through plain memory,
where q is tiled by way of registers. Whole pages are copied; what a page holds past the item's end is masked as a key
and zeroed as a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from jaxpaged.kernels.work import Work

plgpu: Any = mosaic_gpu  # its types leave out much of it

LOG2_E = math.log2(math.e)
FLOOR = -1e30  # where a row's maximum starts: finite, so that a row that sees nothing yields 0 and not NaN
ROWS = 64  # what one warpgroup's wgmma takes
_MOVER_REGISTERS = 72  # a thread
_COMPUTE_REGISTERS = {1: 248, 2: 216}  # by the number of warpgroups that compute: all in all up to 512


class Plan(NamedTuple):
    """The static facts of a call."""

    scale: float
    window: int | None
    softcap: float | None
    group: int
    head_dim: int
    page_size: int
    block_q: int
    block_k: int
    num_stages: int
    is_split: bool  # into parts that are merged later: float32, with their denominators
    has_sinks: bool
    is_interpreted: bool

    @property
    def warpgroups(self) -> int:
        """Those that compute."""
        return -(-self.block_q * self.group // ROWS)

    @property
    def pitch(self) -> int:
        """Numbers from a row to the next outside tiles: TMA stores from multiples of 128 bytes."""
        return -(-self.head_dim // 64) * 64

    @property
    def rows_per_copy(self) -> int:
        """Keys that lie in one page, wherever a block begins."""
        return math.gcd(self.page_size, self.block_k)

    @property
    def copies(self) -> int:
        """Copies that fill a block of keys."""
        return self.block_k // self.rows_per_copy

    @property
    def swizzle_width(self) -> int:
        """The most numbers that can be swizzled together: 64; 32 of heads of 96, 16 of 80."""
        return math.gcd(self.head_dim, 64)

    @property
    def swizzled(self) -> tuple[Any, ...]:
        """The layout that wgmma reads."""
        return plgpu.TilingTransform((8, self.swizzle_width)), plgpu.SwizzleTransform(2 * self.swizzle_width)


def scratch_of(plan: Plan, dtype: Any) -> dict[str, Any]:
    """A program's shared memory, and its barriers."""
    rows, blocks = plan.warpgroups * ROWS, (plan.num_stages, plan.block_k, plan.head_dim)
    scratch = {
        "rows": plgpu.SMEM((rows, plan.pitch), dtype),  # q as it comes, the result as it goes
        "q": plgpu.SMEM((rows, plan.head_dim), dtype, transforms=plan.swizzled),
        "k": plgpu.SMEM(blocks, dtype, transforms=plan.swizzled),
        "v": plgpu.SMEM(blocks, dtype, transforms=plan.swizzled),
        "q_ready": plgpu.Barrier(num_arrivals=(1 if plan.block_q == 1 else plan.group) + plan.has_sinks),
        "k_ready": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=plan.num_stages),
        "v_ready": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=plan.num_stages),
        "k_free": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.num_stages),
        "v_free": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.num_stages),
        "v_zeroed": plgpu.Barrier(num_arrivals=plan.warpgroups),
        "turn": plgpu.Barrier(num_arrivals=plan.warpgroups),
        "out_ready": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }
    if plan.has_sinks:
        scratch["sinks"] = plgpu.SMEM((rows,), jnp.float32)
    if plan.is_split:
        scratch["parts"] = plgpu.SMEM((rows, plan.pitch), jnp.float32)
        scratch["lse"] = plgpu.SMEM((rows,), jnp.float32)
    if plan.is_interpreted:  # the interpreter's wgmma reads both operands from shared memory
        scratch["weights"] = plgpu.SMEM((rows, plan.block_k), dtype, transforms=plan.swizzled)
    return scratch


def run_program(plan: Plan, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
    """One item for one kv head. `refs` are the kernel's inputs and outputs, by name."""
    warpgroup, index = lax.axis_index("wg"), lax.axis_index("item")

    def item() -> Work:  # read by each role anew: what was kept for both, the mover's registers would not hold
        return Work(*(refs["work"][field, index] for field in range(len(Work._fields))))

    @pl.when(item().num_rows > 0)
    def _work() -> None:
        @pl.when(warpgroup == plan.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(_MOVER_REGISTERS, action="decrease")
            _move(plan, item(), refs, scratch)

        @pl.when(warpgroup < plan.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS[plan.warpgroups], action="increase")
            _compute(plan, item(), warpgroup, refs["q"].shape[0], scratch)


def _first_token(plan: Plan, item: Work, num_tokens: int) -> Array:
    """The row of q of the tile's first token: before the item's own where q ends too soon."""
    return jnp.minimum(item.row, num_tokens - plan.block_q)


def _move(plan: Plan, item: Work, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
    """Bring q, then keys and values block after block; take the result away."""
    kv_head, table, size = lax.axis_index("kv_head"), refs["table"], jnp.int32(plan.page_size)
    first_token = _first_token(plan, item, refs["q"].shape[0])
    # 1, which the compiler does not know: loops of known lengths it unrolls, and their addresses fill the registers.
    one = jnp.minimum(item.num_rows, 1)

    def copy_rows(copy: Callable[[Any, Any], None], outside: Any, token: Array, here: Any) -> None:
        """All rows of a tile whose first token is `token` outside."""
        if plan.block_q == 1:  # its heads adjoin
            copy(outside.at[token, pl.ds(kv_head * plan.group, plan.group)], here.at[pl.ds(0, plan.group)])
            return

        @pl.loop(0, plan.group * one)
        def _(head: Array) -> None:
            rows = outside.at[pl.ds(token, plan.block_q), kv_head * plan.group + head]
            copy(rows, here.at[pl.ds(head * plan.block_q, plan.block_q)])

    def fetch(outside: Any, here: Any) -> None:
        plgpu.copy_gmem_to_smem(outside, here, scratch["q_ready"])

    def store(outside: Any, here: Any) -> None:
        plgpu.copy_smem_to_gmem(here, outside)

    copy_rows(fetch, refs["q"], first_token, scratch["rows"])
    if plan.has_sinks:
        fetch(refs["sinks"].at[kv_head], scratch["sinks"])

    def place(first_key: Array, offset: Array) -> tuple[Array, Any, Any]:
        """The page of a block's keys from `offset` on, the slots in it, and the rows of the block that they fill."""
        key, offset = first_key + offset, pl.multiple_of(offset, plan.rows_per_copy)
        nth = jnp.minimum(lax.div(key, size), table.shape[1] - 1)
        page = jnp.where(key < item.end, table[item.seq, nth], 0)  # past the end: the null page
        slots: Any = slice(None)
        if plan.rows_per_copy < plan.page_size:
            slots = pl.ds(pl.multiple_of(lax.rem(key, size), plan.rows_per_copy), plan.rows_per_copy)
        return page, slots, pl.ds(offset, plan.rows_per_copy)

    at_once = math.gcd(plan.copies, 4)  # page ids that are read before the first is used

    num_blocks = _num_blocks(plan, item)

    @pl.loop(0, num_blocks)
    def _(block: Array) -> None:
        stage, first_key = lax.rem(block, jnp.int32(plan.num_stages)), item.begin + block * plan.block_k
        for side, name in enumerate("kv"):

            @pl.when(block >= plan.num_stages)
            def _(free: Any = scratch[f"{name}_free"]) -> None:
                plgpu.barrier_wait(free.at[stage])

            @pl.loop(0, plan.copies // at_once * one)
            def _(turn: Array, side: int = side, name: str = name) -> None:
                offsets = [(turn * at_once + copy) * plan.rows_per_copy for copy in range(at_once)]
                for page, slots, rows in [place(first_key, offset) for offset in offsets]:
                    source, target = refs["pages"].at[page, slots, side, kv_head, :], scratch[name].at[stage, rows]
                    plgpu.copy_gmem_to_smem(source, target, scratch[f"{name}_ready"].at[stage])

    @pl.loop(jnp.maximum(num_blocks - plan.num_stages, 0), num_blocks)
    def _(block: Array) -> None:  # no barrier goes unseen: jax 0.11's interpreter counts
        for free in ("k_free", "v_free"):
            plgpu.barrier_wait(scratch[free].at[lax.rem(block, jnp.int32(plan.num_stages))])

    plgpu.barrier_wait(scratch["out_ready"])
    out, rows = refs["out"], scratch["rows"]
    if plan.is_split:
        index = lax.axis_index("item")
        copy_rows(store, out, index, scratch["parts"])
        store(refs["lse"].at[index, kv_head], scratch["lse"])
    else:
        pl.when(item.num_rows == plan.block_q)(partial(copy_rows, store, out, item.row, rows))

        @pl.when(item.num_rows < plan.block_q)
        def _() -> None:  # token by token, for the rows around are other items'
            @pl.loop(item.row, item.row + item.num_rows)
            def _(token: Array) -> None:
                @pl.loop(0, plan.group * one)
                def _(head: Array) -> None:
                    row = head * plan.block_q + token - first_token
                    store(out.at[pl.ds(token, 1), kv_head * plan.group + head], rows.at[pl.ds(row, 1)])

    plgpu.wait_smem_to_gmem(0)


def _num_blocks(plan: Plan, item: Work) -> Array:
    return lax.div(item.end - item.begin + (plan.block_k - 1), jnp.int32(plan.block_k))


def _compute(plan: Plan, item: Work, warpgroup: Array, num_tokens: int, scratch: dict[str, Any]) -> None:
    rows, shape = pl.ds(warpgroup * ROWS, ROWS), (ROWS, plan.head_dim)
    by_row = plgpu.Layout.WGMMA.reduce(1)
    plgpu.barrier_wait(scratch["q_ready"])
    columns = range(0, plan.head_dim, plan.swizzle_width)
    for column in (pl.ds(first, plan.swizzle_width) for first in columns):  # 80 is no fraction of a row's pitch, 16 is
        scratch["q"].at[rows, column][...] = _load(scratch["rows"].at[rows, column])
    plgpu.commit_smem()

    if plan.block_q == 1:
        token = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.int32), by_row)
    else:
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row) + warpgroup * ROWS
        token = lax.rem(row, jnp.int32(plan.block_q))
    position = item.position - item.row + _first_token(plan, item, num_tokens) + token
    top = plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), by_row)
    total = plgpu.layout_cast(jnp.full((ROWS,), 0.0, jnp.float32), by_row)
    if plan.has_sinks:
        leads = item.leading.astype(jnp.float32)  # 0 or 1
        top = _load(scratch["sinks"].at[rows], by_row) * leads + (1.0 - leads) * FLOOR
        total = total + leads
    acc = plgpu.layout_cast(jnp.full(shape, 0.0, jnp.float32), plgpu.Layout.WGMMA)

    turn = partial(_turn, plan=plan, item=item, warpgroup=warpgroup, position=position, scratch=scratch)
    num_blocks, whole = _num_blocks(plan, item), jnp.int32(0)
    if plan.warpgroups > 1:
        pl.when(warpgroup == 1)(partial(_meet, scratch["turn"]))
    carry = (acc, top, total)
    if plan.window is None:  # blocks that every row sees whole need no mask
        whole = jnp.clip(lax.div(item.position + 1 - item.begin, jnp.int32(plan.block_k)), 0, num_blocks)
        carry = lax.fori_loop(0, whole, partial(turn, is_masked=False), carry)
    acc, top, total = lax.fori_loop(whole, num_blocks, partial(turn, is_masked=True), carry)
    if plan.warpgroups > 1:
        pl.when(warpgroup == 0)(partial(_meet, scratch["turn"]))

    divisor = jnp.where(total > 0.0, total, 1.0)
    acc = acc * lax.broadcast_in_dim(1.0 / divisor, shape, [0])
    if plan.is_split:
        _store(scratch["lse"].at[rows], top + jnp.log2(divisor))
    result = scratch["parts" if plan.is_split else "rows"]
    for first in columns:
        part = lax.slice(acc, (0, first), (ROWS, first + plan.swizzle_width))
        _store(result.at[rows, pl.ds(first, plan.swizzle_width)], part.astype(result.dtype))
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["out_ready"])


def _turn(
    block: Array,
    carry: tuple[Array, Array, Array],
    *,
    plan: Plan,
    item: Work,
    warpgroup: Array,
    position: Array,
    scratch: dict[str, Any],
    is_masked: bool,
) -> tuple[Array, Array, Array]:
    """One block of keys and values into the softmax."""
    acc, top, total = carry
    tile, rows = (ROWS, plan.block_k), pl.ds(warpgroup * ROWS, ROWS)
    stage = lax.rem(block, jnp.int32(plan.num_stages))
    first_key = item.begin + block * plan.block_k

    def multiply_keys(out: Any) -> Array:
        plgpu.wgmma(out, scratch["q"].at[rows], scratch["k"].at[stage].transpose((1, 0)))
        if plan.warpgroups > 1:
            _meet(scratch["turn"])
        return jnp.asarray(out[...])

    plgpu.barrier_wait(scratch["k_ready"].at[stage])
    scores = pl.run_scoped(multiply_keys, plgpu.ACC(tile, jnp.float32))
    plgpu.barrier_arrive(scratch["k_free"].at[stage])
    factor = plan.scale * LOG2_E
    if plan.softcap is not None:
        scores, factor = jnp.tanh(scores * (plan.scale / plan.softcap)), plan.softcap * LOG2_E
    if is_masked:
        key = plgpu.broadcasted_iota(jnp.int32, tile, 1, layout=plgpu.Layout.WGMMA)
        last = position - first_key
        seen = key <= lax.broadcast_in_dim(last, tile, [0])
        if plan.window is not None:
            seen = seen & (key > lax.broadcast_in_dim(last - plan.window, tile, [0]))
        scores = jnp.where(seen, scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_top, tile, [0]))
    total = total * shrink + weights.sum(axis=1)
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    left = weights.astype(scratch["v"].dtype)
    if plan.is_interpreted:
        scratch["weights"].at[rows][...] = left
        plgpu.commit_smem()
        left = scratch["weights"].at[rows]

    plgpu.barrier_wait(scratch["v_ready"].at[stage])
    if is_masked:
        pl.when(first_key + plan.block_k > item.end)(
            partial(_zero_values, plan, scratch["v"].at[stage], item.end - first_key, warpgroup, scratch["v_zeroed"])
        )
    if plan.warpgroups > 1:
        _meet(scratch["turn"])
        if is_masked:
            pl.when(first_key + plan.block_k > item.end)(partial(plgpu.barrier_wait, scratch["v_zeroed"]))

    def multiply_values(out: Any) -> Any:
        plgpu.wgmma(out, left, scratch["v"].at[stage])
        return jnp.asarray(out[...]) if plan.is_interpreted else None

    if plan.is_interpreted:  # the interpreter knows no accumulator that is handed on
        acc = acc + pl.run_scoped(multiply_values, plgpu.ACC(acc.shape, jnp.float32))
    else:
        acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(scratch["v_free"].at[stage])
    return acc, new_top, total


def _zero_values(plan: Plan, values: Any, num_values: Array, warpgroup: Array, zeroed: Any) -> None:
    """Past the end a page holds anything, and 0 times that need not be 0. The warpgroups share the rows out."""
    for first in range(0, plan.block_k, ROWS):

        @pl.when(warpgroup == first // ROWS % plan.warpgroups)
        def _zero(first: int = first) -> None:
            for column in range(0, plan.head_dim, plan.swizzle_width):  # little at a time, for registers are dear
                part = values.at[pl.ds(first, ROWS), pl.ds(column, plan.swizzle_width)]
                row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
                held = _load(part)
                part[...] = jnp.where(row < num_values - first, held, jnp.zeros_like(held))

    plgpu.commit_smem()
    if plan.warpgroups > 1:
        plgpu.barrier_arrive(zeroed)


def _meet(barrier: Any) -> None:
    """Where the two that compute change turns: one multiplies while the other is at its softmax."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _load(ref: Any, layout: Any = None) -> Array:
    return jnp.asarray(plgpu.load(ref, layout=layout or plgpu.Layout.WGMMA, optimized=False))


def _store(ref: Any, value: Array) -> None:
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # jax 0.11 need not be told
        ref[...] = value
