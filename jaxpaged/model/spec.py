"""What a model is: a frozen, hashable tree of small typed specs. Names no checkpoint family and holds no array.

A field exists only where it means something. What varies from layer to layer is the tuple of blocks.
`to_json` / `from_json` write and read the tree as plain JSON, each node tagged with its class.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]
Residual = Literal["serial", "parallel", "parallel_one_norm", "sandwich", "post"]
WeightDtype = Literal["int8", "fp8", "int4"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm over the last axis, computed in float32. `plus_one` multiplies by 1 + weight."""

    kind: Literal["rms", "layer"]
    eps: float
    plus_one: bool = False


@dataclass(frozen=True)
class LinearScaling:
    """Every position divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicNtkScaling:
    """Base grown with the sequence's length once it passes `original_max_positions`.

    A prompt's tokens are rotated for the whole prompt's length, a generated token for its own: the same
    numbers whatever the chunking.
    """

    factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, smooth between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """NTK by parts (arXiv 2309.00071). `attention_factor` multiplies cos and sin."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """One divisor per frequency, another set past `original_max_positions` (arXiv 2402.13753).

    The set is chosen by the sequence's length; one that outgrows the original while it is generated is computed anew,
    as in transformers. `attention_factor` multiplies cos and sin.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


RopeScaling = LinearScaling | DynamicNtkScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `dim` of a head; pairs are halves, or neighbours if `interleaved`."""

    theta: float
    dim: int
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Attention:
    """Softmax attention with grouped query heads.

    `scale` multiplies q.k; `softcap` bounds the scores by tanh; `window` counts the keys a query sees, itself
    included; `sinks` adds one learned logit per head to the softmax's denominator. `qk_norm` is over each head alone
    or, with `norm_all_heads`, over all of q and all of k.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    qk_norm: Norm | None = None
    norm_all_heads: bool = False
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are made of one latent a token, which is all that pages hold (arXiv 2405.04434).

    A head's key is `nope_dim` numbers made of the latent of `kv_rank` and, after them, `rope.dim` rotated ones that all
    heads share; its value is `v_dim` numbers made of the latent. With `q_rank` queries are made of a latent too. `norm`
    is that of the latents. `bias` is on the linears that make latents, and on the last one.
    """

    heads: int
    kv_rank: int
    nope_dim: int
    v_dim: int
    scale: float
    rope: Rope
    norm: Norm
    q_rank: int | None = None
    bias: bool = False

    @property
    def head_dim(self) -> int:
        """Numbers of a head's query, and of its key where that is made."""
        return self.nope_dim + self.rope.dim

    @property
    def row_dim(self) -> int:
        """Numbers that a page holds of a token: its latent, and the rotated part of its keys."""
        return self.kv_rank + self.rope.dim


Mixer = Attention | LatentAttention


