"""Which of our leaves hold the numbers of which HF tensors, written once and used both ways.

A family gives a table of names (`"layers.{i}.mixer.q": "model.layers.{i}.self_attn.q_proj"`); `rules_for` expands it
over the leaves that a spec needs. A `Rule` reads its tensors once, also where one tensor holds several leaves, and
undoes itself: one table loads a checkpoint, writes one and says what shape every HF tensor must have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxpaged.convert.stored_tensor import StoredTensor
from jaxpaged.model.params import flatten, param_specs
from jaxpaged.model.spec import Decoder

Array = NDArray[Any]
Transform = Callable[[Sequence[Array]], Sequence[Array]]


class Part(NamedTuple):
    """A leaf as a part of one tensor: turned where that is a matrix stored [out, in], then some columns, in order."""

    turned: bool = False
    columns: slice | NDArray[np.int64] = slice(None)

    def of(self, tensor: Any) -> Any:
        """The leaf, of arrays of numpy or JAX; a view where it can be."""
        return _turned(tensor, self.turned)[..., self.columns]

    def read(self, tensor: StoredTensor, index: Sequence[NDArray[np.int64]]) -> Array:
        """The leaf's elements at `index`, an index for each axis, and nothing else of the tensor."""
        width = tensor.shape[0] if self.turned else tensor.shape[-1]
        found = (*index[:-1], np.arange(width)[self.columns][index[-1]])
        return tensor.read_part(*found[::-1]).T if self.turned else tensor.read_part(*found)


class HeadPart(NamedTuple):
    """A leaf [H, rows, columns] as some rows of every head of a tensor [H * rows of a head, columns]; then turned."""

    heads: int
    rows: slice
    turned: bool

    def of(self, tensor: Any) -> Any:
        """The leaf, of arrays of numpy or JAX; a view where it can be."""
        leaf = tensor.reshape(self.heads, -1, tensor.shape[-1])[:, self.rows]
        return leaf.swapaxes(1, 2) if self.turned else leaf

    def read(self, tensor: StoredTensor, index: Sequence[NDArray[np.int64]]) -> Array:
        """The leaf's elements at `index`, an index for each axis, and nothing else of the tensor."""
        heads, rows, columns = (index[0], *index[:0:-1]) if self.turned else index
        each = tensor.shape[0] // self.heads
        found = heads[:, None] * each + np.arange(each)[self.rows][rows][None]
        part = tensor.read_part(found.ravel(), columns).reshape(len(heads), len(rows), len(columns))
        return part.swapaxes(1, 2) if self.turned else part


@dataclass(frozen=True)
class Rule:
    """The leaves `paths` and the HF tensors `sources` hold the same numbers.

    `load` makes the leaves' arrays from the tensors' (views where it can), `store` the tensors' from the leaves'. Both
    use shapes and array methods only: any dtype will do, and arrays of JAX stay where they are. `parts` say the same as
    `load` where each leaf is a part of the one tensor, so that parts of leaves can be read; without them it is read
    whole. With `stacks` the one part is of every source, one after another along the leaf's first axis.
    """

    paths: tuple[str, ...]
    sources: tuple[str, ...]
    load: Transform
    store: Transform
    parts: tuple[Part | HeadPart, ...] | None = None
    stacks: bool = False


class Module(NamedTuple):
    """An HF module as a table's right side; its plain name will do for a torch Linear, an embedding or a norm.

    Where it fuses several of our linears, its output axis holds all columns of the first, then those of the second;
    or, where `num_heads` is given, the first head of each, then the second head of each. `in_out` says that its weight
    is [in, out] (GPT-2's Conv1D) rather than torch's [out, in].
    """

    name: str
    num_heads: int | None = None
    in_out: bool = False


Table = Mapping[str | tuple[str, ...], str | Module]
"""Our module, or the modules that one HF module fuses -> HF module. `{i}` stands for every layer's number, and `{e}` on
the right for every expert's: our leaf holds them along its first axis."""


