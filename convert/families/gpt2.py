"""GPT-2: learned positions, layer norms, Conv1D weights that are [in, out] already."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxpaged.convert.families.fields import MAX_LAYERS, Fields
from jaxpaged.convert.rules import Module, Rule, each_layer, rules_for
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm

DEFAULTS = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_positions": 1024,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "vocab_size": 50257,
}


def spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of an HF config."""
    c = Fields(config, DEFAULTS)
    c.refuse("add_cross_attention", unless=False, why="makes a decoder of an encoder; only decoder-only models run")
    dim, heads = c.size("n_embd"), c.size("n_head")
    head_dim = c.quotient("n_embd", "n_head")
    scale = head_dim**-0.5 if c.flag("scale_attn_weights") else 1.0
    by_layer = c.flag("scale_attn_by_inverse_layer_idx")
    norm = Norm("layer", c.positive("layer_norm_epsilon"))
    mlp = Mlp(c.maybe_size("n_inner") or 4 * dim, c.activation("activation_function"), gated=False, bias=True)

    def block(i: int) -> Block:
        layer_scale = scale / (i + 1) if by_layer else scale
        return Block(Attention(heads, heads, head_dim, layer_scale, qkv_bias=True, out_bias=True), mlp, norm)

    return Decoder(
        vocab_size=c.size("vocab_size"),
        dim=dim,
        max_positions=c.size("n_positions"),
        blocks=tuple(block(i) for i in range(c.size("n_layer", most=MAX_LAYERS))),
        norm=norm,
        embed_dim=dim,
        tied_head=c.flag("tie_word_embeddings"),
        learned_positions=0,
    )


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves. The first published files leave out the `transformer.` before every name."""
    prefix = "" if "wte.weight" in names else "transformer."
    layers = each_layer(
        prefix + "h.{i}.",
        {
            "norm1": "ln_1",
            ("mixer.q", "mixer.k", "mixer.v"): Module("attn.c_attn", in_out=True),
            "mixer.o": Module("attn.c_proj", in_out=True),
            "norm2": "ln_2",
            "ffn.up": Module("mlp.c_fc", in_out=True),
            "ffn.down": Module("mlp.c_proj", in_out=True),
        },
    )
    return rules_for(
        spec,
        {
            "embed": prefix + "wte",
            "positions": prefix + "wpe",
            **layers,
            "norm": prefix + "ln_f",
            "head": "lm_head",
        },
    )
