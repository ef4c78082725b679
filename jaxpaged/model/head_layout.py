"""Heads that devices can share equally: kv heads repeated where there are too few, empty ones added where too odd.

A device holds some kv heads and as many query heads for each. With K kv heads of G query heads and N devices: each
kv head is given R slots, each slot an equal part of its query heads, and slots are filled up to a multiple of N.
R is the one that costs least. An empty head has weights of 0: its output is multiplied by rows of 0 and is nothing.

    9 query and 3 kv heads on 2 devices      slots  k0 k1 | k2 --             with 3 query heads each
    32 query and 8 kv heads on 16 devices    slots  k0 | k0 | k1 | ... | k7   with 2 query heads each
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.model.params import flatten, param_specs
from jaxpaged.model.spec import Attention, Decoder, LatentAttention, Mixer


class HeadLayout(NamedTuple):
    """For each head to be computed, in order, the model's head that it is; None: an empty one."""

    q: tuple[int | None, ...]
    kv: tuple[int | None, ...]


@cache
def head_layout(heads: int, kv_heads: int, num_shards: int) -> HeadLayout:
    """The cheapest layout for so many devices; heads / kv_heads as they are where kv_heads divide equally."""
    group = heads // kv_heads

    def sizes(repeats: int) -> tuple[int, int]:
        slots = -(-kv_heads * repeats // num_shards) * num_shards
        return slots, -(-group // repeats)

    def cost(repeats: int) -> tuple[int, int]:
        slots, per_slot = sizes(repeats)
        return slots * (per_slot + 2), repeats  # a head's columns of q and o; of k and v

    repeats = min(range(1, group + 1), key=cost)
    slots, per_slot = sizes(repeats)
    q: list[int | None] = []
    kv: list[int | None] = []
    for slot in range(slots):
        head, part = divmod(slot, repeats)
        kv.append(head if head < kv_heads else None)
        within = range(part * per_slot, (part + 1) * per_slot)
        q += [head * group + i if head < kv_heads and i < group else None for i in within]
    return HeadLayout(tuple(q), tuple(kv))


def fit_heads(spec: Decoder, num_shards: int) -> Decoder:
    """`spec` with the heads that are computed on so many devices; `spec` itself where they divide equally."""

    def fit(mixer: Mixer) -> Mixer:
        layout = _layout(mixer, num_shards)
        match mixer:
            case Attention():
                return replace(mixer, heads=len(layout.q), kv_heads=len(layout.kv))
            case LatentAttention():
                return replace(mixer, heads=len(layout.q))

    return replace(spec, blocks=tuple(replace(b, mixer=fit(b.mixer)) for b in spec.blocks))


def fit_share(fitted: Decoder, num_shards: int) -> Decoder:
    """What `fit_heads` gave with no more than one device's heads."""

    def share(mixer: Mixer) -> Mixer:
        match mixer:
            case Attention(heads=heads, kv_heads=kv_heads):
                return replace(mixer, heads=heads // num_shards, kv_heads=kv_heads // num_shards)
            case LatentAttention(heads=heads):
                return replace(mixer, heads=heads // num_shards)

    return replace(fitted, blocks=tuple(replace(b, mixer=share(b.mixer)) for b in fitted.blocks))


def fit_leaf(array: Any, path: str, spec: Decoder, num_shards: int) -> Any:
    """The leaf at `path` of `spec`'s params as `fit_heads(spec, num_shards)` needs it, on host or device as it came."""
    if (found := _layout_of(path, spec, num_shards)) is None:
        return array
    mixer, layout = found
    axes = dict(flatten(param_specs(spec)))[path].axes
    for dim, logical in enumerate(axes):
        if logical == "heads":
            array = _take(array, dim, mixer.heads, layout.q)
        elif logical == "kv_heads":
            array = _take(array, dim, _kv_heads(mixer), layout.kv)
    return array


def fitted_axes(path: str, spec: Decoder, num_shards: int) -> tuple[np.ndarray, ...]:
    """`fit_leaf` as data: which of the leaf's elements lie along each fitted axis; -1: a zero of an empty head."""
    leaf = dict(flatten(param_specs(spec)))[path]
    axes = [np.arange(size) for size in leaf.shape]
    if (found := _layout_of(path, spec, num_shards)) is None:
        return tuple(axes)
    mixer, layout = found
    for dim, logical in enumerate(leaf.axes):
        if logical in ("heads", "kv_heads"):
            count, order = (mixer.heads, layout.q) if logical == "heads" else (_kv_heads(mixer), layout.kv)
            size = leaf.shape[dim] // count
            within = np.arange(size)
            axes[dim] = np.concatenate([np.full(size, -1) if head is None else head * size + within for head in order])
    return tuple(axes)


def _layout_of(path: str, spec: Decoder, num_shards: int) -> tuple[Mixer, HeadLayout] | None:
    where, _, rest = path.partition(".")
    if where != "layers":
        return None
    mixer = spec.blocks[int(rest.partition(".")[0])].mixer
    return mixer, _layout(mixer, num_shards)


def _layout(mixer: Mixer, num_shards: int) -> HeadLayout:
    return head_layout(mixer.heads, _kv_heads(mixer), num_shards)


def _kv_heads(mixer: Mixer) -> int:
    """Heads that keys are made for: of a latent as many as there are queries."""
    return mixer.kv_heads if isinstance(mixer, Attention) else mixer.heads


def _take(array: Any, dim: int, num_heads: int, order: tuple[int | None, ...]) -> Any:
    """The heads that lie along `dim`, one after another, in this order; zeros where it says None."""
    if order == tuple(range(num_heads)):
        return array
    xp: Any = jnp if isinstance(array, jax.Array) else np
    *before, size = array.shape[: dim + 1]
    after = array.shape[dim + 1 :]
    split = array.reshape(*before, num_heads, size // num_heads, *after)
    padded = xp.concatenate([split, xp.zeros_like(xp.take(split, xp.asarray([0]), axis=dim))], axis=dim)
    index = xp.asarray([num_heads if head is None else head for head in order])
    return xp.take(padded, index, axis=dim).reshape(*before, -1, *after)
