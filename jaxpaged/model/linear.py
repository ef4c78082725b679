"""x @ w + b, the bias where its leaf is there, and what an adapter adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxpaged.model.lora import LowRank
from jaxpaged.model.quantized import Quantized, quantized_product


def linear(x: Float[Array, "T M"], p: Mapping[str, Any]) -> Float[Array, "T F"]:
    """`p` is {"w": [M, F], quantised or not} with or without {"b": [F]} and {"lora": LowRank}."""
    y = product(x, p["w"])
    if "lora" in p:
        y = y + low_rank(x, p["lora"])
    return y + p["b"][None] if "b" in p else y


def low_rank(x: Float[Array, "T M"], lora: LowRank) -> Float[Array, "T F"]:
    """(x a) b, in the dtype of `x`, of the columns that each row sees."""
    y = product(x, lora.a.astype(x.dtype))
    if lora.seen is not None:
        y = jnp.where(lora.seen, y, 0)  # not a product: what others' columns say may have overflowed
    return product(y, lora.b.astype(x.dtype))


def product(x: Float[Array, "T M"], w: Array | Quantized) -> Float[Array, "T F"]:
    """x @ w, summed in float32 and rounded once."""
    if isinstance(w, Quantized):
        return quantized_product(x, w)
    if x.dtype != jnp.bfloat16:
        return x @ w
    # Asked for bfloat16, XLA on CPU turns the weights into float32 first: 4 rows take 2.5 times as long, 512 twice. On
    # a GPU it sums in float32 anyway, and the rounding could be a kernel of its own.
    out: Array = lax.platform_dependent(x, w, cpu=_summed_in_float32, default=jnp.matmul)
    return out


def _summed_in_float32(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
