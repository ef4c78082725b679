"""Named model shapes as their publishers' config.json gives them, for random weights and for `jaxpaged plan`."""

from __future__ import annotations

from typing import Any


def _llama(layers: int, dim: int, ffn: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    } | more


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(2, 64, 96, 4, 2, vocab_size=128, tie_word_embeddings=True, max_position_embeddings=512),
    "smollm2-135m": _llama(
        30, 576, 1536, 9, 3, vocab_size=49152, rope_theta=1e5, tie_word_embeddings=True, max_position_embeddings=8192
    ),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 8, head_dim=128, tie_word_embeddings=True),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 8),
    "qwen3-0.6b": _llama(
        28,
        1024,
        3072,
        16,
        8,
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=128,
        vocab_size=151936,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        attention_bias=False,
    ),
    "mixtral-8x7b": _llama(
        32,
        4096,
        14336,
        32,
        8,
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        rope_theta=1e6,
        max_position_embeddings=32768,
    ),
    "qwen3-30b-a3b": _llama(
        48,
        2048,
        6144,
        32,
        4,
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        vocab_size=151936,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        attention_bias=False,
    ),
}
