"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x w + (x a) b, for one adapter or many in one step.

An adapter names linears of the params by their path. A stack of adapters is one adapter whose ranks stand side by side,
and a row sees the columns of its own: two dense products for all of them, whatever the rows have chosen.

    x [T, M]   a [M, 3 r]   x a   row 0 has adapter 1    0 0 | . . | 0 0        b [3 r, F]
                                  row 1 has adapter 2    0 0 | 0 0 | . .
                                  row 2 has none         0 0 | 0 0 | 0 0

What a row does not see is added as zeros, so that its numbers do not depend on what the others chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpaged.model.params import Params, ParamSpec, in_floats, param_specs
from jaxpaged.model.spec import Attention, Decoder

_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class Factors(NamedTuple):
    """What is added to one linear's [M, F] weight: a [M, r] times b [r, F]."""

    a: Any
    b: Any


Adapter = Mapping[str, Factors]
"""{"layers.0.mixer.q": Factors(a, b), ...}: of the linears that `adaptable` names, any."""


class LowRank(NamedTuple):
    """A linear's leaf "lora": its factors, and which of their columns each row sees (None: all)."""

    a: Float[Array, "M R"]
    b: Float[Array, "R F"]
    seen: Bool[Array, "T R"] | None


def adaptable(spec: Decoder) -> dict[str, ParamSpec]:
    """The linears that can have adapters, each with its weight: those of attention and of every dense Mlp."""
    return dict(_linears(param_specs(in_floats(spec))["layers"], spec))


def _linears(layers: Any, spec: Decoder) -> Iterator[tuple[str, ParamSpec]]:
    for index, (layer, block) in enumerate(zip(layers, spec.blocks, strict=True)):
        places = {"ffn": layer["ffn"], "ffn.shared": layer["ffn"].get("shared", {})}
        if isinstance(block.mixer, Attention):
            places["mixer"] = layer["mixer"]
        for place, modules in places.items():
            found = {name: modules[name]["w"] for name in _LINEARS if name in modules}
            yield from ((f"layers.{index}.{place}.{name}", leaf) for name, leaf in found.items())


def init_adapter(spec: Decoder, rank: int, key: Array, paths: Any = None, dtype: Any = jnp.float32) -> Adapter:
    """An adapter to train, of these linears (None: all): `a` normal, `b` zeros, so that it changes nothing yet."""
    shapes = {path: leaf.shape for path, leaf in adaptable(spec).items()}
    chosen = list(shapes) if paths is None else list(paths)
    return {
        path: Factors(
            jax.random.normal(own, (shapes[path][0], rank), dtype) * np.asarray(shapes[path][0] ** -0.5, dtype),
            jnp.zeros((rank, shapes[path][1]), dtype),
        )
        for path, own in zip(chosen, jax.random.split(key, len(chosen)), strict=True)
    }


def with_adapter(params: Params, adapter: Adapter, seen: Bool[Array, "T R"] | None = None) -> Params:
    """`params` whose linears compute with the adapter: for `spec.apply` and `functional.step`; differentiable in both.

    `seen` says which columns of a stack each row sees. Raises ValueError for a path that is no linear of `params`.
    """
    found: set[str] = set()

    def adapted(node: Any, path: str) -> Any:
        if path in adapter and "w" in node:
            found.add(path)
            return {**node, "lora": LowRank(*adapter[path], seen)}
        if not isinstance(node, Mapping):
            return node
        return {name: adapted(child, f"{path}.{name}") for name, child in node.items()}

    layers = tuple(adapted(layer, f"layers.{index}") for index, layer in enumerate(params["layers"]))
    if unknown := sorted(adapter.keys() - found):
        raise ValueError(f"the adapter has factors for {unknown[0]}, which is no linear of these params")
    return {**params, "layers": layers}


def stack_shapes(spec: Decoder, max_loras: int, max_rank: int) -> Adapter:
    """What a stack for so many adapters is: a `ParamSpec` for each linear's `a` and `b`."""
    total = max_loras * max_rank

    def shapes(leaf: ParamSpec) -> Factors:
        (rows, columns), (row_axis, column_axis) = leaf.shape, leaf.axes
        return Factors(ParamSpec((rows, total), (row_axis, None)), ParamSpec((total, columns), (None, column_axis)))

    return {path: shapes(leaf) for path, leaf in adaptable(spec).items()}


def columns_of(slots: Int[Array, " T"], max_loras: int, max_rank: int) -> Bool[Array, "T R"]:
    """Which columns of a stack a row sees that has the adapter in this slot; -1: none."""
    return jnp.arange(max_loras * max_rank, dtype=jnp.int32)[None] // max_rank == slots[:, None]


def put_in_slot(stack: Adapter, slot: Int[Array, " 1"], adapter: Adapter) -> Adapter:
    """The stack with another adapter, which has all the stack's paths, in a slot. Donate the stack."""

    def put(old: Factors, new: Factors) -> Factors:
        first = slot[0] * new.a.shape[1]
        a = lax.dynamic_update_slice_in_dim(old.a, new.a, first, 1)
        return Factors(a, lax.dynamic_update_slice_in_dim(old.b, new.b, first, 0))

    return {path: put(factors, adapter[path]) for path, factors in stack.items()}
