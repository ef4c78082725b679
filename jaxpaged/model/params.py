"""The one table of weights: for every leaf of a model's params its shape, logical axes and initialiser.

It drives dummy weights, the memory budget, sharding, and the converter's last check. Params are a nested dict (layers
a tuple) of arrays; linear weights are [in, out], so that x @ w needs no transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.model.spec import Attention, Block, Decoder, LatentAttention, Mlp, Moe, Norm

Params = Mapping[str, Any]
"""{"embed": {"w": [V, E]}, "layers": ({"norm1", "mixer", "ffn", ...}, ...), "norm", "head", ...}"""


ReadPart = Callable[..., np.ndarray[Any, np.dtype[Any]]]
"""read(*index): a leaf's elements at an index array along each axis, whatever holds it."""


class ParamSpec(NamedTuple):
    """One weight: its shape, the logical axis of each dimension (None: never sharded), how to make it up.

    `dtype` is that of a leaf which keeps its own whatever the others are cast to.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"
    dtype: Literal["float32"] | None = None


def param_specs(spec: Decoder) -> dict[str, Any]:
    """The tree of `ParamSpec` with exactly the leaves that `spec` needs; its paths are the params' paths."""
    vocab, dim, embed = spec.vocab_size, spec.dim, spec.embed_dim
    tree: dict[str, Any] = {
        "embed": {"w": ParamSpec((vocab, embed), ("vocab", "embed"))},
        "layers": tuple(_block(b, dim) for b in spec.blocks),
    }
    if spec.learned_positions is not None:
        tree["positions"] = {"w": ParamSpec((spec.max_positions + spec.learned_positions, dim), (None, "embed"))}
    if embed != dim:
        tree["project_in"] = _linear(embed, dim, "embed", "embed", bias=False)
        tree["project_out"] = _linear(dim, embed, "embed", "embed", bias=False)
    if spec.norm is not None:
        tree["norm"] = _norm(spec.norm, dim)
    if not spec.tied_head:
        tree["head"] = _linear(embed, vocab, "embed", "vocab", bias=spec.head_bias)
    return tree


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
        tree["selection_bias"] = ParamSpec((ffn.experts,), (None,), "zeros", "float32")
    return tree | ({"shared_gate": {"w": ParamSpec((dim, 1), ("embed", None))}} if ffn.shared_gate else {})


def expert_specs(moe: Moe, dim: int) -> dict[str, Any]:
    """An Mlp's leaves with all experts along a first axis; their columns are cut by a rule of their own."""

    def stacked(leaf: ParamSpec) -> ParamSpec:
        axes = ("expert_ffn" if axis == "ffn" else axis for axis in leaf.axes)
        return ParamSpec((moe.experts, *leaf.shape), ("experts", *axes), leaf.init)

    tree: dict[str, Any] = jax.tree.map(stacked, _mlp(moe.expert, dim), is_leaf=is_param_spec)
    return tree


def _mlp(m: Mlp, dim: int) -> dict[str, Any]:
    tree = {"up": _linear(dim, m.dim, "embed", "ffn", m.bias), "down": _linear(m.dim, dim, "ffn", "embed", m.bias)}
    return tree | ({"gate": _linear(dim, m.dim, "embed", "ffn", m.bias)} if m.gated else {})


def _linear(rows: int, cols: int, row_axis: str | None, col_axis: str | None, bias: bool) -> dict[str, ParamSpec]:
    tree = {"w": ParamSpec((rows, cols), (row_axis, col_axis))}
    return tree | ({"b": ParamSpec((cols,), (col_axis,), "zeros")} if bias else {})


def _norm(norm: Norm, dim: int, axis: str | None = "embed") -> dict[str, ParamSpec]:
    tree = {"w": ParamSpec((dim,), (axis,), "zeros" if norm.plus_one else "ones")}
    return tree | ({"b": ParamSpec((dim,), (axis,), "zeros")} if norm.kind == "layer" else {})


def is_param_spec(node: object) -> bool:
    """For `jax.tree` calls over `param_specs(...)`, whose leaves are tuples themselves."""
    return isinstance(node, ParamSpec)


def flatten(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of params or of `param_specs`, paths written `layers.0.mixer.q.w`, in the tree's own order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param_spec):
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf


def map_specs(f: Callable[[str, ParamSpec], Any], spec: Decoder) -> dict[str, Any]:
    """A params-shaped tree of f(path, param_spec), called leaf by leaf in the order of `flatten`."""
    tree = param_specs(spec)
    leaves = [f(path, leaf) for path, leaf in flatten(tree)]
    mapped: dict[str, Any] = jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_param_spec), leaves)
    return mapped


def num_params(spec: Decoder) -> int:
    """How many weights the model has, a tied head counted once."""
    return sum(math.prod(leaf.shape) for _, leaf in flatten(param_specs(spec)))


def dummy_params(spec: Decoder, seed: int = 0, dtype: jnp.dtype | str = jnp.float32) -> Params:
    """Random weights of the right shapes, made on the device: for benchmarks and tests."""
    keys = iter(jax.random.split(jax.random.key(seed), len(list(flatten(param_specs(spec))))))

    def make(path: str, leaf: ParamSpec) -> jax.Array:
        key, own = next(keys), leaf.dtype or dtype
        if leaf.init != "normal":
            return jnp.full(leaf.shape, 1 if leaf.init == "ones" else 0, own)
        return jax.random.normal(key, leaf.shape, own) * np.asarray(leaf.shape[-2] ** -0.5, own)

    return map_specs(make, spec)


def check_params(spec: Decoder, params: Params) -> list[str]:
    """One line for every missing, unexpected or mis-shaped leaf; an empty list says that `params` fit `spec`."""
    want = {path: leaf.shape for path, leaf in flatten(param_specs(spec))}
    have = {path: tuple(np.shape(leaf)) for path, leaf in flatten(params)}
    problems = [f"missing {path} {want[path]}" for path in want if path not in have]
    problems += [f"unexpected {path} {have[path]}" for path in have if path not in want]
    problems += [f"{p} has shape {have[p]}, needs {want[p]}" for p in want if p in have and have[p] != want[p]]
    return problems
