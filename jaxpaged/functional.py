"""The engine's step as pure functions, for programs that want no engine: a trainer, an experiment, one's own sampler.

    cache = init_cache(spec, num_pages=64, page_size=16, dtype="float32")
    inputs = pack([Span(prompt, start=0, pages=[1, 2, 3])], cache)
    cache, outputs = jax.jit(step, static_argnames="spec", donate_argnums=1)(params, cache, inputs, spec=spec)

Nothing here has state, starts a thread or touches JAX's configuration; all but `pack` may be used inside the caller's
jit, scan and shard_map. Which page belongs to whom is the caller's to know; page 0 is the null page and nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.paged_attention import Backend
from jaxpaged.model.blocks import in_blocks
from jaxpaged.model.cache import KVCache, Pool, auto_dtype, init_cache
from jaxpaged.model.decoder import apply
from jaxpaged.model.lora import Adapter, Factors, init_adapter, with_adapter
from jaxpaged.model.params import Params
from jaxpaged.model.sampling import logprobs_in_blocks
from jaxpaged.model.spec import Decoder
from jaxpaged.model.step import ForwardOutputs, StepInputs, forward

__all__ = [
    "Adapter",
    "Factors",
    "ForwardOutputs",
    "KVCache",
    "Pool",
    "Span",
    "StepInputs",
    "apply",
    "decode_loop",
    "init_adapter",
    "init_cache",
    "pack",
    "score",
    "step",
    "with_adapter",
]

_SCORED_ROWS = 256  # tokens whose logits are held at a time

Sampler = Callable[[Array, Array], Array]
"""sampler(logits [S, V], positions [S]) -> token ids int32 [S]; `positions` are those of the sampled tokens."""


class Span(NamedTuple):
    """New tokens of one sequence: from position `start`, in a sequence whose page ids, in order, are `pages`.

    `prompt_len` matters to ropes that go by the prompt's length (see spec.DynamicNtkScaling); None: start + len.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    prompt_len: int | None = None


