"""One step of the engine as a pure function: some tokens of some sequences through the model and the paged cache.

Tokens are laid out decode first: D sequences with one token each, then the chunks of E sequences back to back. Both
counts are told by shapes (D = S - E, E = len(cu_q_lens) - 1), so a bucket is nothing but the arrays' shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.paged_attention import Backend, paged_attention, ragged_paged_attention
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.blocks import carry_blocks, in_blocks
from jaxpaged.model.cache import KVCache, Pool
from jaxpaged.model.decoder import hidden_states, logits
from jaxpaged.model.params import Params
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Attention, Decoder


class StepInputs(NamedTuple):
    """What one step computes: T tokens of S = D + E sequences, of which D decode. Padding everywhere is harmless.

    A token whose `feedback` is not -1 is not in `token_ids` yet: it is row `feedback` of what the step before sampled,
    still on the device.
    """

    token_ids: Int[Array, " T"]
    feedback: Int[Array, " T"]
    positions: Int[Array, " T"]
    rope_lens: Int[Array, " T"]  # see spec.DynamicNtkScaling
    slots: Int[Array, " T"]  # where K and V go: page * page_size + offset; past the pool for padding
    page_table: Int[Array, "S max_pages"]
    kv_lens: Int[Array, " S"]  # the new tokens included; 0 for padding
    cu_q_lens: Int[Array, " E+1"]  # offsets of the chunks among the last T - D tokens
    logit_rows: Int[Array, " R"]  # the tokens whose logits are wanted


class ForwardOutputs(NamedTuple):
    """What the model says: logits of the wanted rows, and every token's last hidden state (for prompt logprobs)."""

    logits: Float[Array, "R V"]
    hidden: Float[Array, "T M"]


def forward(
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    sampled: Int[Array, " R_before"],
    spec: Decoder,
    attention_backend: Backend = "auto",
    batch_invariant: bool = False,
    placement: Placement | None = None,
) -> tuple[KVCache, ForwardOutputs]:
    """Write the step's keys and values to their pages and compute its logits. Pure; donate `cache`.

    `sampled` are the tokens of the step before, read where `inputs.feedback` says so. `spec` and what follows it are
    static. With `batch_invariant` a token's numbers depend on the tokens before it alone; with a placement params and
    cache lie on its mesh, and each device attends with its heads; where it cuts data, this is one shard's step.
    """
    fed = sampled[jnp.clip(inputs.feedback, 0, sampled.shape[0] - 1)]
    tokens = jnp.where(inputs.feedback >= 0, fed, inputs.token_ids)
    if batch_invariant:
        return _forward_in_blocks(params, cache, inputs, tokens, spec, attention_backend)
    num_decode = inputs.kv_lens.shape[0] - (inputs.cu_q_lens.shape[0] - 1)
    num_tokens = inputs.token_ids.shape[0]
    # A step that only decodes has few rows: to split them would take longer than it saves.
    rows = "sequence" if num_decode < num_tokens else None

    def cut(x: Array, *logical: str | None) -> Array:
        return x if placement is None else placement.constrain(x, *logical)

    def attend(pool: Pool, q: Array, k: Array, v: Array, a: Attention, sinks: Array | None) -> tuple[Array, Pool]:
        if placement is None:
            return attend_here(pool, q, k, v, a, sinks, inputs)
        heads = placement.partition(None, "attention", None)
        pools = placement.cache_partition(pool)
        here = placement.on_each(
            lambda pool, q, k, v, sinks, inputs: attend_here(pool, q, k, v, a, sinks, inputs),
            in_specs=(pools, heads, heads, heads, placement.partition("attention"), placement.partition()),
            out_specs=(heads, pools),
        )
        q, k, v = cut(q, rows, "heads", None), cut(k, rows, "kv_heads", None), cut(v, rows, "kv_heads", None)
        out, pool = here(pool, q, k, v, sinks, inputs)
        return cut(out, rows, "heads", None), pool

    def attend_here(
        pool: Pool, q: Array, k: Array, v: Array, a: Attention, sinks: Array | None, inputs: StepInputs
    ) -> tuple[Array, Pool]:
        pool = kv_cache.write(pool, k, v, inputs.slots)
        table, lens = inputs.page_table, inputs.kv_lens
        options = _options(pool, a, sinks, attention_backend)
        parts = []
        if num_decode > 0:
            decode = q[:num_decode], pool.pages, table[:num_decode], lens[:num_decode]
            parts.append(paged_attention(*decode, **options))
        if num_decode < num_tokens:
            chunks = q[num_decode:], pool.pages, table[num_decode:], inputs.cu_q_lens, lens[num_decode:]
            parts.append(ragged_paged_attention(*chunks, **options))
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], pool

    tokens, positions, rope_lens = (cut(x, rows) for x in (tokens, inputs.positions, inputs.rope_lens))
    hidden, pools = hidden_states(params, tokens, positions, rope_lens, spec, cache.pools, attend)
    return KVCache(pools), ForwardOutputs(logits(params, hidden[inputs.logit_rows], spec), hidden)


