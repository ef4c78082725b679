"""Gemma 1, 2 and 3 (text): scaled embeddings, norms that store w - 1, and from 2 on sandwich norms and local layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import Fields
from jaxpaged.convert.families.rope import rope, rope_parameters
from jaxpaged.convert.rules import Rule, Table, each_layer, rules_for
from jaxpaged.model.spec import Decoder, Norm

GEMMA: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GEMMA2: Mapping[str, Any] = {
    **GEMMA,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
}
# Complete: the published multimodal configs leave out all that equals these.
GEMMA3: Mapping[str, Any] = {
    **GEMMA2,
    "final_logit_softcapping": None,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}

SANDWICH: Table = {
    **llama.TABLE,
    **each_layer(
        "model.layers.{i}.",
        {
            "post1": "post_attention_layernorm",
            "norm2": "pre_feedforward_layernorm",
            "post2": "post_feedforward_layernorm",
        },
    ),
}


def gemma_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Gemma 1 config, whose "gelu" has always meant the tanh form."""
    c = Fields(config, GEMMA)
    return _gemma(c if c.raw("hidden_act") != "gelu" else c.over({"hidden_act": "gelu_pytorch_tanh"}))


def gemma2_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Gemma 2 config: every other layer is local, scores and logits are soft-capped."""
    return _sandwich(Fields(config, GEMMA2))


def gemma3_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a Gemma 3 text config: q/k norms, a rope per kind of layer, five local layers in six."""
    c = Fields(config, GEMMA3).over({"attn_logit_softcapping": None})  # Gemma 2's field: there, but without effect
    decoder = _sandwich(c)
    mixer = decoder.blocks[0].mixer
    local_rope, global_rope = (rope(c, mixer.head_dim, p) for p in _gemma3_ropes(c))
    local = _local_layers(c)
    decoder = llama.map_mixers(
        decoder, lambda i, a: replace(a, qk_norm=decoder.norm, rope=local_rope if local[i] else global_rope)
    )
    return replace(decoder, max_positions=c.size("max_position_embeddings"))  # Gemma 3 counts them after scaling


def gemma3_multimodal_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of the language model inside a Gemma 3 config with vision."""
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    text = config.get("text_config") or {}
    return gemma3_spec({**tied, **text} if isinstance(text, dict) else {})


def sandwich_rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    return rules_for(spec, SANDWICH)


def gemma3_multimodal_rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """The language model's tensors: `language_model.model.*` as published, `model.language_model.*` later."""
    published = any(name.startswith("language_model.") for name in names)
    body = "language_model.model." if published else "model.language_model."
    head = "language_model.lm_head" if published else "lm_head"

    def renamed(name: str) -> str:
        return head if name == "lm_head" else body + name.removeprefix("model.")

    return rules_for(spec, {ours: renamed(theirs) for ours, theirs in SANDWICH.items() if isinstance(theirs, str)})


def _gemma(c: Fields) -> Decoder:
    c.refuse("use_bidirectional_attention", unless=False, why="makes an encoder; only causal models are supported")
    norm = Norm("rms", c.positive("rms_norm_eps"), plus_one=True)
    decoder = llama.with_biases(llama.decoder(c), c)
    decoder = llama.map_blocks(decoder, lambda i, b: replace(b, norm=norm))
    return replace(decoder, norm=norm, embed_scale=decoder.dim**0.5)


def _sandwich(c: Fields) -> Decoder:
    decoder = _gemma(c.over({"hidden_act": c.raw("hidden_activation")}))
    scale, softcap = c.positive("query_pre_attn_scalar") ** -0.5, c.maybe_positive("attn_logit_softcapping")
    decoder = llama.map_mixers(decoder, lambda i, a: replace(a, scale=scale, softcap=softcap))
    decoder = llama.map_blocks(decoder, lambda i, b: replace(b, residual="sandwich"))
    decoder = llama.with_windows(decoder, _local_layers(c), c.maybe_size("sliding_window"))
    return replace(decoder, logit_softcap=c.maybe_positive("final_logit_softcapping"))


def _local_layers(c: Fields) -> tuple[bool, ...]:
    """All but every n-th layer, where `layer_types` does not say it."""
    count = c.size("num_hidden_layers")
    if "layer_types" in c:
        return c.layer_types(count)
    pattern = c.size("sliding_window_pattern")
    return tuple((i + 1) % pattern != 0 for i in range(count))


def _gemma3_ropes(c: Fields) -> tuple[Fields, Fields]:
    """The parameters of local and of global layers, from either dialect."""
    both = c.inner("rope_parameters")
    if "full_attention" not in both and "sliding_attention" not in both:
        local = Fields(
            {"rope_theta": c.raw("rope_local_base_freq"), "rope_type": "default"}, {}, "rope_local_base_freq."
        )
        return local, rope_parameters(c)
    thetas = {"sliding_attention": c.raw("rope_local_base_freq"), "full_attention": c.raw("rope_theta")}
    local, wide = (both.inner(kind, {"rope_theta": theta, "rope_type": "default"}) for kind, theta in thetas.items())
    return local, wide
