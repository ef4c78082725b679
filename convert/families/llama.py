"""Llama (2, 3, 3.x, SmolLM2), and what the families shaped like it share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families.fields import MAX_LAYERS, Fields
from jaxpaged.convert.families.rope import max_positions, rope
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm

DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
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
            "mixer.q": "self_attn.q_proj",
            "mixer.k": "self_attn.k_proj",
            "mixer.v": "self_attn.v_proj",
            "mixer.o": "self_attn.o_proj",
            "mixer.q_norm": "self_attn.q_norm",
            "mixer.k_norm": "self_attn.k_norm",
            "norm2": "post_attention_layernorm",
            "ffn.gate": "mlp.gate_proj",
            "ffn.up": "mlp.up_proj",
            "ffn.down": "mlp.down_proj",
        },
    ),
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config."""
    c = Fields(config, DEFAULTS)
    return with_biases(decoder(c), c)


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    return rules_for(spec, TABLE)


def decoder(c: Fields) -> Decoder:
    """A decoder of equal serial layers: RMS norms, rotary attention in full, a gated MLP, no biases."""
    norm = Norm("rms", c.positive("rms_norm_eps"))
    dim = c.size("hidden_size")
    heads = c.size("num_attention_heads")
    head_dim = c.maybe_size("head_dim") or c.quotient("hidden_size", "num_attention_heads")
    rotary = rope(c, head_dim)
    attention = Attention(heads, kv_heads(c), head_dim, head_dim**-0.5, rotary)
    block = Block(attention, Mlp(c.size("intermediate_size"), c.activation("hidden_act")), norm)
    return Decoder(
        vocab_size=c.size("vocab_size"),
        dim=dim,
        max_positions=max_positions(c, rotary),
        blocks=(block,) * c.size("num_hidden_layers", most=MAX_LAYERS),
        norm=norm,
        embed_dim=dim,
        tied_head=c.flag("tie_word_embeddings"),
    )


def kv_heads(c: Fields) -> int:
    """How many heads share the query heads evenly; all of them where the config does not say."""
    heads = c.size("num_attention_heads")
    count = c.maybe_size("num_key_value_heads") or heads
    if heads % count:
        raise c.error("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    return count


def with_biases(spec: Decoder, c: Fields) -> Decoder:
    """`attention_bias` puts biases on all four attention linears, `mlp_bias` on the MLP's."""
    biased = c.flag("attention_bias")
    spec = map_mixers(spec, lambda i, a: replace(a, qkv_bias=biased, out_bias=biased))
    wide = c.flag("mlp_bias")
    return map_blocks(spec, lambda i, b: replace(b, ffn=replace(b.ffn, bias=wide)) if isinstance(b.ffn, Mlp) else b)


def map_blocks(spec: Decoder, f: Callable[[int, Block], Block]) -> Decoder:
    """`spec` with f(i, block) for every block."""
    return replace(spec, blocks=tuple(f(i, block) for i, block in enumerate(spec.blocks)))


def map_mixers(spec: Decoder, f: Callable[[int, Attention], Attention]) -> Decoder:
    """`spec` with f(i, attention) for every block's attention."""

    def change(i: int, block: Block) -> Block:
        return replace(block, mixer=f(i, block.mixer)) if isinstance(block.mixer, Attention) else block

    return map_blocks(spec, change)


def with_windows(spec: Decoder, is_local: Collection[bool], window: int | None) -> Decoder:
    """`spec` whose layers marked in `is_local` see `window` keys."""
    local = tuple(is_local)
    return map_mixers(spec, lambda i, a: replace(a, window=window if local[i] else None))
