"""The one table of weights: for every leaf of a model's params its shape, logical axes and initialiser.

It drives dummy weights, the memory budget, sharding, quantisation and the converter's last check. Params are a nested
dict (layers a tuple) of arrays; linear weights are [in, out], so that x @ w needs no transpose. Where the spec says so,
those of the blocks' products are `Quantized`, which are two arrays each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.errors import ConfigError
from jaxpaged.model.quantized import STEPS, Quantized, quantize
from jaxpaged.model.spec import (
    Attention,
    Block,
    Decoder,
    LatentAttention,
    Mlp,
    Moe,
    Norm,
    Quantization,
    WeightDtype,
)

Params = Mapping[str, Any]
"""{"embed": {"w": [V, E]}, "layers": ({"norm1", "mixer", "ffn", ...}, ...), "norm", "head", ...}"""


ReadPart = Callable[..., np.ndarray[Any, np.dtype[Any]]]
"""read(*index): a leaf's elements at an index array along each axis, whatever holds it."""


class ParamSpec(NamedTuple):
    """One weight: its shape, the logical axis of each dimension (None: never sharded), how to make it up.

    `dtype` is that of a leaf which keeps its own whatever the others are cast to, `quantizable` says that it may be
    quantised.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    dtype: np.dtype[Any] | None = None
    quantizable: bool = False


def param_specs(spec: Decoder) -> dict[str, Any]:
    """The tree of `ParamSpec` with exactly the leaves that `spec` needs; its paths are the params' paths.

    Raises ConfigError where weights cannot be cut into the groups of the spec's quantisation.
    """
    vocab, dim, embed = spec.vocab_size, spec.dim, spec.embed_dim
    tree: dict[str, Any] = {
        "embed": {"w": ParamSpec((vocab, embed), ("vocab", "embed"))},
        "layers": tuple(_block(b, dim) for b in spec.blocks),
    }
    if spec.learned_positions is not None:
        tree["positions"] = {"w": ParamSpec((spec.max_positions + spec.learned_positions, dim), (None, "embed"))}
    if embed != dim:
        tree["project_in"] = _linear(embed, dim, "embed", "embed", bias=False, quantizable=False)
        tree["project_out"] = _linear(dim, embed, "embed", "embed", bias=False, quantizable=False)
    if spec.norm is not None:
        tree["norm"] = _norm(spec.norm, dim)
    if not spec.tied_head:
        tree["head"] = _linear(embed, vocab, "embed", "vocab", bias=spec.head_bias, quantizable=False)
    if (how := spec.quantization) is None:
        return tree
    quantized: dict[str, Any] = jax.tree.map_with_path(
        lambda keys, leaf: _quantized(leaf, how, _path(keys)) if leaf.quantizable else leaf, tree, is_leaf=is_param_spec
    )
    return quantized


def _block(block: Block, dim: int) -> dict[str, Any]:
    norms = {
        "serial": ("norm1", "norm2"),
        "parallel": ("norm1", "norm2"),
        "parallel_one_norm": ("norm1",),
        "sandwich": ("norm1", "post1", "norm2", "post2"),
        "post": ("norm1", "norm2"),
    }[block.residual]
    tree: dict[str, Any] = {name: _norm(block.norm, dim) for name in norms}
    match block.mixer:
        case Attention() as a:
            mixer = _attention(a, dim)
        case LatentAttention() as a:
            mixer = _latent_attention(a, dim)
    return tree | {"mixer": mixer, "ffn": _ffn(block.ffn, dim)}


def _attention(a: Attention, dim: int) -> dict[str, Any]:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    tree: dict[str, Any] = {
        "q": _linear(dim, q, "embed", "heads", a.qkv_bias),
        "k": _linear(dim, kv, "embed", "kv_heads", a.qkv_bias),
        "v": _linear(dim, kv, "embed", "kv_heads", a.qkv_bias),
        "o": _linear(q, dim, "heads", "embed", a.out_bias),
    }
    if a.qk_norm is not None:
        each = ((q, "heads"), (kv, "kv_heads")) if a.norm_all_heads else ((a.head_dim, None),) * 2
        tree |= {name: _norm(a.qk_norm, *size) for name, size in zip(("q_norm", "k_norm"), each, strict=True)}
    return tree | ({"sinks": ParamSpec((a.heads,), ("heads",), "zeros")} if a.sinks else {})


def _latent_attention(a: LatentAttention, dim: int) -> dict[str, Any]:
    """`k_up` and `v_up` make keys and values of latents. They lie head by head, as both forms multiply them."""
    q_width, q_from = a.heads * a.head_dim, dim if a.q_rank is None else a.q_rank
    tree: dict[str, Any] = {
        "q": _linear(q_from, q_width, "embed" if a.q_rank is None else None, "heads", bias=False),
        "kv_down": _linear(dim, a.row_dim, "embed", None, a.bias),
        "kv_norm": _norm(a.norm, a.kv_rank, None),
        "k_up": {"w": ParamSpec((a.heads, a.nope_dim, a.kv_rank), ("heads", None, None))},
        "v_up": {"w": ParamSpec((a.heads, a.kv_rank, a.v_dim), ("heads", None, None))},
        "o": _linear(a.heads * a.v_dim, dim, "heads", "embed", a.bias),
    }
    if a.q_rank is not None:
        tree |= {"q_down": _linear(dim, a.q_rank, "embed", None, a.bias), "q_norm": _norm(a.norm, a.q_rank, None)}
    return tree


def _ffn(ffn: Mlp | Moe, dim: int) -> dict[str, Any]:
    if isinstance(ffn, Mlp):
        return _mlp(ffn, dim)
    tree: dict[str, Any] = {
        "router": {"w": ParamSpec((dim, ffn.experts), ("embed", None))},
        "experts": expert_specs(ffn, dim),
    }
    if ffn.shared is not None:
        tree["shared"] = _mlp(ffn.shared, dim)
    if ffn.selection_bias:  # float32: experts are told apart by far less than bfloat16 keeps of it
        tree["selection_bias"] = ParamSpec((ffn.experts,), (None,), "zeros", np.dtype(np.float32))
    return tree | ({"shared_gate": {"w": ParamSpec((dim, 1), ("embed", None))}} if ffn.shared_gate else {})


def expert_specs(moe: Moe, dim: int) -> dict[str, Any]:
    """An Mlp's leaves with all experts along a first axis; their columns are cut by a rule of their own."""

    def stacked(leaf: ParamSpec) -> ParamSpec:
        axes = ("expert_ffn" if axis == "ffn" else axis for axis in leaf.axes)
        return leaf._replace(shape=(moe.experts, *leaf.shape), axes=("experts", *axes))

    tree: dict[str, Any] = jax.tree.map(stacked, _mlp(moe.expert, dim), is_leaf=is_param_spec)
    return tree