def pack(spans: Sequence[Span], cache: KVCache, *, max_pages: int | None = None) -> StepInputs:
    """One step's inputs: outputs.logits[i] will be those after the last token of spans[i].

    `max_pages` fixes the width of the page table, so that one compilation serves longer sequences. Raises ValueError
    where a span is empty or its pages do not hold it.
    """
    size, pool_pages = cache.page_size, cache.num_pages
    width = max_pages if max_pages is not None else max((len(s.pages) for s in spans), default=1)
    for index, span in enumerate(spans):
        end = span.start + len(span.token_ids)
        if not span.token_ids:
            raise ValueError(f"span {index} has no token; leave it out")
        if end > len(span.pages) * size or len(span.pages) > width:
            raise ValueError(
                f"span {index} ends at token {end:,} but its {len(span.pages):,} pages hold {len(span.pages) * size:,} "
                f"tokens, and page tables are {width:,} wide; give it {-(-end // size):,} pages"
            )
        if min(span.pages) < 1 or max(span.pages) >= pool_pages:
            raise ValueError(
                f"span {index} names pages {min(span.pages)} to {max(span.pages)}; the pool has 1 to {pool_pages - 1}"
            )
    lengths = np.asarray([len(s.token_ids) for s in spans], np.int32)
    starts = np.asarray([s.start for s in spans], np.int32)
    table = np.zeros((len(spans), width), np.int32)
    for row, span in zip(table, spans, strict=True):
        row[: len(span.pages)] = span.pages
    ends = np.cumsum(lengths, dtype=np.int32)
    owner = np.repeat(np.arange(len(spans)), lengths)
    positions = np.arange(len(owner), dtype=np.int32) - (ends - lengths)[owner] + starts[owner]
    prompt_lens = [s.prompt_len if s.prompt_len is not None else s.start + len(s.token_ids) for s in spans]
    only_decode = bool(np.all(lengths == 1))
    return StepInputs(
        token_ids=jnp.asarray(np.concatenate([np.asarray(s.token_ids, np.int32) for s in spans])),
        feedback=jnp.full(len(owner), -1, jnp.int32),
        positions=jnp.asarray(positions),
        rope_lens=jnp.asarray(np.maximum(np.asarray(prompt_lens, np.int32)[owner], positions + 1)),
        slots=jnp.asarray(table[owner, positions // size] * size + positions % size),
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(starts + lengths),
        cu_q_lens=jnp.zeros(1, jnp.int32) if only_decode else jnp.asarray(np.concatenate([[0], ends]).astype(np.int32)),
        logit_rows=jnp.asarray(ends - 1),
    )


def step(
    params: Params,
    cache: KVCache,
    inputs: StepInputs,
    *,
    spec: Decoder,
    attention_backend: Backend = "auto",
    batch_invariant: bool = False,
) -> tuple[KVCache, ForwardOutputs]:
    """Compute the packed tokens: keys and values go to their pages; logits [S, V] float32 and hidden [T, M] come back.

    The engine runs the same function. Donate `cache`, or the pool is copied.
    """
    return forward(params, cache, inputs, jnp.zeros(1, jnp.int32), spec, attention_backend, batch_invariant)


def decode_loop(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, " S"],
    positions: Int[Array, " S"],
    page_table: Int[Array, "S max_pages"],
    sampler: Sampler,
    *,
    num_steps: int,
    spec: Decoder,
    attention_backend: Backend = "auto",
    batch_invariant: bool = False,
) -> tuple[KVCache, Int[Array, "num_steps S"]]:
    """Decode `num_steps` tokens of S sequences in one traced loop, each step's tokens the next one's input.

    `tokens` stand at `positions` and are not in the cache yet; the page table must have room for positions + num_steps
    tokens. For use inside the caller's jit; the engine itself dispatches step by step.
    """
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    size = cache.page_size
    one_step = partial(step, spec=spec, attention_backend=attention_backend, batch_invariant=batch_invariant)

    def one(carry: tuple[KVCache, Array, Array], _: None) -> tuple[tuple[KVCache, Array, Array], Array]:
        cache, tokens, positions = carry
        inputs = StepInputs(
            token_ids=tokens,
            feedback=jnp.full_like(tokens, -1),
            positions=positions,
            rope_lens=positions + 1,
            slots=page_table[rows, positions // size] * size + positions % size,
            page_table=page_table,
            kv_lens=positions + 1,
            cu_q_lens=jnp.zeros(1, jnp.int32),
            logit_rows=rows,
        )
        cache, outputs = one_step(params, cache, inputs)
        sampled = sampler(outputs.logits, positions + 1).astype(jnp.int32)
        return (cache, sampled, positions + 1), sampled

    (cache, _, _), sampled = lax.scan(one, (cache, tokens, positions), None, length=num_steps)
    return cache, sampled


class _How(NamedTuple):
    """What of `score` is static."""

    spec: Decoder
    page_size: int
    cache_dtype: str | None
    attention_backend: Backend
    batch_invariant: bool


def score(
    params: Params,
    tokens: Int[Array, "S T"],
    lengths: Int[Array, " S"],
    *,
    spec: Decoder,
    page_size: int = 16,
    cache_dtype: str | None = None,
    attention_backend: Backend = "auto",
    batch_invariant: bool = False,
) -> Float[Array, "S T-1"]:
    """log p(token | those before it) of every token but each sequence's first; 0 past a sequence's length.

    Computed as the engine computes prompts, through pages of `cache_dtype`, by default the engine's; differentiable in
    `params`, backwards through the dense form of the same model (`apply`). With `batch_invariant`, and pages as the
    engine's, the values are those that an engine with this setting gives, to the last bit: see docs/training.md.
    """
    return _score(_How(spec, page_size, cache_dtype, attention_backend, batch_invariant), params, tokens, lengths)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(how: _How, params: Params, tokens: Array, lengths: Array) -> Array:
    num_seqs, width = tokens.shape
    size = how.page_size
    pages_each = -(-width // size)
    table = 1 + jnp.arange(num_seqs * pages_each, dtype=jnp.int32).reshape(num_seqs, pages_each)
    cache = init_cache(
        how.spec, num_seqs * pages_each + 1, size, how.cache_dtype or auto_dtype(params["embed"]["w"].dtype)
    )
    place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (num_seqs, width))
    slots = jnp.take_along_axis(table, place // size, 1) * size + place % size
    everything = num_seqs * width
    inputs = StepInputs(
        token_ids=tokens.reshape(-1),
        feedback=jnp.full(everything, -1, jnp.int32),
        positions=place.reshape(-1),
        rope_lens=jnp.repeat(lengths, width),
        slots=jnp.where(place < lengths[:, None], slots, cache.num_pages * size).reshape(-1),
        page_table=table,
        kv_lens=jnp.full(num_seqs, width, jnp.int32),
        cu_q_lens=jnp.arange(num_seqs + 1, dtype=jnp.int32) * width,
        logit_rows=jnp.zeros(1, jnp.int32) if how.batch_invariant else jnp.arange(everything, dtype=jnp.int32),
    )
    _, outputs = step(
        params,
        cache,
        inputs,
        spec=how.spec,
        attention_backend=how.attention_backend,
        batch_invariant=how.batch_invariant,
    )
    if not how.batch_invariant:
        return _token_logprobs(outputs.logits.reshape(num_seqs, width, -1), tokens, lengths)
    following = jnp.roll(tokens, -1, 1).reshape(-1)
    chosen = in_blocks(
        lambda part: logprobs_in_blocks(params, part[0], part[1], how.spec).chosen,
        (outputs.hidden, following),
        inputs.slots < cache.num_pages * size,
        block=_SCORED_ROWS,
    )
    return _within(chosen.reshape(num_seqs, width)[:, :-1], lengths)


def _dense_score(spec: Decoder, params: Params, tokens: Array, lengths: Array) -> Array:
    return _token_logprobs(jax.vmap(lambda row: apply(params, row, spec))(tokens), tokens, lengths)


def _token_logprobs(logits: Float[Array, "S T V"], tokens: Array, lengths: Array) -> Float[Array, "S T-1"]:
    logprobs = jax.nn.log_softmax(logits[:, :-1], -1)
    return _within(jnp.take_along_axis(logprobs, tokens[:, 1:, None], 2)[:, :, 0], lengths)


def _within(logprobs: Float[Array, "S T-1"], lengths: Array) -> Float[Array, "S T-1"]:
    return jnp.where(jnp.arange(1, logprobs.shape[1] + 1)[None] < lengths[:, None], logprobs, 0.0)


def _forwards(how: _How, params: Params, tokens: Array, lengths: Array) -> tuple[Array, Any]:
    return _score(how, params, tokens, lengths), (params, tokens, lengths)


def _backwards(how: _How, saved: Any, cotangent: Array) -> tuple[Any, None, None]:
    params, tokens, lengths = saved
    _, pull_back = jax.vjp(lambda p: _dense_score(how.spec, p, tokens, lengths), params)
    return (*pull_back(cotangent), None, None)


_score.defvjp(_forwards, _backwards)
