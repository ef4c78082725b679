"""Phi 1, 1.5 and 2: attention and MLP side by side after one layer norm, heads rotated in part, biases everywhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import MAX_LAYERS, Fields
from jaxpaged.convert.families.rope import max_positions, rope
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm

DEFAULTS = {
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}

TABLE: Table = {
    "embed": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "head": "lm_head",
    **each_layer(
        "model.layers.{i}.",
        {
            "norm1": "input_layernorm",
            "mixer.q": "self_attn.q_proj",
            "mixer.k": "self_attn.k_proj",
            "mixer.v": "self_attn.v_proj",
            "mixer.o": "self_attn.dense",
            "mixer.q_norm": "self_attn.q_layernorm",
            "mixer.k_norm": "self_attn.k_layernorm",
            "ffn.up": "mlp.fc1",
            "ffn.down": "mlp.fc2",
        },
    ),
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config."""
    c = Fields(config, DEFAULTS)
    c.refuse("tie_word_embeddings", unless=False, why="is not supported here: Phi's head has a bias of its own")
    dim, heads = c.size("hidden_size"), c.size("num_attention_heads")
    kv_heads = llama.kv_heads(c)
    head_dim = c.quotient("hidden_size", "num_attention_heads")
    rotary = rope(c, head_dim)
    norm = Norm("layer", c.positive("layer_norm_eps"))
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        head_dim**-0.5,
        rotary,
        qk_norm=norm if c.flag("qk_layernorm") else None,
        qkv_bias=True,
        out_bias=True,
    )
    mlp = Mlp(c.size("intermediate_size"), c.activation("hidden_act"), gated=False, bias=True)
    return Decoder(
        vocab_size=c.size("vocab_size"),
        dim=dim,
        max_positions=max_positions(c, rotary),
        blocks=(Block(attention, mlp, norm, "parallel_one_norm"),) * c.size("num_hidden_layers", most=MAX_LAYERS),
        norm=norm,
        embed_dim=dim,
        tied_head=False,
        head_bias=True,
    )


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    return rules_for(spec, TABLE)