def _mlp(m: Mlp, dim: int) -> dict[str, Any]:
    tree = {"up": _linear(dim, m.dim, "embed", "ffn", m.bias), "down": _linear(m.dim, dim, "ffn", "embed", m.bias)}
    return tree | ({"gate": _linear(dim, m.dim, "embed", "ffn", m.bias)} if m.gated else {})


def _linear(
    rows: int, cols: int, row_axis: str | None, col_axis: str | None, bias: bool, quantizable: bool = True
) -> dict[str, ParamSpec]:
    tree = {"w": ParamSpec((rows, cols), (row_axis, col_axis), quantizable=quantizable)}
    return tree | ({"b": ParamSpec((cols,), (col_axis,), "zeros")} if bias else {})


def _norm(norm: Norm, dim: int, axis: str | None = "embed") -> dict[str, ParamSpec]:
    tree = {"w": ParamSpec((dim,), (axis,), "zeros" if norm.plus_one else "ones")}
    return tree | ({"b": ParamSpec((dim,), (axis,), "zeros")} if norm.kind == "layer" else {})


def is_param_spec(node: object) -> bool:
    """For `jax.tree` calls over `param_specs(...)`, whose leaves are tuples themselves."""
    return isinstance(node, ParamSpec)


def flatten(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of params or of `param_specs`, paths written `layers.0.mixer.q.w`, in the tree's own order.

    Of quantised weights there are two, `layers.0.mixer.q.w.values` and `layers.0.mixer.q.w.scale`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param_spec):
        yield _path(path), leaf


def _path(keys: Iterable[Any]) -> str:
    return ".".join(str(next(getattr(key, of) for of in ("key", "idx", "name") if hasattr(key, of))) for key in keys)


def map_specs(f: Callable[[str, ParamSpec], Any], spec: Decoder) -> dict[str, Any]:
    """A params-shaped tree of f(path, param_spec), called leaf by leaf in the order of `flatten`."""
    tree = param_specs(spec)
    leaves = [f(path, leaf) for path, leaf in flatten(tree)]
    mapped: dict[str, Any] = jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_param_spec), leaves)
    return mapped


def num_params(spec: Decoder) -> int:
    """How many weights the model has, a tied head counted once."""
    return sum(math.prod(leaf.shape) for _, leaf in flatten(param_specs(in_floats(spec))))


def leaf_bytes(shape: Iterable[int], dtype: Any) -> int:
    """Bytes of an array on a device, where two numbers of 4 bits share one."""
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    return math.prod(shape) * bits // 8


def dummy_params(spec: Decoder, seed: int = 0, dtype: jnp.dtype | str = jnp.float32) -> Params:
    """Random weights of the right shapes, made on the device: for benchmarks and tests."""
    keys = iter(jax.random.split(jax.random.key(seed), len(list(flatten(param_specs(in_floats(spec)))))))

    def make(path: str, leaf: ParamSpec) -> jax.Array:
        key, own = next(keys), leaf.dtype or dtype
        if leaf.init != "normal":
            return jnp.full(leaf.shape, 1 if leaf.init == "ones" else 0, own)
        return jax.random.normal(key, leaf.shape, own) * np.asarray(leaf.shape[-2] ** -0.5, own)

    return quantize_params(map_specs(make, in_floats(spec)), spec)


