"""Arrays from one pipeline stage's devices to another's: copies within a process, a collective permutation across.

Each process holds its own devices' parts of an array, perhaps none, and calls what all call. A permutation is compiled
for the two stages that it links; processes with devices in neither go past it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpaged.engine.compilation import Compiler, Key, traced
from jaxpaged.model.stages import array_of

_AXIS = "from and to"


class Links:
    """Between stages whose meshes are alike. Permutations are compiled by `compiler`."""

    def __init__(self, compiler: Compiler) -> None:
        """None is compiled yet."""
        self._compiler = compiler
        self._ready: dict[Key, tuple[Any, Any, dict[jax.Device, jax.Array]]] = {}

    def move(self, array: Any, to: NamedSharding) -> Any:
        """The array on the devices of `to`, cut as it was. What the host holds stays there: a call takes it along."""
        if not isinstance(array, jax.Array) or array.sharding == to:
            return array
        if not _crosses(array.sharding, to):
            here = bool(to.addressable_devices)
            return jax.device_put(array, to) if here else array_of({}, array.shape, array.dtype, to)
        key = self.key(array, to)
        if key not in self._ready:
            zeros = np.zeros(to.shard_shape(array.shape), array.dtype)  # what targets send, which nobody reads
            parts = {device: jax.device_put(zeros, device) for device in to.addressable_devices}
            self._ready[key] = _both(array, to), self.permutation(array, to), parts
        both, permutation, parts = self._ready[key]
        parts = parts | {shard.device: shard.data for shard in array.addressable_shards}
        moved = permutation(array_of(parts, both.shape, both.dtype, both.sharding))
        return array_of({shard.device: shard.data for shard in moved.addressable_shards}, array.shape, array.dtype, to)

    def permutation(self, array: Any, to: NamedSharding) -> Any:
        """What `move` calls for an array of this shape and place, or None where it calls nothing."""
        if not _crosses(array.sharding, to):
            return None
        both = _both(array, to)
        mapped: Any = jax.shard_map(
            partial(jax.lax.ppermute, axis_name=_AXIS, perm=[(0, 1)]),
            mesh=both.sharding.mesh,
            in_specs=both.sharding.spec,
            out_specs=both.sharding.spec,
            check_vma=False,
        )
        return self._compiler.get(self.key(array, to), traced, (mapped, {"out_shardings": both.sharding}), (both,))

    def key(self, array: Any, to: NamedSharding) -> Key:
        """What a permutation is known by."""
        return "move", (array.shape, str(array.dtype), array.sharding, to)


def _both(array: Any, to: NamedSharding) -> Any:
    """Source and target as one array: the target's rows after the source's."""
    first, *rest = (*array.sharding.spec, *[None] * len(array.shape))[: len(array.shape)]
    axes: tuple[str, ...] = () if first is None else first if isinstance(first, tuple) else (first,)
    meshes: Any = array.sharding.mesh, to.mesh
    mesh = Mesh(np.stack([mesh.devices for mesh in meshes]), (_AXIS, *to.mesh.axis_names))
    sharding = NamedSharding(mesh, PartitionSpec((_AXIS, *axes), *rest))
    return jax.ShapeDtypeStruct((2 * array.shape[0], *array.shape[1:]), array.dtype, sharding=sharding)


@cache
def _crosses(source: NamedSharding, target: NamedSharding) -> bool:
    """Whether the devices of the two lie in several processes."""
    devices: Any = source.device_set | target.device_set
    return len({device.process_index for device in devices}) > 1
