"""From hidden states to what embeddings are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sum_by_owner(hidden: Float[Array, "T M"], owners: Int[Array, " T"], num_owners: int) -> Float[Array, "O M"]:
    """For each owner the float32 sum of its tokens' hidden states; a token of none has `num_owners`."""
    total: Array = jax.ops.segment_sum(hidden.astype(jnp.float32), owners, num_segments=num_owners)
    return total
