"""RMSNorm and LayerNorm over the last axis, in float32 whatever comes in."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxpaged.model.spec import Norm


def normalize(x: Float[Array, "*rows M"], p: Mapping[str, Array], norm: Norm) -> Float[Array, "*rows M"]:
    """The norm that `norm` describes with weights `p`, in x's dtype."""
    rows = (1,) * (x.ndim - 1)
    y = x.astype(jnp.float32)
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + norm.eps)
    weight = p["w"].astype(jnp.float32).reshape(*rows, -1)
    y = y * (weight + 1 if norm.plus_one else weight)
    if "b" in p:
        y = y + p["b"].astype(jnp.float32).reshape(*rows, -1)
    return y.astype(x.dtype)
