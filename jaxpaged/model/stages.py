"""Pipeline stages: a model's layers in runs, each on devices of its own, which hand rows of hidden states to the next.

    llama, 16 layers, 2 stages:   0   embedding, layers 0 .. 7            1   layers 8 .. 15, last norm, head

The first stage has the embedding and the last one the head; a tied head is the embedding's table, which both then hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxpaged.errors import ConfigError
from jaxpaged.model.cache import KVCache
from jaxpaged.model.params import Params
from jaxpaged.model.spec import Decoder

_FIRST = ("positions", "project_in")  # besides the embedding
_LAST = ("norm", "project_out", "head")


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers begin .. end - 1 of a model, the `index`th of `count` such runs."""

    index: int
    count: int
    begin: int
    end: int

    @property
    def is_first(self) -> bool:
        """Whether tokens come in here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether logits come out here."""
        return self.index == self.count - 1

    def params(self, params: Params) -> Params:
        """The stage's part of a tree of weights, or of anything that has their shape."""
        own = {name: params[name] for name in _FIRST if self.is_first and name in params}
        own |= {name: params[name] for name in _LAST if self.is_last and name in params}
        if self.is_first or (self.is_last and "head" not in params):
            own["embed"] = params["embed"]
        return own | {"layers": params["layers"][self.begin : self.end]}

    def cache(self, cache: KVCache) -> KVCache:
        """The pools of the stage's layers."""
        return KVCache(cache.pools[self.begin : self.end])


def make_stages(num_layers: int, count: int) -> tuple[Stage, ...]:
    """Runs of as equal length as can be, the last ones shorter: one has the head. ConfigError where one were empty."""
    if count > num_layers:
        raise ConfigError(
            f"the model has {num_layers:,} layers, too few for {count:,} pipeline stages; take at most {num_layers:,}"
        )
    each, longer = divmod(num_layers, count)
    bounds = [each * index + min(index, longer) for index in range(count + 1)]
    return tuple(Stage(index, count, *bounds[index : index + 2]) for index in range(count))


def holders(path: str, spec: Decoder, stages: tuple[Stage, ...]) -> tuple[int, ...]:
    """The stages that hold the leaf at this path of the weights, in order."""
    first, last = 0, len(stages) - 1
    name, *rest = path.split(".")
    if name == "layers":
        return tuple(stage.index for stage in stages if stage.begin <= int(rest[0]) < stage.end)
    if name == "embed" and spec.tied_head and last > 0:
        return first, last
    return (last,) if name in _LAST else (first,)


def part_on(array: jax.Array, sharding: Any) -> jax.Array:
    """An array that lies on more devices, as one on those of `sharding`, which hold the same parts: nothing moves."""
    return array_of({s.device: s.data for s in array.addressable_shards}, array.shape, array.dtype, sharding)


def array_of(parts: Mapping[Any, jax.Array], shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    """An array of this process's `parts` by device, of which `sharding` may take some, or none."""
    own = [parts[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, own, dtype=dtype)
