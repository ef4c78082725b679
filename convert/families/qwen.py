"""Qwen2, Qwen2.5 (biases on q, k and v) and Qwen3 (norms on q and k): Llama with windows in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import Fields
from jaxpaged.model.spec import Decoder

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}


def qwen2_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Qwen2 config."""
    c = Fields(config, DEFAULTS)
    decoder = llama.map_mixers(llama.decoder(c), lambda i, a: replace(a, qkv_bias=True))
    return _with_windows(decoder, c)


def qwen3_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Qwen3 config."""
    c = Fields(config, DEFAULTS | {"head_dim": 128})
    decoder = llama.with_biases(llama.decoder(c), c)
    return _with_windows(llama.map_mixers(decoder, lambda i, a: replace(a, qk_norm=decoder.norm)), c)


def _with_windows(decoder: Decoder, c: Fields) -> Decoder:
    """`layer_types` says which layers are local; before it was there, those from `max_window_layers` up."""
    count = len(decoder.blocks)
    if not c.flag("use_sliding_window"):
        return decoder
    if "layer_types" in c:
        local = c.layer_types(count)
    else:
        first = c.size("max_window_layers", least=0)
        local = tuple(i >= first for i in range(count))
    return llama.with_windows(decoder, local, c.maybe_size("sliding_window"))
