"""From logits to tokens, on the device: edits, masks, the draw, logprobs.

A row's numbers depend on that row alone: its randomness is fold_in(seed, position), so a request's tokens are the same
in any batch. What stays after min-p, top-k and top-p, and the draw itself, are an op: `kernels/sampling.py`.

Order, as in vLLM: edits and mask, temperature, min-p, top-k, top-p. Logprobs are those of the model's own logits.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxpaged.kernels.backend import Backend, choose
from jaxpaged.kernels.sampling import draw
from jaxpaged.model.blocks import in_blocks
from jaxpaged.model.decoder import logits as head_logits
from jaxpaged.model.params import Params
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder

MAX_LOGPROBS = 20  # most alternatives per token, as in vLLM


class SamplingInputs(NamedTuple):
    """How each row is sampled. Neutral values: temperature 0 (greedy), top_k V, top_p 1, min_p 0."""

    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
    seeds: UInt32[Array, "R 2"]
    positions: Int[Array, " R"]  # of the token that is sampled, in its sequence


class Logprobs(NamedTuple):
    """log p of one chosen token per row, its rank (1 = most likely), and the `MAX_LOGPROBS` likeliest tokens."""

    chosen: Float[Array, " R"]
    rank: Int[Array, " R"]
    top_ids: Int[Array, "R N"]
    top: Float[Array, "R N"]


class Sampled(NamedTuple):
    """A token per row. `healthy` is False where the logits hold NaN or no finite number."""

    tokens: Int[Array, " R"]
    healthy: Bool[Array, " R"]


class Edits(NamedTuple):
    """Changes of single logits: positive ones divided, negative ones multiplied by `factor`, then `add` added.

    One entry per (row, token) at most; entries whose row is past the last are dropped.
    """

    rows: Int[Array, " N"]
    tokens: Int[Array, " N"]
    factor: Float[Array, " N"]
    add: Float[Array, " N"]


def edit(logits: Float[Array, "R V"], edits: Edits) -> Float[Array, "R V"]:
    """Penalties and biases: repetition as `factor` (arXiv 1909.05858), the others as `add`."""
    old = logits.at[edits.rows, edits.tokens].get(mode="fill", fill_value=0.0)
    new = jnp.where(old > 0, old / edits.factor, old * edits.factor) + edits.add
    return logits.at[edits.rows, edits.tokens].set(new, mode="drop")


def restrict(logits: Float[Array, "R V"], allowed: UInt32[Array, "R words"]) -> Float[Array, "R V"]:
    """Logits of tokens whose bit is 0 set to -inf. Token t is bit t % 32 of word t // 32."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return jnp.where(bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def sample(
    logits: Float[Array, "R V"],
    inputs: SamplingInputs,
    everyone: SamplingInputs | None = None,
    backend: Backend = "auto",
    placement: Placement | None = None,
) -> Sampled:
    """One token per row.

    With a `placement` (static) the logits are cut over its mesh, and stay so: the reference draws. `everyone` has the
    inputs of all data shards where there are several: they skip together what none of them wants, since devices wait
    for each other inside.
    """
    everyone = everyone or inputs
    backend = choose(backend) if placement is None else "reference"
    top = jnp.max(logits, -1)
    # The first of the largest. XLA's argmax compares pairs and does not vectorise on CPU: 3 times as slow.
    tokens = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    greedy = jnp.min(jnp.where(logits >= top[:, None], tokens, logits.shape[1] - 1), -1)
    is_random = inputs.temperature > 0
    num_shards = 1 if placement is None else placement.num_shards("vocab")
    are_limited = jnp.any(everyone.top_k < logits.shape[1]), jnp.any(everyone.top_p < 1)
    random = partial(_drawn, backend=backend, num_shards=num_shards, are_limited=are_limited)
    if backend == "reference":
        drawn = lax.cond(jnp.any(everyone.temperature > 0), random, lambda *_: greedy, logits, inputs)
    else:  # the kernel skips greedy rows by itself; a condition would make the host wait
        drawn = random(logits, inputs)
    tokens = jnp.where(is_random, drawn, greedy)
    return Sampled(tokens, jnp.isfinite(top))


