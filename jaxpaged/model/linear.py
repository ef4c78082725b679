"""x @ w + b, the bias where its leaf is there."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Array, Float


def linear(x: Float[Array, "T M"], p: Mapping[str, Array]) -> Float[Array, "T F"]:
    """`p` is {"w": [M, F]} with or without {"b": [F]}."""
    y = x @ p["w"]
    return y + p["b"][None] if "b" in p else y
