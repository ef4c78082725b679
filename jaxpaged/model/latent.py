"""Multi-head latent attention: keys and values that are made of one latent a token (arXiv 2405.04434).

Two forms of the same numbers. `expanded` makes every head's keys and values and attends as other layers do, which is
less to compute where a whole sequence is there. `absorbed` multiplies a query into the latents' space instead, attends
there as if all heads shared one kv head, and makes values of what was found: so a page holds latents and nothing else.

    q . (k_up latent) = (k_up^T q) . latent            sum of weight (v_up latent) = v_up (sum of weight latent)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpaged.model.attention import Attend
from jaxpaged.model.linear import linear
from jaxpaged.model.norm import normalize
from jaxpaged.model.rope import RopeTable, rotate
from jaxpaged.model.spec import LatentAttention, Rope


def absorbed(
    x: Float[Array, "T M"], p: Mapping[str, Any], a: LatentAttention, tables: Mapping[Rope, RopeTable], attend: Attend
) -> tuple[Float[Array, "T M"], Any]:
    """`attend` gets queries [T, H, row_dim] and rows [T, 1, row_dim], of which the first kv_rank are values too."""
    q, row = _queries(x, p, a, tables), _rows(x, p, a, tables)
    inward = jnp.einsum("thn,hnr->thr", q[..., : a.nope_dim], p["k_up"]["w"])
    out, kv = attend(jnp.concatenate([inward, q[..., a.nope_dim :]], -1), row[:, None], None, a, None)
    return _outward(jnp.einsum("thr,hrv->thv", out, p["v_up"]["w"]), p), kv


def expanded(
    x: Float[Array, "T M"], p: Mapping[str, Any], a: LatentAttention, tables: Mapping[Rope, RopeTable], attend: Attend
) -> tuple[Float[Array, "T M"], Any]:
    """`attend` gets every head's queries and keys [T, H, head_dim] and values [T, H, v_dim]."""
    q, row = _queries(x, p, a, tables), _rows(x, p, a, tables)
    latent, rotated = row[:, : a.kv_rank], row[:, None, a.kv_rank :]
    k = jnp.einsum("tr,hnr->thn", latent, p["k_up"]["w"])
    k = jnp.concatenate([k, jnp.broadcast_to(rotated, (*k.shape[:2], a.rope.dim))], -1)
    out, kv = attend(q, k, jnp.einsum("tr,hrv->thv", latent, p["v_up"]["w"]), a, None)
    return _outward(out, p), kv


def _queries(
    x: Float[Array, "T M"], p: Mapping[str, Any], a: LatentAttention, tables: Mapping[Rope, RopeTable]
) -> Float[Array, "T H D"]:
    """Every head's query, its last numbers rotated."""
    if a.q_rank is not None:
        x = normalize(linear(x, p["q_down"]), p["q_norm"], a.norm)
    q = linear(x, p["q"]).reshape(-1, a.heads, a.head_dim)
    return jnp.concatenate([q[..., : a.nope_dim], rotate(q[..., a.nope_dim :], tables[a.rope], a.rope)], -1)


def _rows(
    x: Float[Array, "T M"], p: Mapping[str, Any], a: LatentAttention, tables: Mapping[Rope, RopeTable]
) -> Float[Array, "T R"]:
    """What is kept of each token: its normed latent, and the rotated part of its keys."""
    down = linear(x, p["kv_down"])
    rotated = rotate(down[:, None, a.kv_rank :], tables[a.rope], a.rope)[:, 0]
    return jnp.concatenate([normalize(down[:, : a.kv_rank], p["kv_norm"], a.norm), rotated], -1)


def _outward(values: Float[Array, "T H V"], p: Mapping[str, Any]) -> Float[Array, "T M"]:
    return linear(values.reshape(values.shape[0], -1), p["o"])