@dataclass(frozen=True)
class Mlp:
    """down(act(up x)), or down(act(gate x) * up x) where `gated`; `dim` is the hidden width F."""

    dim: int
    act: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class ExpertGroups:
    """`count` equal runs of experts. A token's experts are of its `top_k` best groups, a group being as good as its
    `best_of` best experts together.
    """

    count: int
    top_k: int
    best_of: int


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: the sum of the `top_k` gated Mlps, of `experts`, that a router finds likeliest for a token.

    Each is weighted by its probability, by a softmax over all experts or each one's own sigmoid, or with `renormalize`
    by its share of those chosen; then by `scale`. `dim` is an expert's hidden width F. `shared` is one more Mlp that
    every token has, times sigmoid(x . w) with `shared_gate`. `groups` bounds who is chosen; a learned `selection_bias`
    is added to find the likeliest, and to nothing else.
    """

    experts: int
    top_k: int
    dim: int
    act: Activation
    renormalize: bool
    shared: Mlp | None = None
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False
    groups: ExpertGroups | None = None
    scale: float = 1.0

    @property
    def expert(self) -> Mlp:
        """What each of the experts is."""
        return Mlp(self.dim, self.act)


@dataclass(frozen=True)
class Block:
    """One layer. `residual` says where norms and additions stand:

    serial              x += mixer(norm1 x); x += ffn(norm2 x)
    parallel            x += mixer(norm1 x) + ffn(norm2 x)
    parallel_one_norm   x += mixer(norm1 x) + ffn(norm1 x)
    sandwich            x += post1(mixer(norm1 x)); x += post2(ffn(norm2 x))
    post                x = norm1(x + mixer x); x = norm2(x + ffn x)
    """

    mixer: Mixer
    ffn: Mlp | Moe
    norm: Norm
    residual: Residual = "serial"


@dataclass(frozen=True)
class Quantization:
    """Matrices that blocks multiply by, in 8 or 4 bits: with a scale for each column, or for each `group_size` rows of
    one. `params.param_specs` says which matrices.
    """

    dtype: WeightDtype
    group_size: int | None = None


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model.

    `dim` is the width M of the residual stream, `embed_dim` that of the embedding table (projections stand
    between where they differ), `max_positions` the longest sequence it was made for, `learned_positions` the
    offset of position 0 in a learned table, `norm` the last norm (None for post-norm models), `quantization` what the
    weights are stored as (None: floats).
    """

    vocab_size: int
    dim: int
    max_positions: int
    blocks: tuple[Block, ...]
    norm: Norm | None
    embed_dim: int
    tied_head: bool
    head_bias: bool = False
    embed_scale: float = 1.0
    learned_positions: int | None = None
    logit_softcap: float | None = None
    quantization: Quantization | None = None

    def apply(self, params: Any, tokens: Any, *, remat: bool = False) -> Any:
        """The model in training form: float32 logits [..., T, V] of whole sequences of token ids [..., T].

        Dense, pure and differentiable in `params`. Rows shorter than T are padded at their end with any token: nothing
        before it sees it. `remat` keeps only the layers' inputs for the gradient and computes the rest again.
        """
        import jax  # only here: a spec alone needs no jax

        from jaxpaged.model import decoder

        if tokens.ndim == 1:
            return decoder.apply(params, tokens, self, remat=remat)
        return jax.vmap(lambda row: self.apply(params, row, remat=remat))(tokens)


def to_json(spec: Decoder) -> str:
    """The whole tree as JSON; `from_json` gives an equal spec back."""
    return json.dumps(_encode(spec), indent=1) + "\n"


def from_json(text: str) -> Decoder:
    """The spec written by `to_json`. Raises ValueError, naming the field, where the text does not describe one."""
    spec = _decode(json.loads(text), "spec")
    if not isinstance(spec, Decoder):
        raise ValueError(f"spec: expected a Decoder, found {type(spec).__name__}")
    return spec


def _encode(node: Any) -> Any:
    if is_dataclass(node) and not isinstance(node, type):
        return {"type": type(node).__name__} | {f.name: _encode(getattr(node, f.name)) for f in fields(node)}
    return [_encode(x) for x in node] if isinstance(node, tuple) else node


_NODES: dict[str, type] = {
    c.__name__: c
    for c in (
        Norm,
        LinearScaling,
        DynamicNtkScaling,
        Llama3Scaling,
        YarnScaling,
        LongRopeScaling,
        Rope,
        Attention,
        LatentAttention,
        Mlp,
        ExpertGroups,
        Moe,
        Block,
        Quantization,
        Decoder,
    )
}


def _decode(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return tuple(_decode(x, f"{path}[{i}]") for i, x in enumerate(node))
    if not isinstance(node, dict):
        return node
    kind = _NODES.get(str(node.get("type")))
    if kind is None:
        raise ValueError(f"{path}: unknown type {node.get('type')!r}; known: {', '.join(_NODES)}")
    known = {f.name: f for f in fields(kind)}
    given = {k: v for k, v in node.items() if k != "type"}
    if unknown := given.keys() - known.keys():
        raise ValueError(f"{path}: {kind.__name__} has no field {', '.join(sorted(unknown))}")
    required = {n for n, f in known.items() if f.default is dataclasses.MISSING}
    if missing := required - given.keys():
        raise ValueError(f"{path}: {kind.__name__} lacks {', '.join(sorted(missing))}")
    values = {k: _decode(v, f"{path}.{k}") for k, v in given.items()}
    for name, value in values.items():
        if not _fits(value, _hints(kind)[name]):
            raise ValueError(f"{path}.{name}: {value!r} is not a valid value")
    return kind(**values)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if args:
        return any(_fits(value, a) for a in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
