"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import Fields
from jaxpaged.model.spec import Decoder

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config. `sliding_window` null is none; left out, it is 4096."""
    c = Fields(config, DEFAULTS)
    decoder = llama.decoder(c)
    return llama.with_windows(decoder, [True] * len(decoder.blocks), c.maybe_size("sliding_window"))
