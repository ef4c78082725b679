"""Phi-3, 3.5 and 4: Llama with fused q/k/v and gate/up, long ropes, windows and partly rotated heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import Fields
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for
from jaxpaged.model.spec import Decoder

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

TABLE: Table = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    **each_layer(
        "model.layers.{i}.",
        {
            "norm1": "input_layernorm",
            ("mixer.q", "mixer.k", "mixer.v"): "self_attn.qkv_proj",
            "mixer.o": "self_attn.o_proj",
            "norm2": "post_attention_layernorm",
            ("ffn.gate", "ffn.up"): "mlp.gate_up_proj",
            "ffn.down": "mlp.down_proj",
        },
    ),
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config. The first Phi-3 checkpoints call their long rope "su" or "yarn"."""
    c = Fields(config, DEFAULTS)
    for name in ("rope_scaling", "rope_parameters"):
        parameters = c.inner(name)
        if "yarn" in (parameters.raw("rope_type"), parameters.raw("type")):
            c = c.over({name: {**config[name], "rope_type": "longrope"}})
    decoder = llama.decoder(c)
    return llama.with_windows(decoder, [True] * len(decoder.blocks), c.maybe_size("sliding_window"))


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    return rules_for(spec, TABLE)