def each_layer(prefix: str, modules: Table) -> dict[str | tuple[str, ...], str | Module]:
    """Entries for every layer: keys are our modules within a layer, `prefix` (with `{i}`) stands before HF's names."""

    def ours(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"layers.{{i}}.{names}" if isinstance(names, str) else tuple(f"layers.{{i}}.{name}" for name in names)

    def theirs(module: str | Module) -> str | Module:
        return prefix + module if isinstance(module, str) else module._replace(name=prefix + module.name)

    return {ours(names): theirs(module) for names, module in modules.items()}


def rules_for(spec: Decoder, table: Table, more: Sequence[Rule] = ()) -> list[Rule]:
    """The rules for every leaf of `spec`, `weight` being our `w`, `bias` our `b`. Entries for absent leaves drop out.
    `more` are rules that no table can tell.

    Raises ValueError where the table says nothing about a leaf.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(param_specs(spec))}
    modules = _expand(table, len(spec.blocks))
    rules = [*(rule for names, module in modules for rule in _module_rules(names, module, shapes)), *more]
    if uncovered := shapes.keys() - {path for rule in rules for path in rule.paths}:
        raise ValueError(
            f"the family's table does not say where these leaves come from: {', '.join(sorted(uncovered))}"
        )
    return rules


def load_leaves(rules: Iterable[Rule], read: Callable[[str], Array]) -> Iterator[tuple[str, Array]]:
    """(path, array) of every leaf, each HF tensor read once, when its turn comes; arrays may be views of it."""
    for rule in rules:
        yield from zip(rule.paths, rule.load([read(name) for name in rule.sources]), strict=True)


def store_tensors(rules: Iterable[Rule], leaf: Callable[[str], Array]) -> Iterator[tuple[str, Array]]:
    """(HF name, array) of every tensor, rebuilt from the leaves that `leaf(path)` gives."""
    for rule in rules:
        yield from zip(rule.sources, rule.store([leaf(path) for path in rule.paths]), strict=True)


def hf_shapes(rules: Iterable[Rule], spec: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape that every HF tensor must have for `spec`."""
    shapes = {path: leaf.shape for path, leaf in flatten(param_specs(spec))}
    # Elements of zero bytes: the real transforms run on arrays that have shapes and no memory.
    tensors = store_tensors(rules, lambda path: np.empty(shapes[path], "V0"))
    return {name: tensor.shape for name, tensor in tensors}


def copy(path: str, source: str) -> Rule:
    """The leaf is the tensor."""
    return _in_parts((path,), source, [Part()], store=list)


def transpose(path: str, source: str) -> Rule:
    """A linear's weight: HF's [out, in] is our [in, out]."""
    return _in_parts((path,), source, [Part(turned=True)], store=lambda xs: [xs[0].T])


def concatenated(paths: Sequence[str], source: str, sizes: Sequence[int], *, transposed: bool) -> Rule:
    """One tensor whose output axis is that of all `paths` in turn, `sizes` columns each (Phi-3's qkv_proj)."""
    ends = np.cumsum(sizes).tolist()

    def store(leaves: Sequence[Array]) -> Sequence[Array]:
        return [_turned(_namespace(leaves).concatenate(leaves, axis=-1), transposed)]

    columns = (slice(end - size, end) for end, size in zip(ends, sizes, strict=True))
    return _in_parts(paths, source, [Part(transposed, some) for some in columns], store)


def interleaved(paths: Sequence[str], source: str, sizes: Sequence[int], num_heads: int, *, transposed: bool) -> Rule:
    """One tensor whose output axis is [num_heads, len(paths), head_dim] (GPT-NeoX's query_key_value)."""
    columns = np.arange(sum(sizes)).reshape(num_heads, len(paths), -1)

    def store(leaves: Sequence[Array]) -> Sequence[Array]:
        head_dim = leaves[0].shape[-1] // num_heads
        stack = _namespace(leaves).stack
        heads = stack([x.reshape(*x.shape[:-1], num_heads, head_dim) for x in leaves], axis=-2)  # [..., H, parts, D]
        return [_turned(heads.reshape(*heads.shape[:-3], -1), transposed)]

    return _in_parts(paths, source, [Part(transposed, columns[:, j].ravel()) for j in range(len(paths))], store)


def by_head(paths: Sequence[str], source: str, heads: int, sizes: Sequence[int], turned: Sequence[bool]) -> Rule:
    """One linear's [heads * sum(sizes), in] as leaves [heads, size, in], or [heads, in, size] where they are turned."""
    ends = np.cumsum(sizes).tolist()
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    parts = [HeadPart(heads, some, is_turned) for some, is_turned in zip(rows, turned, strict=True)]

    def store(leaves: Sequence[Array]) -> Sequence[Array]:
        back = [leaf.swapaxes(1, 2) if is_turned else leaf for leaf, is_turned in zip(leaves, turned, strict=True)]
        return [_namespace(leaves).concatenate(back, axis=1).reshape(-1, back[0].shape[-1])]

    return _in_parts(paths, source, parts, store)


def stacked(path: str, sources: Sequence[str]) -> Rule:
    """Linears' weights, one after another along the leaf's first axis (the experts of a mixture)."""

    def load(tensors: Sequence[Array]) -> Sequence[Array]:
        return [_namespace(tensors).stack([x.T for x in tensors])]

    return Rule((path,), tuple(sources), load, lambda xs: [x.T for x in xs[0]], (Part(turned=True),), stacks=True)


def _in_parts(paths: Sequence[str], source: str, parts: Sequence[Part | HeadPart], store: Transform) -> Rule:
    def load(tensors: Sequence[Array]) -> Sequence[Array]:
        return [part.of(tensors[0]) for part in parts]

    return Rule(tuple(paths), (source,), load, store, tuple(parts))


def _namespace(arrays: Sequence[Array]) -> Any:
    """numpy, or jax.numpy where the arrays are JAX's and may stay on their device."""
    return arrays[0].__array_namespace__()


def _turned(x: Array, transposed: bool) -> Array:
    return x.T if transposed and x.ndim == 2 else x


def _expand(table: Table, num_layers: int) -> Iterator[tuple[tuple[str, ...], Module]]:
    entries = [((k,) if isinstance(k, str) else k, Module(v) if isinstance(v, str) else v) for k, v in table.items()]
    yield from ((names, module) for names, module in entries if "{i}" not in module.name)
    for i in range(num_layers):
        for names, module in entries:
            if "{i}" in module.name:
                name = module.name.replace("{i}", str(i))
                yield tuple(x.replace("{i}", str(i)) for x in names), module._replace(name=name)


def _module_rules(names: Sequence[str], module: Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
    for ours, theirs in ((".w", ".weight"), (".b", ".bias"), ("", "")):
        paths, source = [name + ours for name in names], module.name + theirs
        if not all(path in shapes for path in paths):
            continue
        if "{e}" in source:
            yield stacked(paths[0], [source.replace("{e}", str(e)) for e in range(shapes[paths[0]][0])])
            continue
        transposed = not module.in_out
        sizes = [shapes[path][-1] for path in paths]
        if module.num_heads is not None:
            yield interleaved(paths, source, sizes, module.num_heads, transposed=transposed)
        elif len(paths) > 1:
            yield concatenated(paths, source, sizes, transposed=transposed)
        elif transposed and len(shapes[paths[0]]) == 2 and names[0] not in ("embed", "positions"):
            yield transpose(paths[0], source)
        else:
            yield copy(paths[0], source)
