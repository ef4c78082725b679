"""Orbax checkpoints: params under their own names beside the spec, and those that other trainers wrote.

    orbax.save("run/final", spec, params)                  arrays that lie on one device, or on any mesh
    llm = LLM("run/final", tensor_parallel_size=4)         each process reads its devices' slices, onto any other

A checkpoint is a tree that Orbax saved: in the folder named, or in `params` or `default` there, where a
`CheckpointManager` puts it. `spec.json` lies beside it or up to two folders above, so that a run has one for all its
steps. Of a tree that holds more, such as an optimizer's state, the weights alone are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxpaged.convert.checkpoint import SPEC, orbax_spec, orbax_tree
from jaxpaged.convert.load import resolve_dtype
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.integrations import trees
from jaxpaged.model.params import Params, check_params, flatten, map_specs, param_specs
from jaxpaged.model.sharding import Placement
from jaxpaged.model.spec import Decoder, from_json, to_json
from jaxpaged.model.stages import array_of

_TREE = "params"
_SMALLEST_CHUNK, _LARGEST_CHUNK = 1 << 20, 16 << 20
"""Bytes of a leaf that `save` stores together: a 64th of it, within these. Only whole chunks can be read, and what one
device holds Orbax itself makes one chunk, of which every process would read all."""


def save(path: str | Path, spec: Decoder, params: Params) -> None:
    """Write a new folder with `spec` and `params`; in a program of several processes all call this.

    Raises CheckpointError where there is something already, or where `params` are not the spec's own.
    """
    folder = Path(path).expanduser().absolute()
    if problems := check_params(spec, params):
        more = f" and {len(problems) - 1:,} more" if problems[1:] else ""
        raise CheckpointError(f"the params do not fit the spec: {problems[0]}{more}; give those of the trainer")
    if _anywhere(folder.exists()):
        raise CheckpointError(f"{folder} exists; choose another place, or remove it")
    tree = dict(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _TREE, tree, save_args=jax.tree.map(_in_chunks, tree))
    write_spec(folder, spec)


def write_spec(path: str | Path, spec: Decoder) -> None:
    """Say in a run's folder what model its checkpoints are of, once for all of them."""
    if jax.process_index() == 0:
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC).write_text(to_json(spec), encoding="utf-8")


def load(path: str | Path, *, dtype: str = "auto", placement: Placement | None = None) -> tuple[Decoder, Params]:
    """A (spec, params) pair, as `LLM` takes it, of what `save` or a trainer's loop wrote under our own names.

    The arrays lie as `placement` says, whatever mesh they were saved from, or on the default device.
    """
    folder = Path(path).expanduser().absolute()
    if (tree := orbax_tree(folder)) is None:
        steps = sorted((p.parent.name for p in folder.glob("*/_CHECKPOINT_METADATA")), key=lambda s: (len(s), s))
        hint = f"name one of its steps, {', '.join(steps)}" if steps else "name a folder that Orbax wrote"
        raise CheckpointError(f"{folder} holds no tree that Orbax saved; {hint}")
    spec = _spec_of(folder)
    shapes = _shapes(tree)
    inside = "params" if "params" in shapes and "embed" not in shapes else None
    return spec, _load(_Saved(tree, shapes, inside), spec, None, dtype, placement)


def load_tree(
    path: str | Path,
    spec: Decoder,
    family: str | None = None,
    *,
    inside: str | None = None,
    dtype: str = "auto",
    placement: Placement | None = None,
) -> Params:
    """The params of `spec` from a tree that any trainer saved, its names as `trees.to_params` reads them.

    `inside` names the part of the checkpoint that holds the weights, where it holds more (an optimizer's state).
    `dtype` and `placement` are `load`'s.
    """
    folder = Path(path).expanduser().absolute()
    shapes = _shapes(folder)
    if inside is not None and inside not in shapes:
        raise CheckpointError(f"{folder} holds {', '.join(sorted(shapes))}, and no {inside}; name one of them")
    return _load(_Saved(folder, shapes, inside), spec, family, dtype, placement)


class _Saved(NamedTuple):
    """A tree that Orbax saved, in shapes, and which part of it the weights are."""

    folder: Path
    tree: Any
    inside: str | None

    @property
    def weights(self) -> Any:
        return self.tree if self.inside is None else self.tree[self.inside]

    def restore(self, target: Any) -> Any:
        """The arrays of which `target`, shaped as the weights, gives shapes and places; nothing else is read.

        `PLACEHOLDER` stands for those that lie in other processes alone, on another stage's devices.
        """
        # What is being read at once has a bound, which holds at least the largest leaf: it may be stored in one piece.
        largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.tree))
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=2 + largest // 10**9)
        item = jax.tree.map(lambda leaf: leaf if leaf.sharding.addressable_devices else ocp.PLACEHOLDER, target)
        item = item if self.inside is None else {self.inside: item}
        in_part = not any(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(item))
        if not in_part:  # then all that is not read must be said
            item = jax.tree.map(lambda _: ocp.PLACEHOLDER, self.tree) | item
        args = jax.tree.map(_restore_args, item)
        with _told(self.folder), ocp.Checkpointer(handler) as checkpointer:
            asked = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=in_part)
            found = checkpointer.restore(self.folder, args=asked)
        return found if self.inside is None else found[self.inside]


