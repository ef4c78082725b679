"""One step of the engine as a pure function: some tokens of some sequences through the model and the paged cache.

Tokens are laid out decode first: D sequences with one token each, then the chunks of E sequences back to back. Both
counts are told by shapes (D = S - E, E = len(cu_q_lens) - 1), so a bucket is nothing but the arrays' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.paged_attention import Backend, paged_attention, ragged_paged_attention
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.blocks import carry_blocks, in_blocks
from jaxpaged.model.cache import KVCache, Pool
from jaxpaged.model.decoder import Mixture, embed, hidden_states, last_norm, logits, through_layers
from jaxpaged.model.moe import chosen_experts
from jaxpaged.model.params import Params
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Attention, Block, Decoder, LatentAttention, Mixer
from jaxpaged.model.stages import Stage


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
    logit_rows: Int[Array, " R"]  # the tokens whose logits are wanted: each sequence's last, of drafts each


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
    if batch_invariant:
        return _forward_in_blocks(params, cache, inputs, _known(inputs, sampled), spec, attention_backend, placement)
    x = _embedded(params, inputs, sampled, spec, placement)
    x, cache = _through(params["layers"], cache, inputs, x, spec.blocks, attention_backend, placement)
    return cache, _outputs(params, x, inputs, spec)


def forward_stage(
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    carried: Array,
    spec: Decoder,
    stage: Stage,
    attention_backend: Backend = "auto",
    placement: Placement | None = None,
) -> tuple[KVCache, Any]:
    """One pipeline stage's part of `forward`: the cache of its layers, and what it hands on.

    `params` and `cache` are `stage.params(...)` and `stage.cache(...)`. The first stage is given what the step before
    sampled and the others what the one before them gives, [T, M]; the last one gives `ForwardOutputs`.
    """
    x = _embedded(params, inputs, carried, spec, placement) if stage.is_first else carried
    blocks = spec.blocks[stage.begin : stage.end]
    x, cache = _through(params["layers"], cache, inputs, x, blocks, attention_backend, placement)
    return cache, _outputs(params, x, inputs, spec) if stage.is_last else x


def _known(inputs: StepInputs, sampled: Int[Array, " R_before"]) -> Int[Array, " T"]:
    """The step's tokens, those of the step before among them."""
    fed = sampled[jnp.clip(inputs.feedback, 0, sampled.shape[0] - 1)]
    return jnp.where(inputs.feedback >= 0, fed, inputs.token_ids)


def _cut_rows(inputs: StepInputs, placement: Placement | None) -> Callable[..., Array]:
    """cut(x, *logical): x with rows as they are cut in this step, its other axes as said."""
    rows = _row_axis(inputs)

    def cut(x: Array, *logical: str | None) -> Array:
        return x if placement is None else placement.constrain(x, rows, *logical)

    return cut


def _row_axis(inputs: StepInputs) -> str | None:
    """The logical axis of a step's rows. One that only decodes has few: to split them would take more than it saves."""
    return "sequence" if inputs.cu_q_lens.shape[0] > 1 else None


def _mixture(backend: Backend, placement: Placement | None, rows: str | None) -> Mixture:
    """How experts are computed: without kernels where attention is."""
    own: Literal["auto", "reference"] = "reference" if backend == "reference" else "auto"
    return partial(chosen_experts, placement=placement, rows=rows, backend=own)


def _embedded(
    params: Params, inputs: StepInputs, sampled: Int[Array, " R_before"], spec: Decoder, placement: Placement | None
) -> Float[Array, "T M"]:
    cut = _cut_rows(inputs, placement)
    return embed(params, cut(_known(inputs, sampled)), cut(inputs.positions), spec)


def _outputs(params: Params, x: Float[Array, "T M"], inputs: StepInputs, spec: Decoder) -> ForwardOutputs:
    hidden = last_norm(params, x, spec)
    return ForwardOutputs(logits(params, hidden[inputs.logit_rows], spec), hidden)


