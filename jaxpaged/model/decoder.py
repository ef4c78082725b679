"""The decoder: one function that computes whatever a `Decoder` spec describes.

`hidden_states` is the whole model but its head: `embed`, `through_layers` and `last_norm`, of which a pipeline stage
calls what it holds. None knows where keys and values live: `attend(kv, q, k, v, ...)` gets and gives back a layer's
`kv`, a pool in the paged step (`step.py`), nothing in the dense form below. Layers run unrolled: a scan would copy
every layer's weights and pool (see docs/architecture.md). Equal blocks are traced once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.reference import attention as dense_attention
from jaxpaged.model.attention import mix
from jaxpaged.model.ffn import feed_forward
from jaxpaged.model.latent import absorbed, expanded
from jaxpaged.model.linear import linear
from jaxpaged.model.moe import chosen_experts, every_expert
from jaxpaged.model.norm import normalize
from jaxpaged.model.params import Params
from jaxpaged.model.rope import RopeTable, rope_table
from jaxpaged.model.spec import Attention, Block, Decoder, LatentAttention, Mixer, Mlp, Moe, Rope

Attend = Callable[[Any, Array, Array, Array | None, Mixer, Array | None], tuple[Array, Any]]
"""attend(kv, q, k, v, spec, sinks) -> (out, kv): what `attention.Attend` is, of a layer's `kv`"""

Mixture = Callable[[Array, Any, Moe], Array]
"""mixture(x [T, M], p, spec) -> [T, M]: how experts are computed"""

Latent = Callable[..., tuple[Array, Any]]
"""`latent.absorbed` or `latent.expanded`: how attention to latents is"""


def hidden_states(
    params: Params,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    rope_lens: Int[Array, " T"],
    spec: Decoder,
    kvs: Sequence[Any],
    attend: Attend,
    mixture: Mixture = chosen_experts,
    latent: Latent = absorbed,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "T M"], tuple[Any, ...]]:
    """The last layer's output after the last norm, a row per token, and every layer's `kv` as `attend` left it.

    `rope_lens` is the length by which length-dependent rope scalings go: see `spec.DynamicNtkScaling`. `remat` has
    gradients compute every layer again from its input rather than keep what is inside it.
    """
    x = embed(params, tokens, positions, spec)
    how = attend, mixture, latent
    x, kvs = through_layers(params["layers"], x, positions, rope_lens, spec.blocks, kvs, *how, remat=remat)
    return last_norm(params, x, spec), kvs


def embed(params: Params, tokens: Int[Array, " T"], positions: Int[Array, " T"], spec: Decoder) -> Float[Array, "T M"]:
    """The first layer's input."""
    x: Array = params["embed"]["w"][tokens]
    if spec.embed_scale != 1.0:
        x = x * jnp.asarray(spec.embed_scale, x.dtype)
    if "project_in" in params:
        x = linear(x, params["project_in"])
    if spec.learned_positions is not None:
        x = x + params["positions"]["w"][positions + spec.learned_positions]
    return x


def through_layers(
    layers: Sequence[Params],
    x: Float[Array, "T M"],
    positions: Int[Array, " T"],
    rope_lens: Int[Array, " T"],
    blocks: Sequence[Block],
    kvs: Sequence[Any],
    attend: Attend,
    mixture: Mixture = chosen_experts,
    latent: Latent = absorbed,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "T M"], tuple[Any, ...]]:
    """What these layers make of `x`, and their `kvs`; arguments as of `hidden_states`."""
    ropes = {b.mixer.rope for b in blocks if b.mixer.rope is not None}
    tables = {rope: rope_table(rope, positions, rope_lens) for rope in ropes}
    outer = jax.checkpoint if remat else jax.jit
    layer = {
        block: outer(partial(_layer, block=block, tables=tables, attend=attend, mixture=mixture, latent=latent))
        for block in set(blocks)
    }
    new_kvs = []
    for block, p, kv in zip(blocks, layers, kvs, strict=True):
        x, kv = layer[block](x, p, kv)
        new_kvs.append(kv)
    return x, tuple(new_kvs)


def last_norm(params: Params, x: Float[Array, "T M"], spec: Decoder) -> Float[Array, "T M"]:
    """The last layer's output after the last norm, where there is one."""
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


def apply(params: Params, tokens: Int[Array, " T"], spec: Decoder, *, remat: bool = False) -> Float[Array, "T V"]:
    """Logits of one whole sequence, dense: no pages, differentiable. For training (`spec.apply`), checks and tests."""

    def attend(kv: None, q: Array, k: Array, v: Any, a: Mixer, sinks: Array | None) -> tuple[Array, None]:
        match a:
            case Attention():
                return dense_attention(q, k, v, scale=a.scale, window=a.window, softcap=a.softcap, sinks=sinks), kv
            case LatentAttention():
                return dense_attention(q, k, v, scale=a.scale), kv

    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    rope_lens = jnp.full_like(positions, tokens.shape[0])
    how = attend, every_expert, expanded
    hidden, _ = hidden_states(params, tokens, positions, rope_lens, spec, (None,) * len(spec.blocks), *how, remat=remat)
    return logits(params, hidden, spec)


def _layer(
    x: Float[Array, "T M"],
    p: Params,
    kv: Any,
    *,
    block: Block,
    tables: Mapping[Rope, RopeTable],
    attend: Attend,
    mixture: Mixture,
    latent: Latent,
) -> tuple[Float[Array, "T M"], Any]:
    def norm(y: Array, name: str) -> Array:
        return normalize(y, p[name], block.norm)

    def mixer(y: Array) -> tuple[Array, Any]:
        match block.mixer:
            case Attention() as a:
                return mix(y, p["mixer"], a, tables, partial(attend, kv))
            case LatentAttention() as a:
                return latent(y, p["mixer"], a, tables, partial(attend, kv))

    def ffn(y: Array) -> Array:
        if isinstance(block.ffn, Mlp):
            return feed_forward(y, p["ffn"], block.ffn)
        return mixture(y, p["ffn"], block.ffn)

    match block.residual:
        case "serial":
            mixed, kv = mixer(norm(x, "norm1"))
            x = x + mixed
            return x + ffn(norm(x, "norm2")), kv
        case "parallel":
            mixed, kv = mixer(norm(x, "norm1"))
            return x + mixed + ffn(norm(x, "norm2")), kv
        case "parallel_one_norm":
            y = norm(x, "norm1")
            mixed, kv = mixer(y)
            return x + mixed + ffn(y), kv
        case "sandwich":
            mixed, kv = mixer(norm(x, "norm1"))
            x = x + norm(mixed, "post1")
            return x + norm(ffn(norm(x, "norm2")), "post2"), kv
        case "post":
            mixed, kv = mixer(x)
            x = norm(x + mixed, "norm1")
            return norm(x + ffn(x), "norm2"), kv
