"""Drawing a token a row in Pallas for Triton: one program a row, one launch for all. See sampling.py for the meaning.

A program walks its row a block at a time and again for every question asked of it: a row of 128,256 float32 is half a
megabyte, and stays in the L2 cache. Logits are read as their distance from the row's largest, whose bits order them as
whole numbers do: 0 is the likeliest, INFINITY a token that cannot be, larger ones are NaN and never counted. A search
among them keeps to numbers that occur, so it ends as soon as two neighbours are left, after 31 turns at the latest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

_INFINITY = 0x7F800000  # the bits of a float32's
_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


class Rows(NamedTuple):
    """How each row is drawn: arrays outside, references inside."""

    is_drawn: Any  # int32, 0: nothing is wanted
    uniform: Any
    floor: Any  # smallest distance from the largest logit that min-p leaves, -inf for any
    top_k: Any
    top_p: Any


def draw(
    x: Float[Array, "R V"], rows: Rows, *, block: int, num_warps: int, interpret: bool = False
) -> Int[Array, " R"]:
    """A token for each row of `x`, which temperature has divided; 0 where none is wanted."""
    tokens: Array = pl.pallas_call(
        functools.partial(_draw_kernel, block=block),
        grid=x.shape[:1],
        in_specs=[_WHOLE, Rows(*[_WHOLE] * len(rows))],
        out_specs=_WHOLE,
        out_shape=jax.ShapeDtypeStruct(x.shape[:1], jnp.int32),
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name="sampling_draw",
    )(x, rows)
    return tokens


def _draw_kernel(x: Any, rows: Rows, out: Any, *, block: int) -> None:
    row = pl.program_id(0)
    is_drawn = plt.load(rows.is_drawn.at[row]) > 0

    @pl.when(jnp.logical_not(is_drawn))
    def _() -> None:
        plt.store(out.at[row], jnp.int32(0))

    @pl.when(is_drawn)
    def _() -> None:
        plt.store(out.at[row], _draw_row(x, Rows(*(plt.load(ref.at[row]) for ref in rows)), row, block))


def _draw_row(x: Any, given: Rows, row: Array, block: int) -> Array:
    vocab = x.shape[1]
    num_blocks = -(-vocab // block)
    lane = jnp.arange(block, dtype=jnp.int32)

    def load(index: Array) -> Array:
        token = index * block + lane
        return plt.load(x.at[row, token], mask=token < vocab, other=-jnp.inf)

    def over_blocks(turn: Callable[[Array, Any], Any], carry: Any) -> Any:
        return lax.fori_loop(0, num_blocks, turn, carry)

    top = over_blocks(lambda i, top: jnp.maximum(top, load(i)), jnp.full(block, -jnp.inf)).max()

    def distances(index: Array) -> Array:
        """Bits of how far a block's logits are from the largest."""
        return _bits(load(index) - top)

    def search(least: Array, most: Array, weigh: Callable[[Array], Array], wanted: Array) -> Array:
        """The least distance within which `wanted` lies, by `weigh` of distances; `most` is far enough."""

        def turn(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            least, most = bounds
            middle = least + lax.div(most - least, jnp.int32(2))

            def one(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                total, last, following = carry
                far = distances(index)
                is_near, weight = far <= middle, weigh(far)
                return (
                    total + jnp.where(is_near, weight, jnp.zeros_like(weight)),
                    jnp.maximum(last, jnp.where(is_near, far, 0)),
                    jnp.minimum(following, jnp.where(is_near, _INFINITY, far)),
                )

            zeros = jnp.zeros(block, jnp.int32)
            total, last, following = over_blocks(one, (zeros.astype(wanted.dtype), zeros, zeros + _INFINITY))
            is_enough = total.sum() >= wanted
            return (
                jnp.where(is_enough, least, jnp.minimum(following.min(), most)),
                jnp.where(is_enough, last.max(), most),
            )

        found, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], turn, (least, most))
        return found

    def weights(far: Array, limit: Array) -> Array:
        return jnp.where(far <= limit, jnp.exp(-lax.bitcast_convert_type(far, jnp.float32)), 0.0)

    def total_weight(limit: Array) -> Array:
        """Added in the order in which the draw adds."""
        total: Array = over_blocks(lambda i, total: total + weights(distances(i), limit).sum(), jnp.float32(0))
        return total

    zero, infinity = jnp.int32(0), jnp.int32(_INFINITY)
    limit = _bits(given.floor)
    # A search without room ends before it begins.
    least = jnp.where(given.top_k < vocab, zero, infinity)
    limit = jnp.minimum(limit, search(least, infinity, jnp.ones_like, given.top_k))
    least = jnp.where(given.top_p < 1, zero, limit)
    total = total_weight(limit)
    limit = search(least, limit, lambda far: weights(far, infinity), given.top_p * total)
    total = lax.cond(given.top_p < 1, lambda: total_weight(limit), lambda: total)
    target = given.uniform * total

    def look(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, found, start = carry
        added = weights(distances(index), limit).sum()
        # Until the target is passed, the last block that adds anything.
        is_open = start < 0
        passes = before + added > target
        found = jnp.where(is_open & (added > 0), index, found)
        return before + added, found, jnp.where(is_open & passes, before, start)

    nowhere = jnp.float32(-1)
    _, found, start = over_blocks(look, (jnp.float32(0), zero, nowhere))
    inside = weights(distances(found), limit)
    token = found * block + lane
    is_possible = inside > 0
    # Where rounding keeps all sums below the target, `start` is -1, none passes here, and the last possible one it is.
    passes = is_possible & (start + jnp.cumsum(inside) > target)
    last = jnp.where(is_possible, token, 0).max()
    return jnp.where(passes, token, last).min()


def _bits(x: Array) -> Array:
    """Of |x|."""
    return lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
