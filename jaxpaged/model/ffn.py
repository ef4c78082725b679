"""The feed-forward half of a block where every row has the same weights; for mixtures of experts see `moe.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxpaged.model.linear import linear
from jaxpaged.model.spec import Activation, Mlp

_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def feed_forward(x: Float[Array, "T M"], p: Mapping[str, Any], mlp: Mlp) -> Float[Array, "T M"]:
    """down(act(gate x) * up x), or down(act(up x)) where there is no gate."""
    act = activation(mlp.act)
    up = linear(x, p["up"])
    return linear(act(linear(x, p["gate"])) * up if mlp.gated else act(up), p["down"])


def activation(name: Activation) -> Callable[[Array], Array]:
    """The function of that name."""
    return _ACTIVATIONS[name]
