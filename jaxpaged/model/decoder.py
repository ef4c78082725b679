"""The decoder: one function that computes whatever a `Decoder` spec describes.

`hidden_states` is the whole model but its head. It does not know where keys and values live: it calls `attend(layer,
q, k, v, ...)`, which the paged step (`step.py`) and the dense form below fill in differently. Layers run unrolled: a
scan would copy every layer's weights and pool (see docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.reference import attention as dense_attention
from jaxpaged.model.attention import mix
from jaxpaged.model.ffn import feed_forward
from jaxpaged.model.linear import linear
from jaxpaged.model.norm import normalize
from jaxpaged.model.params import Params
from jaxpaged.model.rope import RopeTable, rope_table
from jaxpaged.model.spec import Attention, Block, Decoder, Rope

LayerAttend = Callable[[int, Array, Array, Array, Attention, Array | None], Array]
"""attend(layer, q [T, H, D], k [T, K, D], v [T, K, D], spec, sinks [H] or None) -> [T, H, D]"""


def hidden_states(
    params: Params,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    rope_lens: Int[Array, " T"],
    spec: Decoder,
    attend: LayerAttend,
) -> Float[Array, "T M"]:
    """The last layer's output after the last norm, a row per token. `rope_lens`: see `spec.DynamicNtkScaling`."""
    x = params["embed"]["w"][tokens]
    if spec.embed_scale != 1.0:
        x = x * jnp.asarray(spec.embed_scale, x.dtype)
    if "project_in" in params:
        x = linear(x, params["project_in"])
    if spec.learned_positions is not None:
        x = x + params["positions"]["w"][positions + spec.learned_positions]
    ropes = {b.mixer.rope for b in spec.blocks if b.mixer.rope is not None}
    tables = {rope: rope_table(rope, positions, rope_lens) for rope in ropes}
    for layer, (block, p) in enumerate(zip(spec.blocks, params["layers"], strict=True)):
        x = _block(x, p, block, tables, partial(attend, layer))
    return x if spec.norm is None else normalize(x, params["norm"], spec.norm)


def logits(params: Params, hidden: Float[Array, "T M"], spec: Decoder) -> Float[Array, "T V"]:
    """float32 scores of every token of the vocabulary."""
    if "project_out" in params:
        hidden = linear(hidden, params["project_out"])
    if "head" in params:
        y = linear(hidden, params["head"]).astype(jnp.float32)
    else:
        y = jnp.einsum("tm,vm->tv", hidden, params["embed"]["w"], preferred_element_type=jnp.float32)
    return y if spec.logit_softcap is None else spec.logit_softcap * jnp.tanh(y / spec.logit_softcap)


def apply(params: Params, tokens: Int[Array, " T"], spec: Decoder) -> Float[Array, "T V"]:
    """Logits of one whole sequence, dense: no pages, differentiable. For training, checks and tests."""

    def attend(layer: int, q: Array, k: Array, v: Array, a: Attention, sinks: Array | None) -> Array:
        del layer
        return dense_attention(q, k, v, scale=a.scale, window=a.window, softcap=a.softcap, sinks=sinks)

    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    rope_lens = jnp.full_like(positions, tokens.shape[0])
    return logits(params, hidden_states(params, tokens, positions, rope_lens, spec, attend), spec)


def _block(
    x: Float[Array, "T M"], p: Params, block: Block, tables: dict[Rope, RopeTable], attend: Callable[..., Array]
) -> Float[Array, "T M"]:
    def norm(y: Array, name: str) -> Array:
        return normalize(y, p[name], block.norm)

    def mixer(y: Array) -> Array:
        return mix(y, p["mixer"], block.mixer, tables, attend)

    def ffn(y: Array) -> Array:
        return feed_forward(y, p["ffn"], block.ffn)

    match block.residual:
        case "serial":
            x = x + mixer(norm(x, "norm1"))
            return x + ffn(norm(x, "norm2"))
        case "parallel":
            return x + mixer(norm(x, "norm1")) + ffn(norm(x, "norm2"))
        case "parallel_one_norm":
            y = norm(x, "norm1")
            return x + mixer(y) + ffn(y)
        case "sandwich":
            x = x + norm(mixer(norm(x, "norm1")), "post1")
            return x + norm(ffn(norm(x, "norm2")), "post2")
        case "post":
            x = norm(x + mixer(x), "norm1")
            return norm(x + ffn(x), "norm2")
