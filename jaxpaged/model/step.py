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
from jaxpaged.model.cache import KVCache, Pool
from jaxpaged.model.decoder import hidden_states, logits
from jaxpaged.model.params import Params
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
) -> tuple[KVCache, ForwardOutputs]:
    """Write the step's keys and values to their pages and compute its logits. Pure; donate `cache`.

    `sampled` are the tokens of the step before, read where `inputs.feedback` says so. `spec` and `attention_backend`
    are static.
    """
    num_decode = inputs.kv_lens.shape[0] - (inputs.cu_q_lens.shape[0] - 1)
    num_tokens = inputs.token_ids.shape[0]

    def attend(pool: Pool, q: Array, k: Array, v: Array, a: Attention, sinks: Array | None) -> tuple[Array, Pool]:
        pool = kv_cache.write(pool, k, v, inputs.slots)
        table, lens = inputs.page_table, inputs.kv_lens
        options: dict[str, Any] = {"scale": a.scale, "window": a.window, "softcap": a.softcap, "sinks": sinks}
        options |= {"scales": pool.scales, "backend": attention_backend}
        parts = []
        if num_decode > 0:
            decode = q[:num_decode], pool.pages, table[:num_decode], lens[:num_decode]
            parts.append(paged_attention(*decode, **options))
        if num_decode < num_tokens:
            chunks = q[num_decode:], pool.pages, table[num_decode:], inputs.cu_q_lens, lens[num_decode:]
            parts.append(ragged_paged_attention(*chunks, **options))
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0], pool

    fed = sampled[jnp.clip(inputs.feedback, 0, sampled.shape[0] - 1)]
    tokens = jnp.where(inputs.feedback >= 0, fed, inputs.token_ids)
    hidden, pools = hidden_states(params, tokens, inputs.positions, inputs.rope_lens, spec, cache.pools, attend)
    return KVCache(pools), ForwardOutputs(logits(params, hidden[inputs.logit_rows], spec), hidden)
