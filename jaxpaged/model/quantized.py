"""Weights in 8 or 4 bits: how a matrix becomes whole steps and scales, how it is multiplied by, how it goes back.

    values [..., M, F]   int8, float8_e4m3fn or int4        scale [..., G, F]   float32

Each column of each group of M / G rows has its own scale; w is about values * scale. With one group (int8, fp8) it
is taken out of the product: x @ values, summed in float32, times scale, so that XLA reads 8 bits a weight and rounds
once. With several (int4) it cannot be, and the weights are scaled first.

XLA makes the floats of a product inside it on GPUs. On CPUs it would make those of all weights before the first product
of a step, and hold them: there a product is a loop over tiles of columns, which fit a cache as floats.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxpaged.model.spec import Quantization, WeightDtype

_TILE = 1 << 18  # numbers, 1 MiB of floats
_SMALL = 1 << 14  # not worth a loop


class Quantized(NamedTuple):
    """A matrix, or one for each expert, that is values * scale. A pytree of two leaves, on the host or on devices."""

    values: Any
    scale: Any


class Steps(NamedTuple):
    """A dtype's numbers: the scale is a column's largest weight divided by `per_scale`, and none lies past the ends."""

    dtype: np.dtype[Any]
    per_scale: float
    lowest: float
    highest: float


STEPS: dict[WeightDtype, Steps] = {
    "int8": Steps(jnp.dtype(jnp.int8), 127, -127, 127),
    "fp8": Steps(jnp.dtype(jnp.float8_e4m3fn), 448, -448, 448),
    "int4": Steps(jnp.dtype(jnp.int4), 7.49, -7, 7),  # finer than 7, and the largest is still off by less than half
}


def quantize(w: Any, how: Quantization) -> Quantized:
    """A float matrix [..., M, F], numpy's or JAX's, to the nearest steps: off by half a scale at most (fp8: by a 16th).

    What is not finite makes scales that are not.
    """
    xp, steps = w.__array_namespace__(), STEPS[how.dtype]
    *first, rows, columns = w.shape
    size = how.group_size or rows
    groups = w.astype(np.float32).reshape(*first, rows // size, size, columns)
    # Times a reciprocal, as XLA would rewrite a division by a constant: numpy and JAX then find the same steps.
    scale = xp.max(xp.abs(groups), axis=-2) * np.float32(1 / steps.per_scale)
    scale = xp.maximum(scale, np.finfo(np.float32).tiny)
    values = xp.clip(groups / scale[..., None, :], steps.lowest, steps.highest)
    values = values if how.dtype == "fp8" else xp.rint(values)
    return Quantized(values.astype(steps.dtype).reshape(w.shape), scale)


def dequantize(w: Quantized, dtype: Any) -> Any:
    """The matrix as floats, numpy's or JAX's."""
    *first, rows, columns = w.values.shape
    groups = w.scale.shape[-2]
    values = w.values.astype(np.float32).reshape(*first, groups, rows // groups, columns)
    return (values * w.scale[..., None, :]).reshape(w.values.shape).astype(dtype)


def quantized_product(x: Float[Array, "T M"], w: Quantized) -> Float[Array, "T F"]:
    """x @ w."""
    y: Array = lax.platform_dependent(x, w, cpu=_in_tiles, default=_product)
    return y


def _product(x: Float[Array, "T M"], w: Quantized) -> Float[Array, "T F"]:
    if w.scale.shape[-2] > 1:
        y = jnp.matmul(x, dequantize(w, x.dtype), preferred_element_type=jnp.float32)
    else:
        y = jnp.matmul(x, w.values.astype(x.dtype), preferred_element_type=jnp.float32) * w.scale
    rounded: Array = y.astype(x.dtype)
    return rounded


def _in_tiles(x: Float[Array, "T M"], w: Quantized) -> Float[Array, "T F"]:
    """The product in tiles of columns: of each of up to 8 equal runs of them a part, so that a mesh of as many devices
    or fewer, which has a run or several on each, slices what it has.
    """
    rows, columns = w.values.shape
    runs = next(n for n in (8, 4, 2, 1) if columns % n == 0)
    fewest = max(2, -(-rows * columns // _TILE))
    count = next((n for n in range(fewest, columns // runs + 1) if columns // runs % n == 0), 1)
    if rows * columns < _SMALL or count == 1:
        return _product(x, w)
    # As bits: a loop that slices floats of 8 bits gets all of them as 16.
    bits = lax.bitcast_convert_type(w.values, jnp.int8) if w.values.dtype == jnp.float8_e4m3fn else w.values
    values, scale = (leaf.reshape(leaf.shape[0], runs, count, -1) for leaf in (bits, w.scale))

    def one(index: Array, out: Array) -> Array:
        parts = (lax.dynamic_index_in_dim(leaf, index, 2, keepdims=False) for leaf in (values, scale))
        tile, own = (leaf.reshape(leaf.shape[0], -1) for leaf in parts)
        tile = lax.bitcast_convert_type(tile, w.values.dtype) if tile.dtype != w.values.dtype else tile
        y = _product(x, Quantized(tile, own))
        done: Array = lax.dynamic_update_index_in_dim(out, y.reshape(out.shape[0], runs, -1), index, 2)
        return done

    out = jnp.zeros((x.shape[0], runs, count, columns // runs // count), x.dtype)
    y: Array = lax.fori_loop(0, count, one, out).reshape(x.shape[0], columns)
    return y
