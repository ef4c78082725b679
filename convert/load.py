"""A checkpoint as params: spec from its family, every tensor checked by name and shape, then read one after another.

Host memory holds one leaf at a time beside what has been placed already. `put` decides where a leaf goes, and reads
what is wanted of it: a process of several reads what lies on its devices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jaxpaged.convert.checkpoint import (
    SPEC,
    Checkpoint,
    Format,
    locate,
    open_checkpoint,
    orbax_spec,
    orbax_tree,
    read_config,
)
from jaxpaged.convert.families import Family, family_of
from jaxpaged.convert.quantizing import QuantizingReader
from jaxpaged.convert.rules import HeadPart, Part, Rule, copy, hf_shapes, load_leaves
from jaxpaged.convert.stored_tensor import BYTES_READ, Array, StoredTensor, is_all
from jaxpaged.errors import CheckpointError
from jaxpaged.model.params import Params, ParamSpec, ReadPart, flatten, map_specs, param_specs, quantized_as
from jaxpaged.model.spec import Decoder, WeightDtype, from_json

log = logging.getLogger("jaxpaged")

Put = Callable[[str, ParamSpec, ReadPart], jax.Array]
"""put(path, param_spec, read) places one leaf; `read(*index)` reads its elements along each axis."""

PutFor = Callable[[Decoder], Put]
"""The `put` for a model whose spec has been read."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class LoadedModel(NamedTuple):
    """A model in memory; `config` is the HF config it came with, `bytes_read` what this process read of its tensors."""

    spec: Decoder
    params: Params
    config: dict[str, Any]
    path: Path
    format: Format
    bytes_read: int = 0


class Described(NamedTuple):
    """What a model is; `dtype` is what its weights are stored as, None where that is quantised or unknown."""

    spec: Decoder
    dtype: np.dtype[Any] | None


class Recipe(NamedTuple):
    """How to make a model's leaves from a checkpoint's tensors; the two have been found to fit.

    `unread` are the tensors that hold no weights: buffers, the copy of a tied head, a vision tower. `stored` is
    the spec of what the rules give: floats, where `spec` may be quantised.
    """

    spec: Decoder
    rules: Sequence[Rule]
    stored: Decoder
    unread: frozenset[str] = frozenset()


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    quantization: WeightDtype | None = None,
    put_for: PutFor | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder, a native folder, a GGUF file or a hub id.

    `put_for(spec)` gives the function that places the leaves; left out, they go to the default device.
    `dtype` is a name in `DTYPES` or "auto": the checkpoint's; for quantised GGUF float32 on CPU, else bfloat16; and on
    CPU for other people's float16, which XLA multiplies there at a tenth of the speed, float32. With a `quantization`
    weights are quantised as they are read. Raises CheckpointError before any weight is read where the tensors do not
    fit the config, ConfigError where they cannot be quantised so.
    """
    checkpoint = open_checkpoint(path)
    recipe = recipe_for(checkpoint, quantization)
    shapes = dict(flatten(param_specs(recipe.spec)))
    place = put_for(recipe.spec) if put_for else _on_default_device
    placed: dict[str, jax.Array] = {}
    before = BYTES_READ.total
    for name, read in readers(checkpoint, recipe, _dtype_here(dtype, checkpoint)):
        # Waiting lets go of the host's copy before the next tensor is read.
        placed[name] = jax.block_until_ready(place(name, shapes[name], read))
    params = map_specs(lambda name, leaf: placed[name], recipe.spec)
    done = BYTES_READ.total - before
    log.info("read %s of the %s bytes of %s", f"{done:,}", f"{checkpoint.nbytes:,}", checkpoint.path)
    return LoadedModel(recipe.spec, params, checkpoint.config, checkpoint.path, checkpoint.format, done)


def whole(leaf: ParamSpec, read: ReadPart) -> Array:
    """All of a leaf."""
    return read(*map(np.arange, leaf.shape))


def _on_default_device(path: str, leaf: ParamSpec, read: ReadPart) -> jax.Array:
    placed: jax.Array = jax.device_put(whole(leaf, read))  # jnp.asarray would copy once more
    return placed


def describe(path: str | Path) -> Described:
    """What a checkpoint is, by its config and headers: no weight is read, and a Hugging Face folder need not have any.

    Raises CheckpointError where it is none that we can serve.
    """
    found = locate(path, with_weights=False)
    if found.is_file() or any(found.glob("*.safetensors")):
        checkpoint = open_checkpoint(found)
        return Described(recipe_for(checkpoint).spec, checkpoint.dtype)
    spec_file = orbax_spec(found) if orbax_tree(found) is not None else found / SPEC
    if spec_file is not None and spec_file.is_file():
        return Described(_native_spec(spec_file), None)
    config = read_config(found)
    _, spec = _family_and_spec(config, found)
    return Described(spec, DTYPES.get(str(config.get("dtype", config.get("torch_dtype")))))


def leaves(checkpoint: Checkpoint, recipe: Recipe, dtype: np.dtype[Any]) -> Iterator[tuple[str, Array]]:
    """(path, array) of every leaf, floats cast to `dtype`, in the order of the recipe's rules."""
    specs = dict(flatten(param_specs(recipe.spec)))
    loaded = ((path, _of_whole(leaf)) for path, leaf in load_leaves(recipe.rules, checkpoint.read))
    for path, read in _as_wanted(loaded, recipe, dtype):
        yield path, whole(specs[path], read)


