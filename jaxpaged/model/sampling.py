"""From logits to tokens, on the device and exact, without sorting the vocabulary.

A row's numbers depend on that row alone: its randomness is fold_in(seed, position), so a request's tokens are the same
in any batch. Top-k and top-p find the smallest logit that stays by bisection over the 32 bits of a float (ties with it
stay too); the draw inverts the cumulative distribution, block by block. What no row asks for is skipped at run time.

Order, as in vLLM: edits and mask, temperature, min-p, top-k, top-p. Logprobs are those of the model's own logits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxpaged.model.blocks import in_blocks
from jaxpaged.model.decoder import logits as head_logits
from jaxpaged.model.params import Params
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder

MAX_LOGPROBS = 20  # most alternatives per token, as in vLLM
_BLOCK = 128  # tokens a block of the cumulative distribution holds


class SamplingInputs(NamedTuple):
    """How each row is sampled. Neutral values: temperature 0 (greedy), top_k V, top_p 1, min_p 0."""

    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
    seeds: UInt32[Array, "R 2"]
    positions: Int[Array, " R"]  # of the token that is sampled, in its sequence
    want_logprobs: Bool[Array, ""]
    score_temperature: Float[Array, " R"]  # logprobs are those of the logits over this: 1, but for beams


class Logprobs(NamedTuple):
    """log p of one chosen token per row, its rank (1 = most likely), and the `MAX_LOGPROBS` likeliest tokens."""

    chosen: Float[Array, " R"]
    rank: Int[Array, " R"]
    top_ids: Int[Array, "R N"]
    top: Float[Array, "R N"]


class StepOutputs(NamedTuple):
    """What a step says of its rows. `healthy` is False where the logits hold NaN or no finite number."""

    tokens: Int[Array, " R"]
    healthy: Bool[Array, " R"]
    logprobs: Logprobs  # zeros unless asked for


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
    raw: Float[Array, "R V"], edited: Float[Array, "R V"], inputs: SamplingInputs, placement: Placement | None = None
) -> StepOutputs:
    """One token per row drawn from `edited` (the same array as `raw` where nothing was edited).

    With a `placement` (static) the logits are cut over its mesh, and stay so.
    """
    num_rows = raw.shape[0]
    top = jnp.max(edited, -1)
    # The first of the largest. XLA's argmax compares pairs and does not vectorise on CPU: 3 times as slow.
    tokens = jnp.arange(raw.shape[1], dtype=jnp.int32)[None]
    greedy = jnp.min(jnp.where(edited >= top[:, None], tokens, raw.shape[1] - 1), -1)
    is_random = inputs.temperature > 0
    drawn = lax.cond(jnp.any(is_random), _draw, lambda *_: greedy, edited, inputs)
    tokens = jnp.where(is_random, drawn, greedy)
    nothing = Logprobs(
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, min(MAX_LOGPROBS, raw.shape[1])), jnp.int32),
        jnp.zeros((num_rows, min(MAX_LOGPROBS, raw.shape[1])), jnp.float32),
    )
    found = lax.cond(
        inputs.want_logprobs,
        lambda raw, tokens: logprobs_of(raw / inputs.score_temperature[:, None], tokens, placement),
        lambda *_: nothing,
        raw,
        tokens,
    )
    return StepOutputs(tokens, jnp.isfinite(top), found)


def sample_in_blocks(raw: Float[Array, "R V"], edited: Float[Array, "R V"], inputs: SamplingInputs) -> StepOutputs:
    """As `sample`, with sums that do not depend on how many rows there are."""
    rows = inputs._asdict()
    want_logprobs = rows.pop("want_logprobs")

    def some(part: tuple[Array, Array, dict[str, Array]]) -> StepOutputs:
        raw, edited, own = part
        return sample(raw, edited, SamplingInputs(**own, want_logprobs=want_logprobs))

    outputs: StepOutputs = in_blocks(some, (raw, edited, rows), inputs.positions >= 0)
    return outputs


def logprobs_of(logits: Float[Array, "R V"], tokens: Int[Array, " R"], placement: Placement | None = None) -> Logprobs:
    """Log probabilities of `tokens` and of the likeliest tokens of every row."""
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

    top, ids = jax.shard_map(own, mesh=placement.mesh, in_specs=cut, out_specs=(cut, cut))(logits)
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
        return logprobs_of(head_logits(params, hidden[rows], spec), targets, placement)
    return logprobs_in_blocks(params, hidden[rows], targets, spec)


def logprobs_in_blocks(
    params: Params, hidden: Float[Array, "R M"], targets: Int[Array, " R"], spec: Decoder
) -> Logprobs:
    """Log probabilities of `targets` after `hidden`, row by row those that `sample_in_blocks` gives."""
    # Two loops: in one the softcap's product and the sum after it might be fused, which sampled tokens have apart.
    logits = in_blocks(lambda part: head_logits(params, part, spec), hidden, targets >= 0)
    found: Logprobs = in_blocks(lambda part: logprobs_of(*part), (logits, targets), targets >= 0)
    return found


def _draw(logits: Float[Array, "R V"], inputs: SamplingInputs) -> Int[Array, " R"]:
    temperature = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]
    scaled = logits / temperature
    scaled = scaled - jnp.max(scaled, -1, keepdims=True)  # the likeliest is at 0
    floor = jnp.log(jnp.maximum(inputs.min_p, 1e-38))[:, None]
    scaled = jnp.where((scaled >= floor) | (inputs.min_p[:, None] <= 0), scaled, -jnp.inf)
    vocab = logits.shape[1]
    scaled = lax.cond(
        jnp.any(inputs.top_k < vocab), lambda x: _keep(x, _kth_largest(x, inputs.top_k)), lambda x: x, scaled
    )
    scaled = lax.cond(jnp.any(inputs.top_p < 1), lambda x: _keep(x, _nucleus(x, inputs.top_p)), lambda x: x, scaled)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(inputs.seeds, impl="threefry2x32"), inputs.positions)
    uniform = jax.vmap(jax.random.uniform)(keys)
    return _invert(jnp.exp(scaled), uniform)


def _keep(x: Float[Array, "R V"], smallest: Float[Array, " R"]) -> Float[Array, "R V"]:
    return jnp.where(x >= smallest[:, None], x, -jnp.inf)


def _kth_largest(x: Float[Array, "R V"], k: Int[Array, " R"]) -> Float[Array, " R"]:
    return _bisect(x, lambda at_least: jnp.sum(at_least, -1, dtype=jnp.int32) >= k)


def _nucleus(x: Float[Array, "R V"], p: Float[Array, " R"]) -> Float[Array, " R"]:
    """The largest threshold above which at least the share p of the probability lies."""
    weights = jnp.exp(x)
    wanted = p * weights.sum(-1)
    found = _bisect(x, lambda at_least: jnp.sum(jnp.where(at_least, weights, 0.0), -1) >= wanted)
    return jnp.where(p < 1, found, -jnp.inf)


def _bisect(x: Float[Array, "R V"], enough) -> Float[Array, " R"]:  # type: ignore[no-untyped-def]
    """The largest float t for which `enough(x >= t)` holds; x <= 0, and enough(x >= -inf) is taken to hold.

    Floats that are not positive grow as their bits, read as unsigned, fall: 0 (or -0) is likeliest, -inf last.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        good, bad = bounds  # bits: good is enough (a large magnitude), bad is not (a small one)
        middle = bad + (good - bad) // 2
        threshold = lax.bitcast_convert_type(middle | jnp.uint32(0x80000000), jnp.float32)
        is_enough = enough(x >= threshold[:, None])
        return jnp.where(is_enough, middle, good), jnp.where(is_enough, bad, middle)

    infinity = jnp.full(x.shape[0], 0x7F800000, jnp.uint32)
    zero = jnp.zeros(x.shape[0], jnp.uint32)
    good, _ = lax.fori_loop(0, 31, halve, (infinity, zero))
    return lax.bitcast_convert_type(good | jnp.uint32(0x80000000), jnp.float32)


def _invert(weights: Float[Array, "R V"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """The token at which the cumulative sum of `weights` passes uniform x total; one with weight 0 is never drawn."""
    num_rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(num_rows, -1, _BLOCK)
    shares = blocks.sum(-1)
    sums = jnp.cumsum(shares, -1)
    target = uniform * sums[:, -1]
    block = _first_above(sums, target, shares)
    before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return block * _BLOCK + _first_above(jnp.cumsum(inside, -1), target - before, inside)


def _first_above(sums: Float[Array, "R N"], target: Float[Array, " R"], added: Float[Array, "R N"]) -> Int[Array, " R"]:
    """The first index that adds something and whose sum exceeds the target; where there is none, the last that adds.

    The sums alone do not tell what adds: XLA sums in a tree, so by rounding they also rise, or fall, where 0 is added.
    """
    index = jnp.arange(sums.shape[1], dtype=jnp.int32)[None]
    first = jnp.min(jnp.where((sums > target[:, None]) & (added > 0), index, sums.shape[1]), -1)
    last = jnp.max(jnp.where(added > 0, index, 0), -1)
    return jnp.minimum(first, last)
