"""Tiny models of every family and variant: config.json as found in the wild, weights made up by name, and what
transformers says of them.

A weight depends on its HF name and shape only, so a checkpoint is the same wherever it is made, with torch or without,
and the stored references of `tests/golden/` need not hold it.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 97
NUM_GENERATED = 8
SEQUENCE_LEN = 24


@dataclass(frozen=True)
class Case:
    """One tiny model: what its config.json says."""

    name: str
    config: Mapping[str, Any]
    prompt_lens: tuple[int, ...]

    def tokens(self) -> np.ndarray:
        """The sequence whose logits are compared; no zeros, which several families take for padding."""
        return np.random.RandomState(0).randint(1, VOCAB, SEQUENCE_LEN).astype(np.int32)

    def prompts(self) -> list[list[int]]:
        """Prompts of several lengths: around a window of 5, and past the 16 positions that scaled ropes begin with."""
        rng = np.random.RandomState(1)
        return [rng.randint(1, VOCAB, n).tolist() for n in self.prompt_lens]


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64} | {
    f"{name}_token_id": None for name in ("bos", "eos", "pad")
}
OPT_SHAPE = {k: v for k, v in SHAPE.items() if k not in ("intermediate_size", "num_key_value_heads")} | {
    "ffn_dim": 40,
    "pad_token_id": 1,
}
NEOX_SHAPE = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
MOE_SHAPE = SHAPE | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
DEEPSEEK_SHAPE = {k: v for k, v in MOE_SHAPE.items() if k != "num_experts"} | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.0], "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0]}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}


def _case(
    name: str, model_type: str, shape: Mapping[str, Any], prompt_lens: tuple[int, ...] = (3, 8, 17), **fields: Any
) -> Case:
    return Case(name, {"model_type": model_type, **shape, **fields}, prompt_lens)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _case("llama", "llama", SHAPE, rope_theta=500.0, rms_norm_eps=1e-5),
        _case(
            "llama_9_heads_3_kv_head_dim_24",
            "llama",
            SHAPE | {"hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3},
            head_dim=24,
        ),
        _case("llama_biases_tied", "llama", SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        _case("llama_linear", "llama", SHAPE, rope_scaling={"type": "linear", "factor": 4.0}),
        _case(
            "llama_dynamic",
            "llama",
            SHAPE | {"max_position_embeddings": 16},
            prompt_lens=(3, 12, 17),
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 300.0},
        ),
        _case("llama_llama3", "llama", SHAPE, rope_theta=500.0, rope_scaling={"rope_type": "llama3", **LLAMA3}),
        _case(
            "llama_yarn",
            "llama",
            SHAPE,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4,
            },
        ),
        _case(
            "llama_yarn_attention_factor",
            "llama",
            SHAPE,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 800.0,
                "factor": 3.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.7,
                "beta_fast": 3.0,
                "beta_slow": 0.5,
                "truncate": False,
            },
        ),
        _case(
            "llama_yarn_mscale_no_kv_heads",
            "llama",
            {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"},
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.5,
                "mscale_all_dim": 0.5,
            },
        ),
        _case("mistral", "mistral", SHAPE, sliding_window=5, head_dim=16),
        _case("qwen2", "qwen2", SHAPE, sliding_window=5, use_sliding_window=False, tie_word_embeddings=True),
        _case(
            "qwen2_max_window_layers",
            "qwen2",
            SHAPE | {"num_hidden_layers": 3},
            sliding_window=5,
            use_sliding_window=True,
            max_window_layers=2,
        ),
        _case(
            "qwen2_layer_types",
            "qwen2",
            SHAPE,
            sliding_window=5,
            use_sliding_window=True,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _case("qwen3", "qwen3", SHAPE, head_dim=24, rope_theta=1000.0),
        _case(
            "mixtral", "mixtral", SHAPE, num_local_experts=6, num_experts_per_tok=2, sliding_window=5, rope_theta=1000.0
        ),
        _case(
            "qwen2_moe",
            "qwen2_moe",
            MOE_SHAPE | {"num_hidden_layers": 4},
            shared_expert_intermediate_size=36,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=3,
        ),
        _case(
            "qwen3_moe",
            "qwen3_moe",
            MOE_SHAPE,
            head_dim=24,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            use_sliding_window=True,
            sliding_window=5,
        ),
        _case(
            "olmoe",
            "olmoe",
            {k: v for k, v in MOE_SHAPE.items() if k != "moe_intermediate_size"},
            clip_qkv=None,
            norm_topk_prob=False,
        ),
        _case("deepseek_v2_lite", "deepseek_v2", DEEPSEEK_SHAPE, q_lora_rank=None, mlp_bias=True, rope_theta=100.0),
        _case(
            "deepseek_v2",
            "deepseek_v2",
            DEEPSEEK_SHAPE,
            q_lora_rank=16,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            attention_bias=True,
            rms_norm_eps=1e-3,
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4,
                "mscale": 0.7,
                "mscale_all_dim": 1.9,
            },
        ),
        _case(
            "deepseek_v3",
            "deepseek_v3",
            DEEPSEEK_SHAPE,
            q_lora_rank=16,
            n_group=4,
            topk_group=2,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        ),
        _case(
            "deepseek_v3_halves",
            "deepseek_v3",
            DEEPSEEK_SHAPE | {"n_shared_experts": 1},
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            rope_interleave=False,
            rope_theta=100.0,
        ),
        _case("gemma", "gemma", SHAPE | {"num_key_value_heads": 1}, head_dim=16, hidden_act="gelu"),
        _case(
            "gemma2",
            "gemma2",
            SHAPE,
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=20,
            tie_word_embeddings=False,
            **SOFTCAPS,
        ),
        _case(
            "gemma3",
            "gemma3_text",
            SHAPE | {"num_hidden_layers": 3},
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=20,
            sliding_window_pattern=3,
            rope_theta=2000.0,
            rope_local_base_freq=50.0,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
        ),
        _case(
            "gemma3_rope_per_layer_type",
            "gemma3_text",
            SHAPE,
            head_dim=16,
            sliding_window=5,
            query_pre_attn_scalar=16,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            **SOFTCAPS,
        ),
        _case("phi", "phi", SHAPE, rope_theta=100.0),
        _case("phi_qk_layernorm", "phi", SHAPE, qk_layernorm=True, partial_rotary_factor=0.4, hidden_act="gelu"),
        _case("phi3", "phi3", SHAPE, sliding_window=5),
        _case(
            "phi3_longrope",
            "phi3",
            SHAPE,
            original_max_position_embeddings=16,
            rope_scaling={"type": "longrope", **LONG},
        ),
        _case(
            "phi3_longrope_partial",
            "phi3",
            SHAPE | {"hidden_size": 64},
            original_max_position_embeddings=16,
            partial_rotary_factor=0.75,
            rope_parameters={"rope_type": "longrope", "rope_theta": 300.0, "attention_factor": 1.4, **LONG},
            tie_word_embeddings=True,
        ),
        _case(
            "phi3_longrope_outgrown",  # generation passes the 16 positions, and transformers computes all anew
            "phi3",
            SHAPE,
            prompt_lens=(12, 15),
            original_max_position_embeddings=16,
            rope_scaling={"type": "longrope", **LONG},
        ),
        _case("gpt2", "gpt2", GPT2_SHAPE),
        _case(
            "gpt2_scaled_by_layer_untied",
            "gpt2",
            GPT2_SHAPE,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            n_inner=40,
            tie_word_embeddings=False,
        ),
        _case("opt", "opt", OPT_SHAPE),
        _case("opt_350m", "opt", OPT_SHAPE, do_layer_norm_before=False, word_embed_proj_dim=32),
        _case("opt_no_bias_no_final_norm", "opt", OPT_SHAPE, enable_bias=False, _remove_final_layer_norm=True),
        _case("gpt_neox", "gpt_neox", NEOX_SHAPE, rotary_pct=0.5, rotary_emb_base=100.0),
        _case(
            "gpt_neox_serial",
            "gpt_neox",
            NEOX_SHAPE,
            use_parallel_residual=False,
            attention_bias=False,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        ),
        _case("smollm3", "smollm3", SHAPE | {"num_hidden_layers": 3}, no_rope_layers=[1, 0, 1], rope_theta=100.0),
        _case(
            "smollm3_interval_windows",
            "smollm3",
            SHAPE,
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=5,
            tie_word_embeddings=False,
        ),
    )
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that HF name: normal numbers, large enough for attention to be sharp; a norm's weights around 1."""
    rng = np.random.RandomState(zlib.crc32(f"{name} {shape}".encode()))
    deviation = 0.3 if len(shape) == 2 else 0.2
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return rng.normal(mean, deviation, math.prod(shape)).reshape(shape).astype(np.float32)


def write_checkpoint(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """An HF directory with that config and made-up tensors of those names and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(
        {name: weight(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def transformers_reference(folder: Path, case: Case) -> dict[str, np.ndarray]:
    """What transformers makes of a checkpoint: logits of the case's sequence, and of greedy generation one by one.

    Raises AssertionError where it misses a tensor, or finds one that it does not know.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # several would wait for one another longer than they compute
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, f"transformers does not take {case.name}: {problems}"
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        # A fresh model for each: a dynamic rope remembers the longest sequence it has seen.
        logits = copy.deepcopy(model)(torch.tensor(case.tokens()[None].astype(np.int64)), use_cache=False).logits[0]
        arrays = {"logits": logits.numpy()}
        for i, prompt in enumerate(case.prompts()):
            ids = torch.tensor([prompt])
            out = copy.deepcopy(model).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_GENERATED,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            arrays[f"ids_{i}"] = out.sequences[0, len(prompt) :].numpy().astype(np.int32)
            arrays[f"logits_{i}"] = torch.stack(out.logits)[:, 0].numpy()
    return arrays
