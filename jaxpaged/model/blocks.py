"""Rows computed a fixed number at a time, so that a row's numbers do not depend on how many come with it.

A matrix product of 1 row, of 3 and of 300 are different loops, and a compiler fuses each in its own way: the same row
then differs in its last bits. Here a function only ever sees `BLOCK` rows, in a loop whose length is not known when it
is compiled: that keeps the loop a loop, so the function is compiled by itself, whatever stands around it. That a row's
place within a block does not matter is for the tests to say, backend by backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

BLOCK = 32


def in_blocks(function: Callable[[Any], Any], rows: Any, present: Bool[Array, " R"], *, block: int = BLOCK) -> Any:
    """`function` of all rows: for a pytree of arrays [R, ...] one of arrays [R, ...], zeros after the last present row.

    `function` takes and gives `block` rows, the last ones padded with zeros. `present` must come from an argument, not
    from a constant.
    """
    _, out = carry_blocks(lambda carry, part: (carry, function(part)), (), rows, present, block=block)
    return out


def carry_blocks(
    function: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    rows: Any,
    present: Bool[Array, " R"],
    *,
    block: int = BLOCK,
) -> tuple[Any, Any]:
    """As `in_blocks`, with something that is handed from block to block: function(carry, rows) -> (carry, rows)."""
    num_rows = present.shape[0]
    padding = -num_rows % block
    rows = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, padding), *((0, 0),) * (leaf.ndim - 1))), rows)

    def part(index: Array | int) -> Any:
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, index * block, block), rows)

    _, shapes = jax.eval_shape(lambda carry: function(carry, part(0)), carry)
    out = jax.tree.map(lambda leaf: jnp.zeros((num_rows + padding, *leaf.shape[1:]), leaf.dtype), shapes)

    def one(index: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, out = state
        carry, new = function(carry, part(index))
        return carry, jax.tree.map(lambda to, r: lax.dynamic_update_slice_in_dim(to, r, index * block, 0), out, new)

    end = jnp.max(jnp.where(present, jnp.arange(1, num_rows + 1, dtype=jnp.int32), 0))
    carry, out = lax.fori_loop(0, (end + block - 1) // block, one, (carry, out))
    return carry, jax.tree.map(lambda leaf: leaf[:num_rows], out)
