"""OPT: GPT-3's shape with relu, positions from row 2; in 350m norms after the sums and narrow embeddings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxpaged.convert.families.fields import MAX_LAYERS, Fields
from jaxpaged.convert.rules import Rule, each_layer, rules_for
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm

DEFAULTS = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config."""
    c = Fields(config, DEFAULTS)
    c.refuse("layer_norm_elementwise_affine", unless=True, why="means norms without weights, which are not supported")
    dim, heads = c.size("hidden_size"), c.size("num_attention_heads")
    head_dim = c.quotient("hidden_size", "num_attention_heads")
    biased, norm_first = c.flag("enable_bias"), c.flag("do_layer_norm_before")
    norm = Norm("layer", 1e-5)
    block = Block(
        Attention(heads, heads, head_dim, head_dim**-0.5, qkv_bias=biased, out_bias=biased),
        Mlp(c.size("ffn_dim"), c.activation("activation_function"), gated=False, bias=biased),
        norm,
        residual="serial" if norm_first else "post",
    )
    return Decoder(
        vocab_size=c.size("vocab_size"),
        dim=dim,
        max_positions=c.size("max_position_embeddings"),
        blocks=(block,) * c.size("num_hidden_layers", most=MAX_LAYERS),
        norm=norm if norm_first and not c.flag("_remove_final_layer_norm") else None,
        embed_dim=c.maybe_size("word_embed_proj_dim") or dim,
        tied_head=c.flag("tie_word_embeddings"),
        learned_positions=2,
    )


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves. Some published files leave out the `model.` before every name."""
    prefix = "decoder." if "decoder.embed_tokens.weight" in names else "model.decoder."
    layers = each_layer(
        prefix + "layers.{i}.",
        {
            "norm1": "self_attn_layer_norm",
            "mixer.q": "self_attn.q_proj",
            "mixer.k": "self_attn.k_proj",
            "mixer.v": "self_attn.v_proj",
            "mixer.o": "self_attn.out_proj",
            "norm2": "final_layer_norm",
            "ffn.up": "fc1",
            "ffn.down": "fc2",
        },
    )
    top = {
        "embed": "embed_tokens",
        "positions": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "norm": "final_layer_norm",
    }
    return rules_for(spec, {**{ours: prefix + theirs for ours, theirs in top.items()}, **layers, "head": "lm_head"})
