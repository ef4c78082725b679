"""The attention half of a block: projections, q/k norm, rope. Where keys and values live is the caller's `attend`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float

from jaxpaged.model.linear import linear
from jaxpaged.model.norm import normalize
from jaxpaged.model.rope import RopeTable, rotate
from jaxpaged.model.spec import Attention, Mixer, Rope

Attend = Callable[[Array, Array, Array | None, Mixer, Array | None], tuple[Array, Any]]
"""attend(q [T, H, D], k [T, K, D], v [T, K, V], spec, sinks [H] or None) -> ([T, H, V], the layer's new kv)

Without v, values are the first kv_rank numbers of k: see `latent.py`."""


def mix(
    x: Float[Array, "T M"], p: Mapping[str, Any], a: Attention, tables: Mapping[Rope, RopeTable], attend: Attend
) -> tuple[Float[Array, "T M"], Any]:
    """o(attend(rope(norm(q x)), rope(norm(k x)), v x)), and what `attend` says the layer's keys and values are now."""
    q, k = linear(x, p["q"]), linear(x, p["k"])
    if a.qk_norm is not None and a.norm_all_heads:
        q, k = normalize(q, p["q_norm"], a.qk_norm), normalize(k, p["k_norm"], a.qk_norm)
    q, k = q.reshape(-1, a.heads, a.head_dim), k.reshape(-1, a.kv_heads, a.head_dim)
    v = linear(x, p["v"]).reshape(-1, a.kv_heads, a.head_dim)
    if a.qk_norm is not None and not a.norm_all_heads:
        q, k = normalize(q, p["q_norm"], a.qk_norm), normalize(k, p["k_norm"], a.qk_norm)
    if a.rope is not None:
        q, k = rotate(q, tables[a.rope], a.rope), rotate(k, tables[a.rope], a.rope)
    out, kv = attend(q, k, v, a, p.get("sinks"))
    return linear(out.reshape(-1, a.heads * a.head_dim), p["o"]), kv
