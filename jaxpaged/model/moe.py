"""Mixtures of experts: which experts a row has, and the sum of what they make of it. No row is ever dropped.

Two forms of the same sum. `every_expert` computes all experts for all rows: plain, and differentiable to any order.
`chosen_experts` computes what was chosen: rows are sorted by expert into blocks of one expert each, and the blocks that
are not empty multiplied. Shapes do not depend on what was chosen, so any rows may choose the same expert.

    rows' experts    0: a c   1: a b   2: b a      blocks of 2    a: 0 1 | a: 2 - | b: 1 2 | c: 0 -

Where devices share the experts, or each expert's columns, every device adds up what it has, and one sum follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpaged.kernels.backend import Backend
from jaxpaged.kernels.expert_product import block_rows, expert_product
from jaxpaged.model.ffn import activation, feed_forward
from jaxpaged.model.linear import linear
from jaxpaged.model.params import expert_specs, is_param_spec, like
from jaxpaged.model.quantized import Quantized
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import ExpertGroups, Moe


class Routes(NamedTuple):
    """The experts of each row, likeliest first, and their weights."""

    experts: Int[Array, "T K"]
    weights: Float[Array, "T K"]


def route(x: Float[Array, "T M"], p: Mapping[str, Any], moe: Moe) -> Routes:
    """All experts' probabilities in float32, and the likeliest of those that may be chosen; of equal ones the first."""
    found = jnp.einsum("tm,me->te", x, p["router"]["w"], preferred_element_type=jnp.float32)
    likely = jax.nn.softmax(found, axis=-1) if moe.scoring == "softmax" else jax.nn.sigmoid(found)
    if moe.groups is None and not moe.selection_bias:
        weights, experts = lax.top_k(likely, moe.top_k)
    else:
        biased = likely + p["selection_bias"].astype(jnp.float32)[None] if moe.selection_bias else likely
        _, experts = lax.top_k(biased if moe.groups is None else _in_best_groups(biased, moe.groups), moe.top_k)
        weights = jnp.take_along_axis(likely, experts, axis=-1)
    if moe.renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
    return Routes(experts, weights if moe.scale == 1.0 else weights * moe.scale)


def _in_best_groups(scores: Float[Array, "T E"], groups: ExpertGroups) -> Float[Array, "T E"]:
    """The scores of each token's best groups; -inf for the rest."""
    split = scores.reshape(scores.shape[0], groups.count, -1)
    _, best = lax.top_k(lax.top_k(split, groups.best_of)[0].sum(-1), groups.top_k)
    is_best = (best[:, :, None] == jnp.arange(groups.count)[None, None]).any(1)
    return jnp.where(is_best[:, :, None], split, -jnp.inf).reshape(scores.shape)


def every_expert(x: Float[Array, "T M"], p: Mapping[str, Any], moe: Moe) -> Float[Array, "T M"]:
    """The mixture by computing all experts for all rows, one expert after another."""
    routes = route(x, p, moe)
    chosen = routes.experts[:, :, None] == jnp.arange(moe.experts)[None, None]  # [T, K, E]
    weights = jnp.where(chosen, routes.weights[:, :, None], 0.0).sum(1)

    @jax.checkpoint
    def add(y: Array, expert: tuple[Any, Array]) -> tuple[Array, None]:
        own, weight = expert
        return y + feed_forward(x, own, moe.expert).astype(jnp.float32) * weight[:, None], None

    y, _ = lax.scan(add, jnp.zeros(x.shape, jnp.float32), (p["experts"], weights.T))
    return _with_shared(y.astype(x.dtype), x, p, moe)


def chosen_experts(
    x: Float[Array, "T M"],
    p: Mapping[str, Any],
    moe: Moe,
    placement: Placement | None = None,
    rows: str | None = None,
    backend: Backend = "auto",
) -> Float[Array, "T M"]:
    """The mixture by computing what was chosen. With a placement the weights lie on its mesh, and `rows` is the logical
    axis along which rows are cut. `backend` is the experts' products'.
    """
    routes = route(x, p, moe)
    if placement is None:
        return _with_shared(_sum_of_chosen(x, routes, p["experts"], moe, backend), x, p, moe)
    over_experts, over_columns = placement.axes("experts"), placement.axes("expert_ffn")

    def here(x: Array, routes: Routes, experts: Any) -> Array:
        first = lax.axis_index(over_experts) * _count(experts) if over_experts else 0
        summed: Array = lax.psum(
            _sum_of_chosen(x, routes, experts, moe, backend, first), (*over_experts, *over_columns)
        )
        return summed

    cut = placement.partition(rows, None)
    specs = like(expert_specs(moe, x.shape[1]), p["experts"])
    leaves = jax.tree.map(lambda leaf: placement.partition(*leaf.axes), specs, is_leaf=is_param_spec)
    each = placement.on_each(
        lambda x, experts, weights, p: here(x, Routes(experts, weights), p),
        in_specs=(cut, cut, cut, leaves),
        out_specs=cut,
    )
    return _with_shared(each(x, *routes, p["experts"]), x, p, moe)


