"""DeepSeek-V2, V2-Lite, V3 and R1: attention to latents, and experts chosen by groups beside shared ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from jaxpaged.convert.families import llama
from jaxpaged.convert.families.fields import MAX_EXPERTS, MAX_LAYERS, Fields
from jaxpaged.convert.families.rope import max_positions, rope, rope_parameters, yarn_mscale
from jaxpaged.convert.rules import Rule, Table, by_head, each_layer, rules_for
from jaxpaged.model.spec import Block, Decoder, ExpertGroups, LatentAttention, Mlp, Moe, Norm

DEFAULTS = {
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "v_head_dim": 128,
}
V2_DEFAULTS = DEFAULTS | {
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}
V3_DEFAULTS = DEFAULTS | {
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
}

Scoring = Literal["softmax", "sigmoid"]

_LATENT_EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps says

_ATTENTION: Table = {
    "mixer.q": "self_attn.q_proj",
    "mixer.kv_down": "self_attn.kv_a_proj_with_mqa",
    "mixer.kv_norm": "self_attn.kv_a_layernorm",
    "mixer.o": "self_attn.o_proj",
}
_LATENT_QUERIES: Table = {
    "mixer.q_down": "self_attn.q_a_proj",
    "mixer.q_norm": "self_attn.q_a_layernorm",
    "mixer.q": "self_attn.q_b_proj",
}
_EXPERTS: Table = {
    "ffn.router": "mlp.gate",
    "ffn.selection_bias": "mlp.gate.e_score_correction_bias",
    "ffn.experts.gate": "mlp.experts.{e}.gate_proj",
    "ffn.experts.up": "mlp.experts.{e}.up_proj",
    "ffn.experts.down": "mlp.experts.{e}.down_proj",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
}


def v2_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a DeepSeek-V2 config."""
    c = Fields(config, V2_DEFAULTS)
    _expect(c, "scoring_func", "softmax")
    c.refuse("norm_topk_prob", unless=False, why="has weights add up to 1, which no published DeepSeek-V2 does")
    match c.raw("topk_method"):
        case "greedy":
            return _decoder(c, None, interleaved=True, scoring="softmax")
        case "group_limited_greedy":
            return _decoder(c, _groups(c, best_of=1), interleaved=True, scoring="softmax")
    raise c.error("topk_method", "is not supported; known: greedy, group_limited_greedy")


def v3_spec(config: Mapping[str, Any]) -> Decoder:
    """The spec of a DeepSeek-V3 or R1 config. The layers that predict tokens further ahead are left out."""
    c = Fields(config, V3_DEFAULTS)
    _expect(c, "scoring_func", "sigmoid")
    _expect(c, "topk_method", "noaux_tc")
    return _decoder(c, _groups(c, best_of=2), interleaved=c.flag("rope_interleave"), scoring="sigmoid")


def rules(spec: Decoder, names: Collection[str]) -> list[Rule]:
    """HF tensors to our leaves; one layout only, so `names` do not matter."""
    del names
    mixers = [block.mixer for block in spec.blocks if isinstance(block.mixer, LatentAttention)]
    queries: Table = _LATENT_QUERIES if mixers[0].q_rank is not None else {}
    table: Table = {**llama.TABLE, **each_layer("model.layers.{i}.", {**_ATTENTION, **queries, **_EXPERTS})}
    up = [
        by_head(
            (f"layers.{i}.mixer.k_up.w", f"layers.{i}.mixer.v_up.w"),
            f"model.layers.{i}.self_attn.kv_b_proj.weight",
            heads=a.heads,
            sizes=(a.nope_dim, a.v_dim),
            turned=(False, True),
        )
        for i, a in enumerate(mixers)
    ]
    return rules_for(spec, table, up)


def _decoder(c: Fields, groups: ExpertGroups | None, *, interleaved: bool, scoring: Scoring) -> Decoder:
    """A decoder of serial layers, the first ones with an Mlp and the others with experts."""
    norm, dim, act = Norm("rms", c.positive("rms_norm_eps")), c.size("hidden_size"), c.activation("hidden_act")
    mixer, biased = _attention(c, interleaved), c.flag("mlp_bias")
    width = c.size("moe_intermediate_size")
    experts = c.size("n_routed_experts", most=MAX_EXPERTS)
    moe = Moe(
        experts=experts,
        top_k=c.size("num_experts_per_tok", most=experts),
        dim=width,
        act=act,
        renormalize=c.flag("norm_topk_prob"),
        shared=Mlp(c.size("n_shared_experts", most=MAX_EXPERTS) * width, act, bias=biased),
        scoring=scoring,
        selection_bias=scoring == "sigmoid",
        groups=groups,
        scale=c.positive("routed_scaling_factor"),
    )
    if groups is not None and moe.top_k > groups.top_k * experts // groups.count:
        raise c.error("num_experts_per_tok", f"is more than topk_group = {groups.top_k} groups have experts")
    if "moe_layer_freq" in c and c.size("moe_layer_freq") != 1:
        raise c.error("moe_layer_freq", "must be 1: all layers but the first ones have experts")
    count = c.size("num_hidden_layers", most=MAX_LAYERS)
    num_dense = c.size("first_k_dense_replace", least=0)
    dense = Mlp(c.size("intermediate_size"), act, bias=biased)
    return Decoder(
        vocab_size=c.size("vocab_size"),
        dim=dim,
        max_positions=max_positions(c, mixer.rope),
        blocks=tuple(Block(mixer, dense if i < num_dense else moe, norm) for i in range(count)),
        norm=norm,
        embed_dim=dim,
        tied_head=c.flag("tie_word_embeddings"),
    )


def _attention(c: Fields, interleaved: bool) -> LatentAttention:
    heads, nope_dim, rope_dim = c.size("num_attention_heads"), c.size("qk_nope_head_dim"), c.size("qk_rope_head_dim")
    if (kv_heads := c.maybe_size("num_key_value_heads")) not in (None, heads):
        raise c.error("num_key_value_heads", f"must be num_attention_heads = {heads}, found {kv_heads}")
    rotary = rope(c, rope_dim)
    if rotary.dim != rope_dim:
        raise c.error("qk_rope_head_dim", f"is rotated in part ({rotary.dim}), which we do not compute")
    return LatentAttention(
        heads=heads,
        kv_rank=c.size("kv_lora_rank"),
        nope_dim=nope_dim,
        v_dim=c.size("v_head_dim"),
        scale=(nope_dim + rope_dim) ** -0.5 * _mscale(c) ** 2,
        rope=replace(rotary, interleaved=interleaved),
        norm=Norm("rms", _LATENT_EPS),
        q_rank=c.maybe_size("q_lora_rank"),
        bias=c.flag("attention_bias"),
    )


def _mscale(c: Fields) -> float:
    """What queries and keys each are multiplied by for ropes that are scaled: the root of what scores are."""
    p = rope_parameters(c)
    if p.raw("rope_type") == "default" or not p.raw("mscale_all_dim"):
        return 1.0
    return yarn_mscale(p.positive("factor"), p.number("mscale_all_dim"))


def _groups(c: Fields, best_of: int) -> ExpertGroups:
    experts, count = c.size("n_routed_experts", most=MAX_EXPERTS), c.size("n_group")
    if experts % count or experts // count < best_of:
        raise c.error("n_group", f"must cut n_routed_experts = {experts} into equal groups of at least {best_of}")
    return ExpertGroups(count, c.size("topk_group", most=count), best_of)


def _expect(c: Fields, name: str, value: str) -> None:
    if c.raw(name) != value:
        raise c.error(name, f"is not supported; known: {value}")