def readers(checkpoint: Checkpoint, recipe: Recipe, dtype: np.dtype[Any]) -> Iterator[tuple[str, ReadPart]]:
    """(path, read) of every leaf, in the order of the recipe's rules; floats that are read are cast to `dtype`.

    What a rule does to several tensors at once needs them whole: then they are, and the log says so.
    """
    return _as_wanted(_stored(checkpoint, recipe), recipe, dtype)


def _as_wanted(
    stored: Iterable[tuple[str, ReadPart]], recipe: Recipe, dtype: np.dtype[Any]
) -> Iterator[tuple[str, ReadPart]]:
    """Leaves as the recipe's spec has them, of those that are stored: quantised where they are not yet."""
    wanted, have = dict(flatten(param_specs(recipe.spec))), dict(flatten(param_specs(recipe.stored)))

    def cast(read: ReadPart, dtype: np.dtype[Any]) -> ReadPart:
        return lambda *index: read(*index).astype(dtype, copy=False)

    for path, read in stored:
        if path in wanted:
            yield path, cast(read, wanted[path].dtype or dtype)
        elif recipe.spec.quantization is not None:
            reader = QuantizingReader(path, have[path], read, recipe.spec.quantization)
            yield f"{path}.values", reader.values
            yield f"{path}.scale", reader.scale


def _of_whole(leaf: Array) -> ReadPart:
    return lambda *index: leaf if all(map(is_all, index, leaf.shape)) else leaf[np.ix_(*index)]


def leaf_dtypes(spec: Decoder, dtype: np.dtype[Any]) -> dict[str, np.dtype[Any]]:
    """What each leaf is stored as: `dtype`, but for those that keep their own; files know no 4 bits, but bytes."""
    own = {path: leaf.dtype or dtype for path, leaf in flatten(param_specs(spec))}
    return {path: np.dtype(np.int8) if its == jnp.int4 else its for path, its in own.items()}


def _stored(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[tuple[str, ReadPart]]:
    """(path, read) of every leaf as it is stored."""

    def of_part(tensor: StoredTensor, part: Part | HeadPart) -> ReadPart:
        return lambda *index: part.read(tensor, index)

    def of_stack(tensors: Sequence[StoredTensor], part: Part | HeadPart) -> ReadPart:
        def read(*index: NDArray[np.int64]) -> Array:
            out = np.empty([len(axis) for axis in index], tensors[0].dtype or np.float32)
            for one, number in zip(out, index[0].tolist(), strict=True):
                one[...] = part.read(tensors[number], index[1:])
            return out

        return read

    for rule in recipe.rules:
        if rule.parts is not None:
            tensors = [checkpoint.tensors[name] for name in rule.sources]
            read = partial(of_stack, tensors) if rule.stacks else partial(of_part, tensors[0])
            yield from zip(rule.paths, map(read, rule.parts), strict=True)
        else:
            log.info("%s cannot be read in parts and is read whole", ", ".join(rule.sources))
            yield from ((path, _of_whole(leaf)) for path, leaf in load_leaves([rule], checkpoint.read))


def recipe_for(checkpoint: Checkpoint, quantization: WeightDtype | None = None) -> Recipe:
    """The spec and rules for a checkpoint. Raises CheckpointError that lists every tensor that does not fit."""
    recipe = _native_recipe(checkpoint) if checkpoint.format == "native" else _family_recipe(checkpoint)
    try:
        problems = _misfits(checkpoint, recipe)
    except ValueError as error:  # numpy's, of a shape with more elements than it can count
        raise CheckpointError(f"{checkpoint.path}: its config asks for impossible shapes ({error})") from error
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: {len(problems)} tensors do not fit the config; fetch both again, from one place:\n  "
            + "\n  ".join(problems)
        )
    spec = quantized_as(recipe.spec, quantization)
    return recipe._replace(spec=spec, rules=_largest_first(recipe.rules, checkpoint))


