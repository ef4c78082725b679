"""New weights for a running engine: all of them or none, without a copy where they lie as the old ones do."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxpaged.errors import ConfigError
from jaxpaged.model.params import Params, check_params, flatten
from jaxpaged.model.spec import Decoder


def fitting(new: Any, old: Params, spec: Decoder) -> Params:
    """`new` as the compiled steps take it: the same arrays, those that lie on other devices moved.

    Raises ConfigError that lists every missing, unexpected and mis-shaped leaf, and every one of another dtype.
    """
    leaves, old_leaves = jax.tree.leaves(new), jax.tree.leaves(old)
    structure: Any = jax.tree.structure(new)
    old_structure: Any = jax.tree.structure(old)
    same = structure == old_structure
    if not (same and all(map(_lies_as, leaves, old_leaves))):  # one look at each leaf: a swap should take no time
        if not same or any(_kind(a) != _kind(b) for a, b in zip(leaves, old_leaves, strict=True)):
            raise ConfigError("the new params do not fit: " + "; ".join(_misfits(new, old, spec)))
        leaves = [_placed(a, b) for a, b in zip(leaves, old_leaves, strict=True)]
    params: Params = jax.tree.unflatten(structure, leaves)
    return params


def _lies_as(new: Any, old: jax.Array) -> bool:
    if not isinstance(new, jax.Array) or new.shape != old.shape or new.dtype != old.dtype:
        return False
    return new.sharding is old.sharding or new.sharding == old.sharding


def _kind(leaf: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return np.shape(leaf), np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.dtype(type(leaf))


def _placed(new: Any, old: jax.Array) -> jax.Array:
    placed: jax.Array = new if _lies_as(new, old) else jax.device_put(new, old.sharding)
    return placed


def _misfits(new: Any, old: Params, spec: Decoder) -> list[str]:
    problems = check_params(spec, new)
    dtypes = {path: _kind(leaf)[1] for path, leaf in flatten(old)}
    for path, leaf in flatten(new):
        dtype = _kind(leaf)[1]
        if path in dtypes and dtype != dtypes[path]:
            problems.append(f"{path} is {dtype}, needs {dtypes[path]}")
    return problems or [f"the tree is a {jax.tree.structure(new)}, needs a {jax.tree.structure(old)}"]
