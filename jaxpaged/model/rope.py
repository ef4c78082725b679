"""Rotary position embeddings and their scalings. Tables are made once per step and shared by all layers.

Frequencies follow the papers named in `spec.py`, as transformers' `modeling_rope_utils` computes them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpaged.model.spec import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)


class RopeTable(NamedTuple):
    """cos and sin of every token's angles."""

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def rope_table(rope: Rope, positions: Int[Array, " T"], rope_lens: Int[Array, " T"]) -> RopeTable:
    """Angles at `positions`; `rope_lens` is the length that length-dependent scalings go by (see `spec.py`)."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim
    base = (1.0 / rope.theta**exponents).astype(np.float32)
    factor = 1.0
    match rope.scaling:
        case None:
            freqs = jnp.asarray(base)[None]
        case LinearScaling(factor=divisor):
            freqs = jnp.asarray(base / np.float32(divisor))[None]
        case Llama3Scaling() as scaling:
            freqs = jnp.asarray(_llama3(base, scaling))[None]
        case YarnScaling() as scaling:
            freqs, factor = jnp.asarray(_yarn(base, rope, scaling))[None], scaling.attention_factor
        case DynamicNtkScaling() as scaling:
            longest = jnp.maximum(rope_lens, scaling.original_max_positions).astype(jnp.float32)
            growth = scaling.factor * longest / scaling.original_max_positions - (scaling.factor - 1)
            theta = rope.theta * growth ** (rope.dim / (rope.dim - 2))
            freqs = 1.0 / theta[:, None] ** jnp.asarray(exponents)[None]
        case LongRopeScaling() as scaling:
            short = base / np.asarray(scaling.short_factor, np.float32)
            long = base / np.asarray(scaling.long_factor, np.float32)
            is_long = (rope_lens > scaling.original_max_positions)[:, None]
            freqs, factor = (
                jnp.where(is_long, jnp.asarray(long)[None], jnp.asarray(short)[None]),
                scaling.attention_factor,
            )
    angles = positions.astype(jnp.float32)[:, None] * freqs

    def table(angles: Array) -> RopeTable:
        return RopeTable(jnp.cos(angles) * factor, jnp.sin(angles) * factor)

    def table_once(angles: Array) -> RopeTable:
        """As XLA's CPU backend computes it for all layers together, and not anew for every head of each: that took 6 %
        of a step. It fuses across its own barriers, but not across a loop of unknown length.
        """
        once = jnp.minimum(positions.max() + 1, 1)
        found: RopeTable = lax.fori_loop(0, once, lambda _, given: table(given.cos), RopeTable(angles, angles))
        return found

    found: RopeTable = lax.platform_dependent(angles, cpu=table_once, default=table)
    return found


def rotate(x: Float[Array, "T H D"], table: RopeTable, rope: Rope) -> Float[Array, "T H D"]:
    """x with the first `rope.dim` of each head rotated."""
    cos, sin = table.cos[:, None], table.sin[:, None]
    head, rest = x[..., : rope.dim].astype(jnp.float32), x[..., rope.dim :]
    if rope.interleaved:
        a, b = head[..., ::2], head[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(head.shape)
    else:
        a, b = jnp.split(head, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)


def _llama3(base: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    wavelengths = 2 * math.pi / base
    longest_kept = s.original_max_positions / s.high_freq_factor
    shortest_scaled = s.original_max_positions / s.low_freq_factor
    smooth = (s.original_max_positions / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - smooth) * base / s.factor + smooth * base
    scaled = np.where(
        wavelengths > shortest_scaled, base / s.factor, np.where(wavelengths < longest_kept, base, between)
    )
    return scaled.astype(np.float32)


def _yarn(base: np.ndarray, rope: Rope, s: YarnScaling) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original context."""
        return rope.dim * math.log(s.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    scaled: np.ndarray = base / s.factor * ramp + base * (1 - ramp)
    return scaled.astype(np.float32)
