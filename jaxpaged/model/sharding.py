"""Where arrays lie on a mesh: rules from logical axes to mesh axes, and weights, pools and logits placed by them.

Only tensor parallelism is meant: what one layer computes is cut over heads, ffn columns and vocabulary, and each device
keeps its part of the weights and of every page. A layer then costs two all-reduces, one after each row-cut product.
How heads are made to share equally among devices is told in `head_layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpaged.errors import ConfigError
from jaxpaged.model.head_layout import fit_heads, fit_leaf
from jaxpaged.model.params import Params, ParamSpec, flatten, map_specs, param_specs
from jaxpaged.model.spec import Decoder


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis each logical axis is cut along; None keeps it whole on every device.

    heads, kv_heads   query and kv heads. Attention is independent per kv head, so these want no traffic until the
                      output projection's sum; the two must be cut alike: a query head reads its kv head's pages
    ffn               columns of up and gate, rows of down: the other sum of a layer
    vocab             rows of the embedding, columns of the head. Logits stay cut while they are sampled from
    embed             the residual stream's width. Whole: cutting it would make every product a sum over devices

    A mesh axis that no rule names holds copies.
    """

    heads: str | None = "model"
    kv_heads: str | None = "model"
    ffn: str | None = "model"
    vocab: str | None = "model"
    embed: str | None = None

    @classmethod
    def on(cls, axis: str) -> ShardingRules:
        """The usual rules along a mesh axis of another name than "model"."""
        return cls(heads=axis, kv_heads=axis, ffn=axis, vocab=axis)

    @property
    def by_axis(self) -> Mapping[str | None, str | None]:
        """Logical axis -> mesh axis."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules for it. Hashable: the step takes it as a static argument.

    A mesh without devices tells shapes and shares, and nothing can be put on it.
    """

    mesh: Mesh | AbstractMesh
    rules: ShardingRules = ShardingRules()

    def __post_init__(self) -> None:
        """Take a mesh with any kind of axes. Raises ConfigError where rules and mesh do not fit each other."""
        names, rules = self.mesh.axis_names, self.rules
        for logical, axis in rules.by_axis.items():
            if axis is not None and axis not in names:
                known = ", ".join(repr(name) for name in names)
                raise ConfigError(
                    f"the sharding rules cut {logical} along mesh axis {axis!r}, but the mesh has {known}; "
                    f"pass sharding_rules=ShardingRules.on({names[0]!r}), or rename the axis"
                )
        if rules.heads != rules.kv_heads:
            raise ConfigError(
                f"the sharding rules cut heads along {rules.heads!r} but kv_heads along {rules.kv_heads!r}; "
                "a query head must lie where its kv head does: name one axis for both"
            )
        # The partitioner decides what no rule says, whatever the caller's own program leaves to it.
        auto = (AxisType.Auto,) * len(names)
        is_abstract = isinstance(self.mesh, AbstractMesh)
        mesh = self.mesh.update(axis_types=auto) if is_abstract else Mesh(self.mesh.devices, names, axis_types=auto)
        object.__setattr__(self, "mesh", mesh)

    def num_shards(self, logical: str) -> int:
        """Into how many parts this logical axis is cut."""
        axis = self.rules.by_axis[logical]
        return 1 if axis is None else int(self.mesh.shape[axis])

    def partition(self, *logical: str | None) -> PartitionSpec:
        """How an array with these logical axes (None: whole) is cut. Raises ConfigError where two fall on one axis."""
        axes = [None if name is None else self.rules.by_axis[name] for name in logical]
        for axis in axes:
            if axis is not None and axes.count(axis) > 1:
                both = " and ".join(str(name) for name, a in zip(logical, axes, strict=True) if a == axis)
                raise ConfigError(
                    f"the sharding rules cut {both} along mesh axis {axis!r}, and some weights have both; "
                    "set one of them to None or to another axis"
                )
        return PartitionSpec(*axes)

    def sharding(self, *logical: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes; of none: a copy on every device."""
        return NamedSharding(self.mesh, self.partition(*logical))

    def fit(self, spec: Decoder) -> Decoder:
        """The spec of what the devices compute: `spec` with as many heads as they can share equally.

        Raises ConfigError where ffn or vocabulary cannot be shared.
        """
        fitted = fit_heads(spec, self.num_shards("heads"))
        for path, leaf in flatten(param_specs(fitted)):
            self.partition(*leaf.axes)
            for size, logical in zip(leaf.shape, leaf.axes, strict=True):
                if logical is not None and size % self.num_shards(logical):
                    raise ConfigError(self._indivisible(path, logical, size))
        return fitted

    def place(self, params: Params, spec: Decoder) -> Params:
        """`params` of `spec`, or of what it is fitted to, each leaf where it belongs; those that lie there stay.

        Leaves may be shapes, which stay shapes.
        """
        want = dict(flatten(param_specs(self.fit(spec))))
        given = dict(flatten(params))

        def put(path: str, leaf: ParamSpec) -> Any:
            array: Any = given[path]
            if isinstance(array, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(want[path].shape, array.dtype, sharding=self.sharding(*leaf.axes))
            if np.shape(array) != want[path].shape:
                array = fit_leaf(array, path, spec, self.num_shards("heads"))
            return self._put(array, leaf)

        return map_specs(put, spec)

    def put_for(self, spec: Decoder) -> Callable[[str, ParamSpec, Any], jax.Array]:
        """put(path, leaf, array): places a leaf as read from a checkpoint, on each device its part and no more.

        Raises ConfigError, before any leaf is read, where the devices cannot share the model.
        """
        self.fit(spec)
        return lambda path, leaf, array: self._put(fit_leaf(array, path, spec, self.num_shards("heads")), leaf)

    def cache_partition(self, pools: Any) -> Any:
        """How every leaf of a pool, or of any tree of pools, is cut: kv heads are axis 3 of pages and scales."""
        return jax.tree.map(lambda leaf: self.partition(*(None, None, None, "kv_heads", None)[: leaf.ndim]), pools)

    def cache_shardings(self, pools: Any) -> Any:
        """The same as shardings."""
        return jax.tree.map(lambda partition: NamedSharding(self.mesh, partition), self.cache_partition(pools))

    def _put(self, array: Any, leaf: ParamSpec) -> jax.Array:
        sharding = self.sharding(*leaf.axes)
        if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        placed: jax.Array = jax.device_put(array, sharding)
        return placed

    def _indivisible(self, path: str, logical: str, size: int) -> str:
        count, axis = self.num_shards(logical), self.rules.by_axis[logical]
        below = next(n for n in range(count, 0, -1) if size % n == 0)
        above = next(n for n in range(count, size + 1) if size % n == 0)
        return (
            f"{logical} is {size:,} ({path}), which the {count} devices of mesh axis {axis!r} cannot share equally; "
            f"take {below} or {above} devices, or keep it whole with ShardingRules({logical}=None)"
        )


def tensor_parallel(size: int, rules: ShardingRules | None = None) -> Placement:
    """A mesh of the first `size` devices along one axis. Raises ConfigError where there are fewer."""
    devices = jax.devices()
    if not 1 <= size <= len(devices):
        raise ConfigError(
            f"tensor_parallel_size is {size} but JAX sees {len(devices)} {devices[0].platform} device(s); "
            f"lower it to at most {len(devices)}"
        )
    rules = rules or ShardingRules()
    return Placement(Mesh(np.asarray(devices[:size]), (rules.heads or "model",)), rules)
