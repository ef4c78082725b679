"""GPT-NeoX and Pythia: attention and MLP side by side, heads rotated in part, q, k and v fused head by head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxpaged.convert.families.fields import MAX_LAYERS, Fields
from jaxpaged.convert.families.rope import max_positions, rope
from jaxpaged.convert.rules import Module, Rule, each_layer, rules_for
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm

DEFAULTS = {
    "attention_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config, whose older dialect has its own words for the rope's parameters."""
    c = Fields(config, DEFAULTS)
    c = c.over({"rope_theta": c.raw("rotary_emb_base"), "partial_rotary_factor": c.raw("rotary_pct")})
    dim, heads = c.size("hidden_size"), c.size("num_attention_heads")
    head_dim, biased = c.quotient("hidden_size", "num_attention_heads"), c.flag("attention_bias")
    rotary = rope(c, head_dim)
    norm = Norm("layer", c.positive("layer_norm_eps"))
    block = Block(
        Attention(heads, heads, head_dim, head_dim**-0.5, rotary, qkv_bias=biased, out_bias=biased),
        Mlp(c.size("intermediate_size"), c.activation("hidden_act"), gated=False, bias=True),
        norm,
        residual="parallel" if c.flag("use_parallel_residual") else "serial",
    )
    return Decoder(
        vocab_size=c.size("vocab_size"),
        dim=dim,
        max_positions=max_positions(c, rotary),
        blocks=(block,) * c.size("num_hidden_layers", most=MAX_LAYERS),
        norm=norm,
        embed_dim=dim,
        tied_head=c.flag("tie_word_embeddings"),
    )


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves. The head is `embed_out` as published, `lm_head` where transformers 5 names it so."""
    qkv = Module("attention.query_key_value", num_heads=spec.blocks[0].mixer.heads)
    layers = each_layer(
        "gpt_neox.layers.{i}.",
        {
            "norm1": "input_layernorm",
            ("mixer.q", "mixer.k", "mixer.v"): qkv,
            "mixer.o": "attention.dense",
            "norm2": "post_attention_layernorm",
            "ffn.up": "mlp.dense_h_to_4h",
            "ffn.down": "mlp.dense_4h_to_h",
        },
    )
    head = "lm_head" if "lm_head.weight" in names else "embed_out"
    return rules_for(
        spec,
        {"embed": "gpt_neox.embed_in", **layers, "norm": "gpt_neox.final_layer_norm", "head": head},
    )