def check_params(spec: Decoder, params: Params) -> list[str]:
    """One line for every missing, unexpected or mis-shaped leaf, and for quantised values of another dtype.

    An empty list says that `params` fit `spec`.
    """
    specs, given = dict(flatten(param_specs(spec))), dict(flatten(params))
    want = {path: leaf.shape for path, leaf in specs.items()}
    have = {path: tuple(np.shape(leaf)) for path, leaf in given.items()}
    problems = [f"missing {path} {want[path]}" for path in want if path not in have]
    problems += [f"unexpected {path} {have[path]}" for path in have if path not in want]
    problems += [f"{p} has shape {have[p]}, needs {want[p]}" for p in want if p in have and have[p] != want[p]]
    typed = {path: leaf.dtype for path, leaf in specs.items() if path.endswith(".w.values") and path in given}
    return problems + [f"{p} is {given[p].dtype}, needs {typed[p]}" for p in typed if given[p].dtype != typed[p]]


def in_floats(spec: Decoder) -> Decoder:
    """The spec whose weights are not quantised."""
    return replace(spec, quantization=None)


def quantized_as(spec: Decoder, dtype: WeightDtype | None) -> Decoder:
    """The spec whose weights are quantised to `dtype`; None: as they are.

    int4 gets groups of 128 rows, or of 64 or 32 where that many do not divide all weights' rows. Raises ConfigError
    where `spec` is quantised in another way, or cannot be.
    """
    if dtype is None or (spec.quantization is not None and spec.quantization.dtype == dtype):
        return spec
    if spec.quantization is not None:
        raise ConfigError(
            f"the weights are {spec.quantization.dtype} already and quantization is {dtype!r}; leave it out"
        )
    if dtype != "int4":
        return replace(spec, quantization=Quantization(dtype))
    if any(isinstance(block.ffn, Moe) for block in spec.blocks):
        raise ConfigError(
            "int4 has scales for groups of rows, which products of a mixture's experts do not read yet; use int8 or fp8"
        )
    rows = {path: leaf.shape[-2] for path, leaf in flatten(param_specs(spec)) if leaf.quantizable}
    for size in (128, 64, 32):
        if not any(count % size for count in rows.values()):
            return replace(spec, quantization=Quantization(dtype, size))
    path, count = next((path, count) for path, count in rows.items() if count % 32)
    raise ConfigError(
        f"int4 has groups of at least 32 rows, which do not divide the {count:,} of {path}; use int8 or fp8"
    )


def quantize_params(params: Params, spec: Decoder) -> Params:
    """Params that are floats as `spec`, which is quantised, has them: leaf by leaf, where each lies; shapes stay so.

    One small function is compiled for each shape of a leaf, so that leaves may lie on different devices, as those of
    pipeline stages do. Raises ConfigError where `params` are not the leaves of `spec` in floats.
    """
    how, floats, given = spec.quantization, in_floats(spec), dict(flatten(params))
    if given.keys() != {path for path, _ in flatten(param_specs(floats))}:
        raise ConfigError("the params do not fit the spec: " + "; ".join(check_params(floats, params)))

    def of(path: str, leaf: ParamSpec) -> Any:
        w = given[path]
        if how is None or not leaf.quantizable:
            return w
        if isinstance(w, jax.ShapeDtypeStruct):
            return jax.eval_shape(partial(quantize, how=how), w)
        return _quantize(w, how)

    return map_specs(of, floats)


_quantize = jax.jit(quantize, static_argnums=1)


def is_quantized(params: Params) -> bool:
    """Whether any leaf is."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)


def like(specs: Any, params: Any) -> Any:
    """`specs` of floats with those of both arrays wherever the leaf of `params` is quantised."""

    def of(leaf: ParamSpec, w: Any) -> Any:
        return _parts(leaf, w.values.dtype, w.scale.shape[-2]) if isinstance(w, Quantized) else leaf

    return jax.tree.map(of, specs, params, is_leaf=is_param_spec)


def _quantized(leaf: ParamSpec, how: Quantization, path: str) -> Quantized:
    rows = leaf.shape[-2]
    size = rows if how.group_size is None else how.group_size
    if size < 1 or rows % size:
        raise ConfigError(
            f"{how.dtype} has groups of {size:,} rows, which do not divide the {rows:,} of {path}; "
            "quantise in another way, or take fewer devices"
        )
    return _parts(leaf, STEPS[how.dtype].dtype, rows // size)


def _parts(leaf: ParamSpec, dtype: np.dtype[Any], groups: int) -> Quantized:
    """The two arrays of a leaf. The scale is cut with the columns, and with the rows where they have several groups."""
    axes = (*leaf.axes[:-2], None if groups == 1 else leaf.axes[-2], leaf.axes[-1])
    scale = ParamSpec((*leaf.shape[:-2], groups, leaf.shape[-1]), axes, "ones", dtype=np.dtype(np.float32))
    return Quantized(leaf._replace(dtype=dtype), scale)
