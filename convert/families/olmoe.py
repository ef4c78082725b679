"""OLMoE: Llama with experts in every layer, and norms over all heads of q and of k together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families import llama, qwen_moe
from jaxpaged.convert.families.fields import Fields
from jaxpaged.model.spec import Decoder

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config; HF's names are Qwen's."""
    c = Fields(config, DEFAULTS)
    if "clip_qkv" in c:
        raise c.error("clip_qkv", "bounds queries, keys and values, which we do not compute; only null is read")
    decoder = llama.with_biases(llama.decoder(c), c)
    decoder = llama.map_mixers(decoder, lambda i, a: replace(a, qk_norm=decoder.norm, norm_all_heads=True))
    moe = qwen_moe.mixture(c, "num_experts", c.size("intermediate_size"))
    return llama.map_blocks(decoder, lambda i, block: replace(block, ffn=moe))
