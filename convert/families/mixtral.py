"""Mixtral: Mistral with a mixture of experts in every layer, the chosen ones' weights adding up to 1."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import MAX_EXPERTS, Fields
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for
from jaxpaged.model.spec import Decoder, Moe

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}

TABLE: Table = {
    **llama.TABLE,
    **each_layer(
        "model.layers.{i}.block_sparse_moe.",
        {
            "ffn.router": "gate",
            "ffn.experts.gate": "experts.{e}.w1",
            "ffn.experts.up": "experts.{e}.w3",
            "ffn.experts.down": "experts.{e}.w2",
        },
    ),
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config."""
    c = Fields(config, DEFAULTS)
    decoder = llama.decoder(c)
    experts = c.size("num_local_experts", most=MAX_EXPERTS)
    top_k = c.size("num_experts_per_tok", most=experts)
    moe = Moe(experts, top_k, c.size("intermediate_size"), c.activation("hidden_act"), renormalize=True)
    decoder = llama.map_blocks(decoder, lambda i, block: replace(block, ffn=moe))
    return llama.with_windows(decoder, [True] * len(decoder.blocks), c.maybe_size("sliding_window"))


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    return rules_for(spec, TABLE)