def _with_shared(y: Float[Array, "T M"], x: Float[Array, "T M"], p: Mapping[str, Any], moe: Moe) -> Float[Array, "T M"]:
    if moe.shared is None:
        return y
    shared = feed_forward(x, p["shared"], moe.shared)
    return y + (jax.nn.sigmoid(linear(x, p["shared_gate"])) * shared if moe.shared_gate else shared)


def _sum_of_chosen(
    x: Float[Array, "T M"], routes: Routes, experts: Any, moe: Moe, backend: Backend, first: Int[Array, ""] | int = 0
) -> Float[Array, "T M"]:
    """The weighted sum of those of the rows' experts that are in `experts`, `first` being the number of the first."""
    num_pairs, num_experts = routes.experts.size, _count(experts)
    size = block_rows(num_pairs, num_experts, backend)
    blocks = _make_blocks(routes.experts.reshape(-1) - first, num_experts, size)
    slots = jnp.zeros((blocks.experts.shape[0] * size, x.shape[1]), x.dtype)
    slots = slots.at[blocks.slots].set(jnp.repeat(x, moe.top_k, axis=0), mode="drop")

    def multiply(rows: Array, w: Array | Quantized) -> Array:
        weights, scale = w if isinstance(w, Quantized) else (w, None)
        return expert_product(rows, weights, blocks.experts, blocks.num_used, scale, backend=backend)

    rows = slots.reshape(-1, size, x.shape[1])
    hidden = activation(moe.act)(multiply(rows, experts["gate"]["w"])) * multiply(rows, experts["up"]["w"])
    out = multiply(hidden, experts["down"]["w"]).reshape(slots.shape)
    each = out.at[blocks.slots].get(mode="fill", fill_value=0).reshape(*routes.experts.shape, -1)  # [T, K, M]
    return (each.astype(jnp.float32) * routes.weights[:, :, None]).sum(1).astype(x.dtype)


def _count(experts: Any) -> int:
    """How many experts' weights there are."""
    count: int = jax.tree.leaves(experts)[0].shape[0]
    return count


class _Blocks(NamedTuple):
    """Each pair of a row and an expert in a slot of a block of that expert."""

    slots: Int[Array, " pairs"]  # past the last one for pairs whose expert is not here
    experts: Int[Array, " blocks"]
    num_used: Int[Array, ""]  # blocks that hold anything; they come first


def _make_blocks(experts: Int[Array, " pairs"], num_experts: int, size: int) -> _Blocks:
    """Blocks of `size` slots for pairs in order of their experts; those outside 0 .. num_experts - 1 have none."""
    num_pairs = experts.shape[0]
    num_blocks = (num_pairs + min(num_experts, num_pairs) * (size - 1)) // size  # however they are spread
    own = jnp.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    order = jnp.argsort(own)
    own = own[order]
    ends = _count_up_to(own, jnp.arange(num_experts + 1, dtype=jnp.int32))
    begins = jnp.pad(ends[:-1], (1, 0))
    block_ends = jnp.cumsum(-(-(ends - begins)[:-1] // size))
    block_begins = jnp.pad(block_ends, (1, 0))
    places = jnp.arange(num_pairs, dtype=jnp.int32) - begins[own] + block_begins[own] * size
    places = jnp.where(own < num_experts, places, num_blocks * size)
    return _Blocks(
        slots=jnp.zeros(num_pairs, jnp.int32).at[order].set(places),
        experts=jnp.minimum(_count_up_to(block_ends, jnp.arange(num_blocks, dtype=jnp.int32)), num_experts - 1),
        num_used=block_ends[-1],
    )


def _count_up_to(numbers: Int[Array, " A"], limits: Int[Array, " B"]) -> Int[Array, " B"]:
    """How many of the numbers are at most each limit: all compared, for a GPU launches a search's turns one by one."""
    return jnp.sum(numbers[None] <= limits[:, None], axis=1, dtype=jnp.int32)
