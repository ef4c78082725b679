"""New weights for a running engine: all of them or none, without a copy where they lie as the old ones do."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxpaged.errors import ConfigError
from jaxpaged.kernels.tiles import current_device
from jaxpaged.model.params import Params, check_params, flatten
from jaxpaged.model.spec import Decoder, Moe

_Kind = tuple[tuple[int, ...], np.dtype[Any]]


class Layout:
    """What compiled steps hold of the weights: their tree, and each leaf's shape, dtype and place.

    A swap that changes nothing of it reads each new array once and no old one: there are hundreds, none in a cache.
    """

    def __init__(self, params: Params) -> None:
        """The layout of these weights, or of shapes that stand for them."""
        leaves, structure = jax.tree.flatten(params)
        self._structure: Any = structure
        self._kinds = [_kind(leaf) for leaf in leaves]
        self._shardings = [leaf.sharding for leaf in leaves]
        self._avals = [getattr(leaf, "aval", None) for leaf in leaves]  # shapes have none, and equal none

    def fit(self, params: Any, spec: Decoder) -> Params:
        """`params` as the compiled steps take it: the same arrays, those that lie on other devices moved.

        Raises ConfigError that lists every missing, unexpected and mis-shaped leaf, and every one of another dtype or
        deleted.
        """
        leaves, structure = jax.tree.flatten(params)
        is_alike = structure == self._structure and self._is_of(leaves)
        if not is_alike:
            self.check(params, spec)
        check_alive(params)
        if not is_alike:
            leaves = [_placed(leaf, sharding) for leaf, sharding in zip(leaves, self._shardings, strict=True)]
            self._avals = [leaf.aval for leaf in leaves]  # the next ones will look like these
        taken: Params = jax.tree.unflatten(structure, leaves)
        return taken

    def check(self, params: Any, spec: Decoder) -> None:
        """What `fit` raises of the shapes and dtypes of `params`, which may be shapes."""
        leaves, structure = jax.tree.flatten(params)
        if structure != self._structure or list(map(_kind, leaves)) != self._kinds:
            raise ConfigError("the new params do not fit: " + "; ".join(self._misfits(params, spec)))

    def _is_of(self, leaves: list[Any]) -> bool:
        if not all(issubclass(kind, jax.Array) for kind in set(map(type, leaves))):
            return False
        if [leaf.aval for leaf in leaves] != self._avals:
            return False
        places = zip([leaf.sharding for leaf in leaves], self._shardings, strict=True)
        return all(a == b for a, b in {(id(a), id(b)): (a, b) for a, b in places}.values())  # few differ in identity

    def _misfits(self, params: Any, spec: Decoder) -> list[str]:
        problems = check_params(spec, params)
        kinds = dict(flatten(jax.tree.unflatten(self._structure, range(len(self._kinds)))))
        for path, leaf in flatten(params):
            if path in kinds and _kind(leaf)[1] != (dtype := self._kinds[kinds[path]][1]):
                problems.append(f"{path} is {_kind(leaf)[1]}, needs {dtype}")
        return problems or [f"the tree is a {jax.tree.structure(params)}, needs a {self._structure}"]


def check_readable(spec: Decoder) -> None:
    """Raises ConfigError where kernels cannot read weights quantised so on this device, or on the one that is meant."""
    device = current_device()
    is_fp8 = spec.quantization is not None and spec.quantization.dtype == "fp8"
    has_experts = any(isinstance(block.ffn, Moe) for block in spec.blocks)
    if is_fp8 and has_experts and device.platform == "gpu" and device.capability < 8.9:
        raise ConfigError(
            "quantization is 'fp8', and products of experts read such weights from compute capability 8.9 on; "
            f"{device.name} has {device.capability}: use int8"
        )


def on_device(params: Params) -> Params:
    """The same arrays, and numpy's on the default device."""
    leaves: Params = jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, params)
    return leaves


def check_alive(params: Any) -> None:
    """Raises ConfigError where arrays among them have been deleted."""
    if any(_is_gone(leaf) for leaf in jax.tree.leaves(params)):
        gone = [path for path, leaf in flatten(params) if _is_gone(leaf)]
        raise ConfigError(f"{len(gone):,} of the new params were deleted or donated, {gone[0]} the first; give others")


def shape_of(leaf: Any) -> Any:
    """What stands for a leaf, on the host or on devices: its shape and dtype."""
    return jax.ShapeDtypeStruct(*_kind(leaf))


def _is_gone(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


def _kind(leaf: Any) -> _Kind:
    return np.shape(leaf), np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.dtype(type(leaf))


def _placed(new: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    lies_there = isinstance(new, jax.Array) and new.sharding == sharding
    placed: jax.Array = new if lies_there else jax.device_put(new, sharding)
    return placed