def resolve_dtype(name: str, stored: np.dtype[Any] | None) -> np.dtype[Any]:
    """The numpy dtype meant by "auto" or by a name; `stored` is a checkpoint's. Raises CheckpointError for a name that
    we do not load as.
    """
    name = {"float": "float32", "half": "float16"}.get(name, name)  # vLLM's other names
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise CheckpointError(f"cannot load weights as {name!r}; choose auto, {', '.join(DTYPES)}")
    if stored is not None and stored in DTYPES.values():
        return stored
    return DTYPES["float32" if jax.default_backend() == "cpu" or stored == np.float64 else "bfloat16"]


def _dtype_here(name: str, checkpoint: Checkpoint) -> np.dtype[Any]:
    """What `load` reads a checkpoint's floats as."""
    found = resolve_dtype(name, checkpoint.dtype)
    is_slow = found == np.float16 and jax.default_backend() == "cpu"
    return DTYPES["float32"] if is_slow and name == "auto" and checkpoint.format != "native" else found


def _native_recipe(checkpoint: Checkpoint) -> Recipe:
    spec = _native_spec(checkpoint.path / SPEC)
    return Recipe(spec, [copy(path, path) for path, _ in flatten(param_specs(spec))], spec)


def _native_spec(file: Path) -> Decoder:
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} does not describe a model ({error}); convert the checkpoint again") from error


def _family_recipe(checkpoint: Checkpoint) -> Recipe:
    family, spec = _family_and_spec(checkpoint.config, checkpoint.path)
    unread = frozenset(name for name in checkpoint.names if family.ignores(name, spec))
    return Recipe(spec, family.rules(spec, checkpoint.names), spec, unread)


def _family_and_spec(config: Mapping[str, Any], path: Path) -> tuple[Family, Decoder]:
    try:
        family = family_of(config)
        return family, family.spec(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ArithmeticError as error:  # of numbers that are finite but absurd
        raise CheckpointError(f"{path}: its config holds an absurd number ({error}); fetch it again") from error


def _largest_first(rules: Sequence[Rule], checkpoint: Checkpoint) -> Sequence[Rule]:
    """What lies in memory twice, as read and as placed, is then small by the time that memory is full."""

    def size(rule: Rule) -> int:
        return sum(math.prod(checkpoint.shape(name)) for name in rule.sources)

    return sorted(rules, key=size, reverse=True)


def _misfits(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """A line for every tensor that is missing, unexpected, of another shape or made of other numbers than it should."""
    want = hf_shapes(recipe.rules, recipe.stored)
    typed = {path: its for path, its in leaf_dtypes(recipe.stored, DTYPES["float32"]).items() if its.itemsize == 1}
    have = {name: tensor for name, tensor in checkpoint.tensors.items() if name in want or name not in recipe.unread}
    lines = [f"missing {name} {list(want[name])}" for name in want if name not in have]
    lines += [f"unexpected {name} {list(have[name].shape)}" for name in have if name not in want]
    for name in (name for name in want if name in have):
        tensor = have[name]
        if tensor.shape != want[name]:
            lines.append(f"{name} has shape {list(tensor.shape)}, needs {list(want[name])}")
        elif name in typed and tensor.dtype != typed[name]:
            lines.append(f"{name} holds {tensor.dtype}, needs {typed[name]}")
        elif name not in typed and tensor.dtype is not None and not jnp.issubdtype(tensor.dtype, jnp.floating):
            lines.append(f"{name} holds {tensor.dtype}, needs floats")
    return lines