def _through(
    layers: Sequence[Params],
    cache: KVCache,
    inputs: StepInputs,
    x: Float[Array, "T M"],
    blocks: Sequence[Block],
    attention_backend: Backend,
    placement: Placement | None,
) -> tuple[Float[Array, "T M"], KVCache]:
    """These layers over the pages of `cache`, one pool for each."""
    num_decode = inputs.kv_lens.shape[0] - (inputs.cu_q_lens.shape[0] - 1)
    num_tokens = inputs.token_ids.shape[0]
    cut = _cut_rows(inputs, placement)

    def attend(pool: Pool, q: Array, k: Array, v: Any, a: Mixer, sinks: Array | None) -> tuple[Array, Pool]:
        if placement is None:
            return attend_here(pool, q, k, v, a, sinks, inputs)
        here = _on_heads(
            lambda pool, q, k, v, sinks, inputs: attend_here(pool, q, k, v, a, sinks, inputs), placement, pool, v
        )
        q, k = cut(q, "heads", None), cut(k, None if v is None else "kv_heads", None)
        v = None if v is None else cut(v, "kv_heads", None)
        out, pool = here(pool, q, k, v, sinks, inputs)
        return cut(out, "heads", None), pool

    def attend_here(
        pool: Pool, q: Array, k: Array, v: Array | None, a: Mixer, sinks: Array | None, inputs: StepInputs
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

    mixture = _mixture(attention_backend, placement, _row_axis(inputs))
    where = inputs.positions, inputs.rope_lens
    x, pools = through_layers(layers, x, *where, blocks, cache.pools, attend, mixture)
    return x, KVCache(pools)


def _on_heads(function: Callable[..., Any], placement: Placement, pool: Pool, v: Array | None) -> Callable[..., Any]:
    """function(pool, q, k, v, sinks, the rest) -> (out, pool) as each device computes it with its own heads. Keys that
    are latents, without v, are all heads'.
    """
    heads, pools = placement.partition(None, "attention", None), placement.cache_partition(pool)
    keys = heads if v is not None else placement.partition()
    return placement.on_each(
        function,
        in_specs=(pools, heads, keys, heads, placement.partition("attention"), placement.partition()),
        out_specs=(heads, pools),
    )


class _Rows(NamedTuple):
    """Tokens, each computed as if it alone were decoded."""

    token_ids: Int[Array, " T"]
    positions: Int[Array, " T"]
    rope_lens: Int[Array, " T"]
    slots: Int[Array, " T"]
    sequence: Int[Array, " T"]  # row of the page table
    kv_lens: Int[Array, " T"]  # 0 for padding


def _forward_in_blocks(
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    tokens: Int[Array, " T"],
    spec: Decoder,
    backend: Backend,
    placement: Placement | None,
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

    mixture = _mixture(backend, placement, None)

    def one_block(pools: tuple[Pool, ...], rows: _Rows) -> tuple[tuple[Pool, ...], Array]:
        slots = jnp.where(rows.kv_lens > 0, rows.slots, capacity)
        table = inputs.page_table[rows.sequence]

        def attend(pool: Pool, q: Array, k: Array, v: Any, a: Mixer, sinks: Array | None) -> tuple[Array, Pool]:
            def here(pool: Pool, q: Array, k: Array, v: Any, sinks: Any, block: Any) -> tuple[Array, Pool]:
                slots, table, kv_lens = block
                pool = kv_cache.write(pool, k, v, slots)
                # Splits would be cut by how long the other rows are.
                options = _options(pool, a, sinks, backend) | {"num_splits": 1}
                return paged_attention(q, pool.pages, table, kv_lens, **options), pool

            each = here if placement is None else _on_heads(here, placement, pool, v)
            return each(pool, q, k, v, sinks, (slots, table, rows.kv_lens))

        where = rows.token_ids, rows.positions, rows.rope_lens
        hidden, pools = hidden_states(params, *where, spec, pools, attend, mixture)
        return pools, hidden

    # Data shards that sum inside go round equally often, so that no device can wait for one that is done.
    sums = placement is not None and placement.num_shards("data") not in (1, placement.mesh.size)
    goes_on = inputs.positions >= 0 if sums else kv_lens > 0
    pools, hidden = carry_blocks(one_block, cache.pools, rows, goes_on)
    wanted = in_blocks(lambda part: logits(params, part, spec), hidden[inputs.logit_rows], inputs.logit_rows >= 0)
    return KVCache(pools), ForwardOutputs(wanted, hidden)


def _options(pool: Pool, a: Mixer, sinks: Array | None, backend: Backend) -> dict[str, Any]:
    return attention_options(a) | {"sinks": sinks, "scales": pool.scales, "backend": backend}


def attention_options(mixer: Mixer) -> dict[str, Any]:
    """What the attention ops are told of a layer."""
    match mixer:
        case Attention():
            return {"scale": mixer.scale, "window": mixer.window, "softcap": mixer.softcap}
        case LatentAttention():
            return {"scale": mixer.scale, "v_dim": mixer.kv_rank}
