"""Draw a token a row after min-p, top-k and top-p, exactly and without sorting the vocabulary.

What stays of a row is told by one number, the smallest logit that does: the largest of min-p's bound, the k-th largest
logit, and the largest logit such that it and all above it weigh at least p of what min-p and top-k leave (ties with it
stay too). The last two are found by bisection over the 31 bits of a float that is not positive. The draw then inverts
the cumulative distribution in the vocabulary's order.

Backends: "reference" is jnp and runs everywhere; "triton" is a Pallas kernel for NVIDIA GPUs from A100 on, which does
all of it in one launch; "auto" is triton on NVIDIA GPUs. Both find the same bounds: the k-th largest logit is counted,
not rounded, and p's is a logit. Sums are added in different orders, so that a token may differ where `uniform` or p
falls between two to the last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpaged.kernels.backend import Backend, choose
from jaxpaged.kernels.forward_only import forward_only

_BLOCK = 128  # tokens a block of the reference's cumulative distribution holds


def draw(
    logits: Float[Array, "R V"],
    uniform: Float[Array, " R"],
    *,
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
    num_shards: int = 1,
    backend: Backend = "auto",
    interpret: bool = False,
    block: int | None = None,
    num_warps: int = 16,
    are_limited: tuple[Bool[Array, ""], Bool[Array, ""]] | None = None,
) -> Int[Array, " R"]:
    """The token of each row at which the cumulative probability passes `uniform`, of [0, 1).

    Neutral values: temperature 1, top_k V, top_p 1, min_p 0. Rows of temperature 0 are not drawn and give 0, rows
    without a finite number any token. Where the vocabulary lies in `num_shards` equal parts on different devices, the
    reference moves a number for each 128 tokens and no logits. `block`, a power of two, and `num_warps` cut the
    kernel's work. `are_limited` says whether the reference must look at top_k and top_p, None: the rows themselves say
    it. The gradient is refused; float32 inside.
    """
    backend = choose(backend, interpret=interpret)
    if block is None:  # what spills no register: rows that are not aligned are loaded number by number
        block = 8192 if logits.shape[1] % 16 == 0 else 4096
    if backend == "triton" and (block < 16 or block & (block - 1)):
        raise ValueError(f"block is {block}; it must be a power of two and at least 16")

    def op(logits: Array, uniform: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
        scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        floor = jnp.where(min_p > 0, jnp.log(jnp.maximum(min_p, 1e-38)), -jnp.inf)
        if backend == "reference":
            limited = are_limited or (jnp.any(top_k < logits.shape[1]), jnp.any(top_p < 1))
            tokens = _reference(scaled, uniform, floor, top_k, top_p, limited, num_shards)
            return jnp.where(temperature > 0, tokens, 0)
        from jaxpaged.kernels import triton_sampling  # Pallas is slow to import

        is_drawn = (temperature > 0).astype(jnp.int32)
        rows = triton_sampling.Rows(is_drawn, uniform, floor, top_k, top_p)
        return triton_sampling.draw(scaled, rows, block=block, num_warps=num_warps, interpret=interpret)

    guarded = forward_only(op, "drawing a token has no gradient; differentiate its log-probability instead")
    tokens: Array = guarded(logits, uniform, temperature, top_k, top_p, min_p)
    return tokens


def _reference(
    x: Float[Array, "R V"],
    uniform: Float[Array, " R"],
    floor: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    limited: tuple[Bool[Array, ""], Bool[Array, ""]],
    num_shards: int,
) -> Int[Array, " R"]:
    x = x - jnp.max(x, -1, keepdims=True)  # the likeliest is at 0
    bound = _tighter(x, floor, limited[0], kth_largest, top_k)
    bound = _tighter(x, bound, limited[1], nucleus, top_p)
    return invert(jnp.exp(_keep(x, bound)), uniform, num_shards)


def _tighter(
    x: Float[Array, "R V"],
    bound: Float[Array, " R"],
    is_limited: Bool[Array, ""],
    find: Callable[[Array, Array], Array],
    limit: Array,
) -> Float[Array, " R"]:
    """What `find` says of what the bound keeps, or the bound; skipped at run time where no row is limited.

    The branches give bounds and not logits: those would be gathered there where they lie on several devices.
    """
    found = lax.cond(is_limited, lambda x, b, limit: find(_keep(x, b), limit), lambda x, b, _: b, x, bound, limit)
    return jnp.maximum(bound, found)


def _keep(x: Float[Array, "R V"], smallest: Float[Array, " R"]) -> Float[Array, "R V"]:
    return jnp.where(x >= smallest[:, None], x, -jnp.inf)


def kth_largest(x: Float[Array, "R V"], k: Int[Array, " R"]) -> Float[Array, " R"]:
    """Of numbers that are not positive."""
    return _bisect(x, lambda at_least: jnp.sum(at_least, -1, dtype=jnp.int32) >= k)


def nucleus(x: Float[Array, "R V"], p: Float[Array, " R"]) -> Float[Array, " R"]:
    """The largest threshold above which at least the share p of the weight exp(x) lies; x <= 0."""
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


def invert(weights: Float[Array, "R V"], uniform: Float[Array, " R"], num_shards: int = 1) -> Int[Array, " R"]:
    """The token at which the cumulative sum of `weights` passes uniform x total; one with weight 0 is never drawn.

    No block of the sum holds tokens of two shards: blocks of both would move the whole row.
    """
    num_rows, vocab = weights.shape
    size = vocab // num_shards
    parts = jnp.pad(weights.reshape(num_rows, num_shards, size), ((0, 0), (0, 0), (0, -size % _BLOCK)))
    blocks = parts.reshape(num_rows, -1, _BLOCK)
    shares = blocks.sum(-1)
    sums = jnp.cumsum(shares, -1)
    target = uniform * sums[:, -1]
    block = _first_above(sums, target, shares)
    before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    shard, block = jnp.divmod(block, parts.shape[2] // _BLOCK)
    return shard * size + block * _BLOCK + _first_above(jnp.cumsum(inside, -1), target - before, inside)


def _first_above(sums: Float[Array, "R N"], target: Float[Array, " R"], added: Float[Array, "R N"]) -> Int[Array, " R"]:
    """The first index that adds something and whose sum exceeds the target; where there is none, the last that adds.

    The sums alone do not tell what adds: XLA sums in a tree, so by rounding they also rise, or fall, where 0 is added.
    """
    index = jnp.arange(sums.shape[1], dtype=jnp.int32)[None]
    first = jnp.min(jnp.where((sums > target[:, None]) & (added > 0), index, sums.shape[1]), -1)
    last = jnp.max(jnp.where(added > 0, index, 0), -1)
    return jnp.minimum(first, last)
