"""Rotary embeddings as configs write them: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math

from jaxpaged.convert.families.fields import Fields
from jaxpaged.model.spec import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)


def rope_parameters(c: Fields) -> Fields:
    """What either dialect says, in the newer one's names: rope_theta, rope_type, partial_rotary_factor, factor, ..."""
    name = "rope_scaling" if c.raw("rope_scaling") else "rope_parameters"
    p = c.inner(name)
    outer = {name: c.raw(name) for name in ("rope_theta", "partial_rotary_factor")}
    outer["rope_type"] = p.raw("type") or "default"
    return p.over({key: value for key, value in outer.items() if key not in p})


def rope(c: Fields, head_dim: int, parameters: Fields | None = None) -> Rope:
    """The rotary embedding of heads of `head_dim`; `parameters` are those of one layer type where there are several."""
    p = rope_parameters(c) if parameters is None else parameters
    partial = p.positive("partial_rotary_factor") if "partial_rotary_factor" in p else 1.0
    dim = int(head_dim * partial)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise p.error("partial_rotary_factor", f"rotates {dim} of {head_dim} head dimensions; it must be an even part")
    return Rope(p.positive("rope_theta"), dim, scaling=_scaling(c, p, dim))


def max_positions(c: Fields, rope: Rope) -> int:
    """How long a sequence may be: what the config says, which for these scalings is the length before scaling."""
    positions = c.size("max_position_embeddings")
    match rope.scaling:
        case LinearScaling(factor) | DynamicNtkScaling(factor):
            return max(positions, int(positions * factor))
        case YarnScaling(factor, original):
            return max(positions, int(original * factor))
    return positions


def _scaling(c: Fields, p: Fields, dim: int) -> RopeScaling | None:
    match p.raw("rope_type"):
        case "default":
            return None
        case "linear":
            return LinearScaling(p.positive("factor"))
        case "dynamic":
            if dim <= 2:
                raise p.error("rope_type", f"needs more than 2 rotated head dimensions, found {dim}")
            return DynamicNtkScaling(p.positive("factor"), c.size("max_position_embeddings"))
        case "llama3":
            low, high = p.positive("low_freq_factor"), p.positive("high_freq_factor")
            if low >= high:
                raise p.error("low_freq_factor", f"must be below high_freq_factor = {high}")
            return Llama3Scaling(p.positive("factor"), low, high, _original_positions(c, p))
        case "yarn":
            factor = _factor(c, p)
            return YarnScaling(
                factor,
                _original_positions(c, p),
                _yarn_attention_factor(p, factor),
                beta_fast=p.maybe_positive("beta_fast") or 32.0,
                beta_slow=p.maybe_positive("beta_slow") or 1.0,
                truncate=p.flag("truncate") if "truncate" in p else True,
            )
        case "longrope" | "su":
            short, long = p.numbers("short_factor", dim // 2), p.numbers("long_factor", dim // 2)
            return LongRopeScaling(short, long, _original_positions(c, p), _longrope_attention_factor(c, p))
    raise p.error("rope_type", "is not supported; known: default, linear, dynamic, llama3, yarn, longrope")


def _original_positions(c: Fields, p: Fields) -> int:
    """Phi-3 keeps it outside of the rope's parameters; it is the model's own length where nothing is said."""
    for fields, name in ((c, "original_max_position_embeddings"), (p, "original_max_position_embeddings")):
        if name in fields:
            return fields.size(name, least=2)
    return c.size("max_position_embeddings", least=2)


def _factor(c: Fields, p: Fields) -> float:
    if "factor" in p:
        return p.positive("factor")
    return c.size("max_position_embeddings") / _original_positions(c, p)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """By how much more attention is sharpened the longer a context has become (arXiv 2309.00071, 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_factor(p: Fields, factor: float) -> float:
    if "attention_factor" in p:
        return p.positive("attention_factor")
    if p.raw("mscale") and p.raw("mscale_all_dim"):
        return yarn_mscale(factor, p.number("mscale")) / yarn_mscale(factor, p.number("mscale_all_dim"))
    return yarn_mscale(factor)


def _longrope_attention_factor(c: Fields, p: Fields) -> float:
    if "attention_factor" in p:
        return p.positive("attention_factor")
    factor = _factor(c, p)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(_original_positions(c, p)))
