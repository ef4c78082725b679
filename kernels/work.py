"""What the attention kernels compute, as a list of work items: which queries, over which keys. Pure jnp, on the device.

A kernel takes items one a program and knows nothing of sequences beyond them, so balance is decided here. The number
of items depends on shapes only: a step's launches are the same whatever the lengths (one CUDA graph), and items left
over hold no rows. The lists depend on lengths and not on the layer: in a step of many layers XLA keeps one of each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

# A decode item of fewer blocks of keys than this costs more in its merge than its balance gains: 2 x 64 keys.
_MIN_BLOCKS = 2


class Work(NamedTuple):
    """Item i: `num_rows` consecutive tokens of one sequence attend to its keys [begin, end). All int32."""

    seq: Int[Array, " W"]  # row of the page table
    row: Int[Array, " W"]  # the first token's row of q
    num_rows: Int[Array, " W"]  # 0: nothing to do
    position: Int[Array, " W"]  # the first token's position in its sequence
    begin: Int[Array, " W"]  # a multiple of the block of keys
    end: Int[Array, " W"]  # begin where there is nothing to see: such rows are zeros
    leading: Int[Array, " W"]  # 1 where a sink is to be counted: in one item of those that share a token


def decode_work(
    kv_lens: Int[Array, " S"], *, window: int | None, block_k: int, num_splits: int
) -> tuple[Work, Int[Array, " S+1"]]:
    """S x num_splits items of about equal length for one query a sequence, and where each sequence's items start.

    Chunks of the keys in use get one length c for all sequences, the smallest with which the items suffice:
    the sum of ceil(blocks / c) is at most S + total / c.
    """
    num_seqs = kv_lens.shape[0]
    first = _first_visible(kv_lens - 1, window, block_k)
    blocks = (kv_lens - first + block_k - 1) // block_k
    spare = num_seqs * (num_splits - 1)
    if spare == 0:
        index = jnp.arange(num_seqs, dtype=jnp.int32)
        ones = jnp.ones_like(index)
        work = Work(index, index, ones, kv_lens - 1, first, jnp.maximum(kv_lens, first), ones)
        return work, jnp.arange(num_seqs + 1, dtype=jnp.int32)
    chunk = jnp.maximum((blocks.sum(dtype=jnp.int32) + spare - 1) // spare, _MIN_BLOCKS)
    start = _offsets((blocks + chunk - 1) // chunk)
    seq, nth, used = _members(start, num_seqs * num_splits)
    begin = first[seq] + nth * chunk * block_k
    end = jnp.minimum(begin + chunk * block_k, kv_lens[seq])
    work = Work(seq, seq, used, kv_lens[seq] - 1, begin, end, (nth == 0).astype(jnp.int32))
    return work, start


def chunk_work(
    cu_q_lens: Int[Array, " S_and_1"],
    kv_lens: Int[Array, " S"],
    *,
    num_tokens: int,
    window: int | None,
    block_q: int,
    block_k: int,
) -> Work:
    """Runs of up to `block_q` tokens of one sequence; the rows of q past the last sequence are runs that see nothing.

    A sequence's last run, the one with the most keys, comes first: short items at the end leave no tail.
    """
    num_seqs = kv_lens.shape[0]
    # The padding past the last sequence is one more sequence, without keys.
    bounds = jnp.append(cu_q_lens, num_tokens)
    q_lens = jnp.maximum(bounds[1:] - bounds[:-1], 0)
    runs = (q_lens + block_q - 1) // block_q
    start = _offsets(runs)
    seq, nth, used = _members(start, num_tokens // block_q + num_seqs + 1)
    offset = (runs[seq] - 1 - nth) * block_q
    num_rows = jnp.minimum(q_lens[seq] - offset, block_q) * used
    lens = jnp.append(kv_lens, 0)[seq]
    position = lens - q_lens[seq] + offset
    begin = _first_visible(position, window, block_k)
    end = jnp.maximum(jnp.minimum(position + num_rows, lens), begin)
    is_real = seq < num_seqs
    begin, end = jnp.where(is_real, begin, 0), jnp.where(is_real, end, 0)
    seq_or_any = jnp.minimum(seq, num_seqs - 1)
    return Work(seq_or_any, bounds[seq] + offset, num_rows, position, begin, end, jnp.ones_like(seq))


def _first_visible(position: Array, window: int | None, block_k: int) -> Array:
    """The start of the block of the first key that a query at `position` sees."""
    if window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - window + 1, 0) // block_k * block_k


def _offsets(counts: Int[Array, " N"]) -> Int[Array, " N+1"]:
    return jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))


def _members(start: Int[Array, " N_and_1"], num_items: int) -> tuple[Array, Array, Array]:
    """For each item the group that it belongs to, its number within the group, and 1 if it belongs to any."""
    index = jnp.arange(num_items, dtype=jnp.int32)
    # A sum of comparisons, not searchsorted: N is small, and this is one fusion instead of a loop.
    group = (index[:, None] >= start[None, 1:]).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, start.shape[0] - 2)
    return group, index - start[group], (index < start[-1]).astype(jnp.int32)