def sample_in_blocks(
    logits: Float[Array, "R V"],
    inputs: SamplingInputs,
    everyone: SamplingInputs | None = None,
    placement: Placement | None = None,
) -> Sampled:
    """As `sample`, with sums that do not depend on how many rows there are."""

    def of(part: tuple[Array, SamplingInputs]) -> Sampled:
        return sample(part[0], part[1], everyone, placement=placement)

    sampled: Sampled = in_blocks(of, (logits, inputs), inputs.positions >= 0)
    return sampled


def logprobs_of(
    logits: Float[Array, "R V"],
    tokens: Int[Array, " R"],
    temperature: Float[Array, " R"] | None = None,
    batch_invariant: bool = False,
    placement: Placement | None = None,
) -> Logprobs:
    """Log probabilities of `tokens` and of the likeliest tokens of every row of logits, over `temperature` if given."""
    if batch_invariant:
        block = partial(logprobs_of, placement=placement)
        found: Logprobs = in_blocks(lambda part: block(*part), (logits, tokens, temperature), tokens >= 0)
        return found
    if temperature is not None:
        logits = logits / temperature[:, None]
    total = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], 1)
    rank = 1 + jnp.sum(logits > chosen, -1, dtype=jnp.int32)
    top, ids = _top(logits, min(MAX_LOGPROBS, logits.shape[1]), placement)
    return Logprobs(chosen[:, 0] - total, rank, ids, top - total[:, None])


def _top(
    logits: Float[Array, "R V"], count: int, placement: Placement | None
) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    """The largest logits and whose they are; on a mesh each device finds its own first, and only those move."""
    if placement is None or (axis := placement.rules.vocab) is None:
        top, ids = lax.top_k(logits, count)
        return top, ids.astype(jnp.int32)
    cut = placement.partition(None, "vocab")

    def own(part: Array) -> tuple[Array, Array]:
        top, ids = lax.top_k(part, min(count, part.shape[1]))
        return top, ids.astype(jnp.int32) + lax.axis_index(axis) * part.shape[1]

    top, ids = placement.on_each(own, in_specs=cut, out_specs=(cut, cut))(logits)
    top, where = lax.top_k(top, count)
    return top, jnp.take_along_axis(ids, where, 1)


def prompt_logprobs(
    params: Params,
    hidden: Float[Array, "T M"],
    rows: Int[Array, " R"],
    targets: Int[Array, " R"],
    spec: Decoder,
    batch_invariant: bool = False,
    placement: Placement | None = None,
) -> Logprobs:
    """Log probabilities of `targets` after the tokens at `rows` of a step's hidden states."""
    if not batch_invariant:
        return logprobs_of(head_logits(params, hidden[rows], spec), targets, placement=placement)
    return logprobs_in_blocks(params, hidden[rows], targets, spec, placement)


def logprobs_in_blocks(
    params: Params,
    hidden: Float[Array, "R M"],
    targets: Int[Array, " R"],
    spec: Decoder,
    placement: Placement | None = None,
) -> Logprobs:
    """Log probabilities of `targets` after `hidden`, row by row those that sampled tokens have."""
    # Two loops: in one the softcap's product and the sum after it might be fused, which sampled tokens have apart.
    logits = in_blocks(lambda part: head_logits(params, part, spec), hidden, targets >= 0)
    return logprobs_of(logits, targets, batch_invariant=True, placement=placement)


def _drawn(
    logits: Float[Array, "R V"],
    inputs: SamplingInputs,
    backend: Backend,
    num_shards: int,
    are_limited: tuple[Bool[Array, ""], Bool[Array, ""]],
) -> Int[Array, " R"]:
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(inputs.seeds, impl="threefry2x32"), inputs.positions)
    return draw(
        logits,
        jax.vmap(jax.random.uniform)(keys),
        temperature=inputs.temperature,
        top_k=inputs.top_k,
        top_p=inputs.top_p,
        min_p=inputs.min_p,
        num_shards=num_shards,
        backend=backend,
        are_limited=are_limited,
    )
