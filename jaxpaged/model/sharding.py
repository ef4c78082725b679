"""Where arrays lie on a mesh: rules from logical axes to mesh axes, and weights, pools and logits placed by them.

Tensor parallelism: what one layer computes is cut over heads, ffn columns and vocabulary, and each device keeps its
part of the weights and of every page. A layer then costs two all-reduces, one after each row-cut product. How heads are
made to share equally among devices is told in `head_layout.py`.

Data parallelism: a step's rows and the pool's pages are cut into shards, each with sequences and page ids of its own,
and every shard has all the weights. What is computed runs under `shard_map` along that axis, on one shard's arrays as
if there were no other, so that nothing can move between them.

Context parallelism: where a step computes prompts, its tokens, the rows of every product, are cut. Attention alone
needs others' keys: for it an all-to-all makes heads of rows, and another makes rows of heads after it. So pages are cut
by heads along that axis too, none is held twice, and all devices attend to as much, wherever their rows are.

Pipeline stages: runs of layers lie on parts of the mesh, each with the other axes, their weights and pools with them
(`stages.py`). A stage's step is a program of its own, on its own part, and hidden states go from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpaged.errors import ConfigError
from jaxpaged.model.head_layout import fit_heads, fit_leaf, fit_share, fitted_axes
from jaxpaged.model.params import Params, ParamSpec, ReadPart, flatten, map_specs, param_specs
from jaxpaged.model.spec import Attention, Decoder
from jaxpaged.model.stages import array_of, holders, make_stages


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis each logical axis is cut along; None keeps it whole on every device.

    heads, kv_heads   query and kv heads. Attention is independent per kv head, so these want no traffic until the
                      output projection's sum; the two must be cut alike: a query head reads its kv head's pages
    ffn               columns of up and gate, rows of down: the other sum of a layer
    experts           the experts of a mixture, whole ones to each device. Without an axis, or with another one than
                      ffn, every expert is cut along ffn as other layers are
    vocab             rows of the embedding, columns of the head. Logits stay cut while they are sampled from
    embed             the residual stream's width. Whole: cutting it would make every product a sum over devices
    data              the rows of a step and the pages: each part holds sequences of its own, all weights, and waits for
                      no other inside a step
    sequence          the tokens of a step that computes prompts, as rows of every product; attention and pages have
                      heads cut along it instead (besides `heads`), so that rows become heads before it and rows after.
                      Every part has all weights that no other axis cuts
    layers            the layers, in order: each part of the mesh along it has a run of them, with their pools. Only
                      rows of hidden states pass from one to the next, so the links between may be slow

    A mesh axis that no rule names holds copies.
    """

    heads: str | None = "model"
    kv_heads: str | None = "model"
    ffn: str | None = "model"
    experts: str | None = None
    vocab: str | None = "model"
    embed: str | None = None
    data: str | None = None
    sequence: str | None = None
    layers: str | None = None

    @classmethod
    def on(
        cls, axis: str | None, *, data: str | None = None, sequence: str | None = None, layers: str | None = None
    ) -> ShardingRules:
        """The usual rules along a mesh axis of another name than "model"; None: each data shard has all of a layer."""
        return cls(heads=axis, kv_heads=axis, ffn=axis, vocab=axis, data=data, sequence=sequence, layers=layers)

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
        for name, axis in (("data", rules.data), ("sequence", rules.sequence), ("layers", rules.layers)):
            shared = [str(other) for other, its in rules.by_axis.items() if its == axis and other != name]
            if axis is not None and shared:
                why = "every part has layers of its own" if name == "layers" else "every device has all the weights"
                raise ConfigError(
                    f"the sharding rules cut {name} and {', '.join(shared)} along mesh axis {axis!r}; along the axis "
                    f"of {name} {why}: name another one for {name}"
                )
        # The partitioner decides what no rule says, whatever the caller's own program leaves to it.
        auto = (AxisType.Auto,) * len(names)
        is_abstract = isinstance(self.mesh, AbstractMesh)
        mesh = self.mesh.update(axis_types=auto) if is_abstract else Mesh(self.mesh.devices, names, axis_types=auto)
        object.__setattr__(self, "mesh", mesh)

    @property
    def stages(self) -> tuple[Placement, ...]:
        """Where each pipeline stage lies: its part of the mesh, by rules without `layers`. One stage: all of it."""
        return tuple(self._on_stages([index]) for index in range(self.num_shards("layers")))

    def _on_stages(self, indices: Sequence[int]) -> Placement:
        """These stages' part of the mesh; along the axis of the layers lie copies."""
        if (axis := self.rules.layers) is None:
            return self
        at, names, rules = self.mesh.axis_names.index(axis), self.mesh.axis_names, replace(self.rules, layers=None)
        if isinstance(self.mesh, AbstractMesh):
            sizes = (*self.mesh.axis_sizes[:at], len(indices), *self.mesh.axis_sizes[at + 1 :])
            return Placement(AbstractMesh(sizes, names), rules)
        return Placement(Mesh(np.take(self.mesh.devices, indices, axis=at), names), rules)

    def of_leaf(self, path: str, spec: Decoder) -> Placement:
        """Where the leaf at this path of the weights lies: on its stages' part of the mesh."""
        if self.rules.layers is None:
            return self
        return self._on_stages(holders(path, spec, make_stages(len(spec.blocks), self.num_shards("layers"))))

    def num_shards(self, logical: str) -> int:
        """Into how many parts this logical axis is cut."""
        return math.prod(int(self.mesh.shape[axis]) for axis in self.axes(logical))

    def partition(self, *logical: str | None) -> PartitionSpec:
        """How an array with these logical axes (None: whole) is cut. Raises ConfigError where two fall on one axis."""
        axes = [() if name is None else self.axes(name) for name in logical]
        for axis in (axis for cut in axes for axis in cut):
            if sum(axis in cut for cut in axes) > 1:
                both = " and ".join(str(name) for name, cut in zip(logical, axes, strict=True) if axis in cut)
                raise ConfigError(
                    f"the sharding rules cut {both} along mesh axis {axis!r}, and some weights have both; "
                    "set one of them to None or to another axis"
                )
        return PartitionSpec(*(None if not cut else cut[0] if len(cut) == 1 else cut for cut in axes))

    def axes(self, logical: str) -> tuple[str, ...]:
        """The mesh axes that a logical one is cut along. That of "attention" is heads as they attend, and as pages hold
        them: what a device has of the weights' heads, cut once more along the sequence's axis. That of "tokens" is the
        rows of all data shards, that of "expert_ffn" an expert's ffn, which is whole where devices share out experts.
        """
        if logical == "expert_ffn":
            return () if self.rules.ffn == self.rules.experts else self.axes("ffn")
        cut = {"attention": ("heads", "sequence"), "tokens": ("data", "sequence")}.get(logical, (logical,))
        return tuple(axis for name in cut if (axis := self.rules.by_axis[name]) is not None)

    def constrain(self, array: jax.Array, *logical: str | None) -> jax.Array:
        """`array` cut so, inside a step whose rows may be cut; where no axis is for them, the partitioner decides."""
        if self.rules.sequence is None:
            return array
        mesh: Any = self.mesh if self.rules.data is None else jax.sharding.get_abstract_mesh()
        constrained: jax.Array = jax.lax.with_sharding_constraint(array, NamedSharding(mesh, self.partition(*logical)))
        return constrained

    def sharding(self, *logical: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes; of none: a copy on every device."""
        return NamedSharding(self.mesh, self.partition(*logical))

    def fit(self, spec: Decoder) -> Decoder:
        """The spec of what the devices compute: `spec` with as many heads as they can share equally.

        Raises ConfigError where ffn, vocabulary or heads with a common norm cannot be shared, or there are more stages
        than layers.
        """
        make_stages(len(spec.blocks), self.num_shards("layers"))
        fitted = fit_heads(spec, self.num_shards("attention"))
        for a, fit in zip((b.mixer for b in spec.blocks), (b.mixer for b in fitted.blocks), strict=True):
            if isinstance(a, Attention) and a.norm_all_heads and fit != a:
                raise ConfigError(
                    f"{a.heads} query and {a.kv_heads} kv heads, which have one norm together, cannot be shared "
                    f"equally by {self.num_shards('attention')} devices; take a number of devices that divides both"
                )
        if spec.quantization is not None and spec.quantization.group_size and not self._is_one_device_of_a_plan:
            raise ConfigError("int4 weights do not work on a mesh yet; use int8 or fp8, or leave the mesh out")
        for path, leaf in flatten(param_specs(fitted)):
            self.partition(*leaf.axes)
            for size, logical in zip(leaf.shape, leaf.axes, strict=True):
                if logical is not None and size % self.num_shards(logical):
                    raise ConfigError(self._indivisible(path, logical, size))
        return fitted

    @property
    def _is_one_device_of_a_plan(self) -> bool:
        return isinstance(self.mesh, AbstractMesh) and self.mesh.size == 1

    def on_one(self, fitted: Decoder) -> Decoder:
        """The spec with no more than the heads that one device attends with, whose pages it holds."""
        return fit_share(fitted, self.num_shards("attention"))

    def place(self, params: Params, spec: Decoder) -> Params:
        """`params` of `spec`, or of what it is fitted to, each leaf where it belongs; those that lie there stay.

        Leaves may be shapes, which stay shapes.
        """
        want = dict(flatten(param_specs(self.fit(spec))))
        given = dict(flatten(params))

        def put(path: str, leaf: ParamSpec) -> Any:
            array: Any = given[path]
            if isinstance(array, jax.ShapeDtypeStruct):
                sharding = self.of_leaf(path, spec).sharding(*leaf.axes)
                return jax.ShapeDtypeStruct(want[path].shape, array.dtype, sharding=sharding)
            if np.shape(array) != want[path].shape:
                array = fit_leaf(array, path, spec, self.num_shards("attention"))
            return _put(array, self.of_leaf(path, spec).sharding(*leaf.axes))

        return map_specs(put, spec)

    def put_for(self, spec: Decoder) -> Callable[[str, ParamSpec, ReadPart], jax.Array]:
        """put(path, leaf, read): places a leaf of a checkpoint, on each device its part and no more.

        Of each leaf this process reads what its own devices hold, once. Raises ConfigError, before any leaf is read,
        where the devices cannot share the model.
        """
        want = dict(flatten(param_specs(self.fit(spec))))

        def put(path: str, leaf: ParamSpec, read: ReadPart) -> jax.Array:
            shape, sharding = want[path].shape, self.of_leaf(path, spec).sharding(*leaf.axes)
            axes = fitted_axes(path, spec, self.num_shards("attention"))
            here = [cuts or () for cuts in sharding.addressable_devices_indices_map(shape).values()]
            needed = []
            for index, axis in enumerate(axes):
                elements = np.unique(np.concatenate([axis[:0], *(axis[cut[index]] for cut in here)]))
                needed.append(elements[elements >= 0])
            held = read(*needed)
            if not sharding.addressable_devices:  # it lies in another process, on another stage's devices
                return array_of({}, shape, held.dtype, sharding)
            part = partial(_part, held, needed, axes)
            return jax.make_array_from_callback(shape, sharding, lambda cut: part(cut or ()), dtype=held.dtype)

        return put

    def cache_partition(self, pools: Any) -> Any:
        """How every leaf of one data shard's pools is cut."""
        return jax.tree.map(lambda leaf: self.partition(None, *_pool_axes(leaf)), pools)

    def cache_shardings(self, pools: Sequence[Any]) -> tuple[Any, ...]:
        """Where the leaves of all shards' pools lie, one pool for each layer, whose pages are end to end."""
        stages = zip(make_stages(len(pools), self.num_shards("layers")), self.stages, strict=True)
        where = [placement for stage, placement in stages for _ in range(stage.begin, stage.end)]

        def of(leaf: Any, placement: Placement) -> NamedSharding:
            return placement.sharding("data", *_pool_axes(leaf))

        return tuple(jax.tree.map(partial(of, placement=p), pool) for p, pool in zip(where, pools, strict=True))

    def over_data(self, function: Callable[..., Any], whole: Collection[int] = ()) -> Callable[..., Any]:
        """`function` of one data shard's arrays as one of all shards', end to end along each array's first axis.

        Arguments `whole` are the same for all. Inside, the other mesh axes are the partitioner's.
        """
        if (axis := self.rules.data) is None:
            return function

        def on_shards(*args: Any) -> Any:
            own = PartitionSpec(axis)
            in_specs = tuple(PartitionSpec() if index in whole else own for index in range(len(args)))
            split: Any = jax.shard_map(
                function, mesh=self.mesh, in_specs=in_specs, out_specs=own, axis_names={axis}, check_vma=False
            )
            return split(*args)

        return on_shards

    def on_each(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` as each device computes it on its own parts, inside `over_data` where data is cut."""
        axes = set(self.mesh.axis_names) - {self.rules.data}
        if not axes:
            return function
        mesh: Any = self.mesh if self.rules.data is None else jax.sharding.get_abstract_mesh()
        mapped: Any = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=axes,
            check_vma=False,  # a kernel's outputs do not say along which axes they vary
        )
        return mapped  # type: ignore[no-any-return]

    def _indivisible(self, path: str, logical: str, size: int) -> str:
        count, logical = self.num_shards(logical), logical.removeprefix("expert_")
        axis = self.rules.by_axis[logical]
        below = next(n for n in range(count, 0, -1) if size % n == 0)
        above = next((n for n in range(count, size + 1) if size % n == 0), None)
        would_do = f"{below} or {above}" if above else f"{below}"
        return (
            f"{logical} is {size:,} ({path}), which the {count} devices of mesh axis {axis!r} cannot share "
            f"equally; take {would_do} devices, or keep it whole with ShardingRules({logical}=None)"
        )


def _pool_axes(leaf: Any) -> tuple[str | None, ...]:
    """Of a pool's pages or scales, behind the pages' axis. Latents, which have one side, are whole on every device."""
    return (None, None, "attention" if leaf.shape[2] == 2 else None, None)[: leaf.ndim - 1]


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    is_local = not isinstance(array, jax.Array) or array.is_fully_addressable
    if is_local and not sharding.is_fully_addressable:  # all processes have it, and each puts its own part
        host = np.asarray(array)
        if not sharding.addressable_devices:
            return array_of({}, host.shape, host.dtype, sharding)
        return jax.make_array_from_callback(host.shape, sharding, lambda cut: host[cut])
    placed: jax.Array = jax.device_put(array, sharding)
    return placed


def _part(
    held: np.ndarray, needed: Sequence[np.ndarray], axes: Sequence[np.ndarray], cut: Sequence[slice]
) -> np.ndarray:
    """One device's part of a fitted leaf, of what was read of the leaf: its elements `needed` along each axis."""
    wanted = [axis[piece] for axis, piece in zip(axes, cut, strict=True)]
    real = [np.flatnonzero(axis >= 0) for axis in wanted]
    index = [np.searchsorted(known, axis[at]) for known, axis, at in zip(needed, wanted, real, strict=True)]
    part = np.zeros([len(axis) for axis in wanted], held.dtype)
    part[np.ix_(*real)] = held[np.ix_(*index)]
    return part


def parallel(
    tensor: int = 1, data: int = 1, sequence: int = 1, layers: int = 1, *, rules: ShardingRules | None = None
) -> Placement:
    """A mesh of the first `layers` x `data` x `sequence` x `tensor` devices. ConfigError where there are fewer."""
    devices = jax.devices()
    if not 1 <= (needed := layers * data * sequence * tensor) <= len(devices):
        sizes = {"tensor_parallel_size": tensor, "data_parallel_size": data, "prefill_context_parallel_size": sequence}
        sizes["pipeline_parallel_size"] = layers
        (name, size), *others = [(name, size) for name, size in sizes.items() if size > 1]
        asked = f"{name} is {size}" + "".join(f" and {other} {n}" for other, n in others)
        asked += f", {needed} devices together," if others else ""
        raise ConfigError(
            f"{asked} but JAX sees {len(devices)} {devices[0].platform} device(s); "
            f"lower it to at most {max(1, len(devices) * size // needed)}"
            + "".join(f", or {other}" for other, _ in others)
        )
    rules, axes = mesh_axes(tensor, data, sequence, layers, rules)
    return Placement(Mesh(np.asarray(devices[:needed]).reshape(tuple(axes.values())), tuple(axes)), rules)


def mesh_axes(
    tensor: int, data: int, sequence: int, layers: int, rules: ShardingRules | None = None
) -> tuple[ShardingRules, dict[str, int]]:
    """The axes of a mesh for these sizes, outermost first, and the rules, which name an axis for all that is cut."""
    rules = rules or ShardingRules()
    for logical, size, axis in (
        ("layers", layers, "stage"),
        ("data", data, "data"),
        ("sequence", sequence, "sequence"),
    ):
        if size > 1 and getattr(rules, logical) is None:
            rules = replace(rules, **{logical: axis})
    return rules, {
        rules.layers or "stage": layers,  # outermost: its links may be the slowest
        rules.data or "data": data,
        rules.sequence or "sequence": sequence,
        rules.heads or "model": tensor,
    }
