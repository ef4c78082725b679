"""Qwen1.5-MoE, Qwen2-MoE (a shared expert behind a gate) and Qwen3-MoE: Qwen with experts in some or all layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import MAX_EXPERTS, Fields
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for
from jaxpaged.model.spec import Decoder, Mlp, Moe

DEFAULTS = {
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS = DEFAULTS | {
    "max_window_layers": 28,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "shared_expert_intermediate_size": 5632,
}
QWEN3_DEFAULTS = DEFAULTS | {
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 128,
}

TABLE: Table = {
    **llama.TABLE,
    **each_layer(
        "model.layers.{i}.mlp.",
        {
            "ffn.router": "gate",
            "ffn.experts.gate": "experts.{e}.gate_proj",
            "ffn.experts.up": "experts.{e}.up_proj",
            "ffn.experts.down": "experts.{e}.down_proj",
            "ffn.shared.gate": "shared_expert.gate_proj",
            "ffn.shared.up": "shared_expert.up_proj",
            "ffn.shared.down": "shared_expert.down_proj",
            "ffn.shared_gate": "shared_expert_gate",
        },
    ),
}


def qwen2_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Qwen2-MoE config."""
    c = Fields(config, QWEN2_DEFAULTS)
    biased = c.flag("qkv_bias")
    decoder = llama.map_mixers(llama.decoder(c), lambda i, a: replace(a, qkv_bias=biased))
    shared = Mlp(c.size("shared_expert_intermediate_size"), c.activation("hidden_act"))
    moe = replace(mixture(c, "num_experts", c.size("moe_intermediate_size")), shared=shared, shared_gate=True)
    decoder = _with_mixtures(decoder, moe, c)
    if not c.flag("use_sliding_window"):
        return decoder
    count = len(decoder.blocks)
    if "layer_types" in c:
        local = c.layer_types(count)
    else:  # every other layer, unlike Qwen2
        last = c.size("max_window_layers", least=0)
        local = tuple(i % 2 == 0 and i < last for i in range(count))
    return llama.with_windows(decoder, local, c.maybe_size("sliding_window"))


def qwen3_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Qwen3-MoE config."""
    c = Fields(config, QWEN3_DEFAULTS)
    decoder = llama.with_biases(llama.decoder(c), c)
    decoder = llama.map_mixers(decoder, lambda i, a: replace(a, qk_norm=decoder.norm))
    experts = "num_experts" if "num_experts" in c else "num_local_experts"
    decoder = _with_mixtures(decoder, mixture(c, experts, c.size("moe_intermediate_size")), c)
    window = c.maybe_size("sliding_window") if c.flag("use_sliding_window") else None
    return llama.with_windows(decoder, [True] * len(decoder.blocks), window)


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    return rules_for(spec, TABLE)


def mixture(c: Fields, experts: str, dim: int) -> Moe:
    """The mixture of a config that counts its experts in the field `experts`."""
    count = c.size(experts, most=MAX_EXPERTS)
    top_k = c.size("num_experts_per_tok", most=count)
    return Moe(count, top_k, dim, c.activation("hidden_act"), c.flag("norm_topk_prob"))


def _with_mixtures(decoder: Decoder, moe: Moe, c: Fields) -> Decoder:
    """The mixture in every `decoder_sparse_step`th layer that is not among `mlp_only_layers`."""
    step, dense = c.size("decoder_sparse_step"), c.indices("mlp_only_layers", len(decoder.blocks))
    return llama.map_blocks(
        decoder, lambda i, block: block if i in dense or (i + 1) % step else replace(block, ffn=moe)
    )