def _load(saved: _Saved, spec: Decoder, family: str | None, dtype: str, placement: Placement | None) -> Params:
    kind = _dtype(saved.folder, saved.weights, dtype)
    own = {} if family else {path: leaf.dtype for path, leaf in flatten(param_specs(spec)) if leaf.dtype}
    leaves, structure = jax.tree.flatten(saved.weights)
    named = zip(trees.names(saved.weights), leaves, strict=True)
    shapes = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(x.shape, own.get(name, kind)) for name, x in named])
    try:
        params = jax.eval_shape(lambda tree: trees.to_params(tree, spec, family), shapes)
    except ConfigError as error:
        raise CheckpointError(f"{saved.folder}: {error}") from error
    if placement is None:
        default = jnp.empty(0).sharding
        return trees.to_params(saved.restore(jax.tree.map(lambda leaf: _at(leaf, default), shapes)), spec, family)
    if family is None:
        return placement.place(_restore_ours(saved, shapes, dict(flatten(placement.place(params, spec))), spec), spec)
    if placement.num_shards("layers") > 1 and jax.process_count() > 1:
        raise CheckpointError(f"{saved.folder}: stages of several processes cannot be given a family's tree; save ours")
    mesh = placement.mesh
    spread = jax.tree.map(lambda leaf: _at(leaf, _spread(leaf.shape, mesh, mesh.axis_names)), shapes)
    return placement.place(trees.to_params(saved.restore(spread), spec, family), spec)


def _restore_ours(saved: _Saved, shapes: Any, wanted: Mapping[str, Any], spec: Decoder) -> Params:
    """The weights, under our own names, where `wanted` has them, or near by where heads must be made to fit."""
    leaves, structure = jax.tree.flatten(shapes)
    names = trees.names(shapes)
    target = [_at(leaf, _place_of(leaf, wanted[name])) for name, leaf in zip(names, leaves, strict=True)]
    found = dict(zip(names, jax.tree.leaves(saved.restore(jax.tree.unflatten(structure, target))), strict=True))
    for name, leaf in wanted.items():
        if found[name] is ocp.PLACEHOLDER:
            found[name] = array_of({}, leaf.shape, leaf.dtype, leaf.sharding)
    return map_specs(lambda path, _: found[path], spec)


def _at(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _in_chunks(leaf: Any) -> Any:
    return ocp.SaveArgs(chunk_byte_size=min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, leaf.nbytes // 64)))


def _place_of(stored: Any, wanted: Any) -> Sharding:
    """Where to read a leaf to: where it is wanted or, if heads must be made to fit first, cut as finely along another
    axis, so that all that moves afterwards moves over the devices' links.
    """
    sharding: NamedSharding = wanted.sharding
    if stored.shape == wanted.shape:
        return sharding
    axes = [axis for cut in sharding.spec for axis in (cut if isinstance(cut, tuple) else (cut,))]
    fitted = [a != b for a, b in zip(stored.shape, wanted.shape, strict=True)]
    return _spread(stored.shape, sharding.mesh, [axis for axis in axes if axis is not None], fitted)


def _spread(shape: Sequence[int], mesh: Any, axes: Sequence[str], but: Sequence[bool] = ()) -> NamedSharding:
    """Where an array lies cut over mesh axes: along its first axis that they divide, one of `but` last; else whole."""
    count = math.prod(mesh.shape[axis] for axis in axes)
    dims = sorted(range(len(shape)), key=lambda dim: bool(but) and but[dim])
    found = next((dim for dim in dims if shape[dim] % count == 0), None)
    cut = [tuple(axes) if dim == found else None for dim in range(len(shape))]
    return NamedSharding(mesh, PartitionSpec(*cut))


def _spec_of(folder: Path) -> Decoder:
    if (file := orbax_spec(folder)) is None:
        raise CheckpointError(
            f"neither {folder} nor two folders above it hold {SPEC}, which says what the weights compute; "
            "write it with jaxpaged.integrations.orbax.write_spec"
        )
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} does not describe a model ({error}); write it again") from error


def _shapes(folder: Path) -> Any:
    """The tree that lies there, of shapes: whatever was saved as no array has none of its own."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(getattr(leaf, "shape", ()), getattr(leaf, "dtype", None) or np.dtype(np.float32))

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name one that Orbax wrote")
    with _told(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return jax.tree.map(shape, checkpointer.metadata(folder).item_metadata.tree)


def _restore_args(leaf: Any) -> Any:
    if leaf is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding)


def _dtype(folder: Path, shapes: Any, name: str) -> np.dtype[Any]:
    """What to read the weights as: "auto" is the dtype of most bytes."""
    sizes: dict[np.dtype[Any], int] = {}
    for leaf_name, leaf in zip(trees.names(shapes), jax.tree.leaves(shapes), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise CheckpointError(f"{folder}: {leaf_name} holds {leaf.dtype}, needs floats")
        sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.size * leaf.dtype.itemsize
    return resolve_dtype(name, max(sizes, key=lambda dtype: sizes[dtype], default=None))


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What Orbax says of a checkpoint that it cannot read, as one line of ours."""
    try:
        yield
    except Exception as error:  # its own, tensorstore's and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"Orbax cannot read {folder} ({reason}); save it again") from error


def _anywhere(here: bool) -> bool:
    """Whether it is so in any process."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(here)).any())