class _Rows(NamedTuple):
    """Tokens, each computed as if it alone were decoded."""

    token_ids: Int[Array, " T"]
    positions: Int[Array, " T"]
    rope_lens: Int[Array, " T"]
    slots: Int[Array, " T"]
    sequence: Int[Array, " T"]  # row of the page table
    kv_lens: Int[Array, " T"]  # 0 for padding


def _forward_in_blocks(
    params: Params, cache: KVCache, inputs: StepInputs, tokens: Int[Array, " T"], spec: Decoder, backend: Backend
) -> tuple[KVCache, ForwardOutputs]:
    """The step as a loop over blocks of tokens (see `blocks.py`), those of prompts too: all are decoded.

    So there is one shape of everything, and a chunk's borders mean nothing. A block's keys are written before its
    queries read, and blocks come in order: every token finds those before it.
    """
    num_decode = inputs.kv_lens.shape[0] - (inputs.cu_q_lens.shape[0] - 1)
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    chunk = jnp.searchsorted(inputs.cu_q_lens[1:], index - num_decode, side="right").astype(jnp.int32)
    sequence = jnp.minimum(jnp.where(index < num_decode, index, num_decode + chunk), inputs.kv_lens.shape[0] - 1)
    capacity = cache.num_pages * cache.page_size
    kv_lens = jnp.where(inputs.slots < capacity, inputs.positions + 1, 0)
    rows = _Rows(tokens, inputs.positions, inputs.rope_lens, inputs.slots, sequence, kv_lens)

    def one_block(pools: tuple[Pool, ...], rows: _Rows) -> tuple[tuple[Pool, ...], Array]:
        slots = jnp.where(rows.kv_lens > 0, rows.slots, capacity)
        table = inputs.page_table[rows.sequence]

        def attend(pool: Pool, q: Array, k: Array, v: Array, a: Attention, sinks: Array | None) -> tuple[Array, Pool]:
            pool = kv_cache.write(pool, k, v, slots)
            # Splits would be cut by how long the other rows are.
            options = _options(pool, a, sinks, backend) | {"num_splits": 1}
            return paged_attention(q, pool.pages, table, rows.kv_lens, **options), pool

        hidden, pools = hidden_states(params, rows.token_ids, rows.positions, rows.rope_lens, spec, pools, attend)
        return pools, hidden

    pools, hidden = carry_blocks(one_block, cache.pools, rows, kv_lens > 0)
    wanted = in_blocks(lambda part: logits(params, part, spec), hidden[inputs.logit_rows], inputs.logit_rows >= 0)
    return KVCache(pools), ForwardOutputs(wanted, hidden)


def _options(pool: Pool, a: Attention, sinks: Array | None, backend: Backend) -> dict[str, Any]:
    meaning = {"scale": a.scale, "window": a.window, "softcap": a.softcap, "sinks": sinks}
    return meaning | {"scales": pool.scales, "backend": backend}
