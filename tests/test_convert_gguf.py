"""GGUF as llama.cpp writes it, made from tiny Hugging Face models: the same spec and tensors must come back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from real_model import smollm2_gguf
from tiny_models import CASES, NEOX_SHAPE, SHAPE, SOFTCAPS, weight

from jaxpaged.convert.__main__ import convert
from jaxpaged.convert.checkpoint import open_checkpoint
from jaxpaged.convert.families import family_of
from jaxpaged.convert.load import load, recipe_for
from jaxpaged.convert.rules import hf_shapes
from jaxpaged.engine.tokenizer import load_tokenizer
from jaxpaged.model.decoder import apply
from jaxpaged.model.rope import rope_table

DEEP = SHAPE | {"num_hidden_layers": 7}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5}


# What GGUF can say of the families; where a family's own case asks for more, a case of ours stands here.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(CASES["llama"].config)),
    "llama_biases_tied": ("llama", dict(CASES["llama_biases_tied"].config)),
    "llama_heads": ("llama", dict(CASES["llama_9_heads_3_kv_head_dim_24"].config)),
    "llama_linear": ("llama", dict(CASES["llama_linear"].config)),
    "llama_yarn": ("llama", dict(CASES["llama_yarn"].config)),
    "mistral": ("llama", dict(CASES["mistral"].config)),
    "qwen2": ("qwen2", dict(CASES["qwen2"].config)),
    "qwen3": ("qwen3", dict(CASES["qwen3"].config)),
    "mixtral": ("llama", dict(CASES["mixtral"].config, sliding_window=None, rms_norm_eps=1e-5)),
    "olmoe": ("olmoe", dict(CASES["olmoe"].config, rms_norm_eps=1e-5)),
    "qwen2_moe": (
        "qwen2moe",
        dict(CASES["qwen2_moe"].config, decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False),
    ),
    "qwen3_moe": ("qwen3moe", dict(CASES["qwen3_moe"].config, mlp_only_layers=[], use_sliding_window=False)),
    "gemma": ("gemma", dict(CASES["gemma"].config)),
    "gemma2": ("gemma2", dict(DEEP, model_type="gemma2", **GEMMA, **SOFTCAPS)),
    "gemma3": ("gemma3", dict(DEEP, model_type="gemma3_text", **GEMMA, rope_theta=2000.0, rope_local_base_freq=50.0)),
    "gemma3_linear": (
        "gemma3",
        dict(
            DEEP, model_type="gemma3_text", **GEMMA, rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 8.0}
        ),
    ),
    "phi": ("phi2", dict(CASES["phi"].config)),
    "phi3": ("phi3", dict(CASES["phi3"].config)),
    "phi3_longrope": ("phi3", dict(CASES["phi3_longrope"].config)),
    "gpt2": ("gpt2", dict(CASES["gpt2"].config)),
    "gpt_neox": ("gptneox", dict(NEOX_SHAPE, model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=100.0)),
    "gpt_neox_serial": (
        "gptneox",
        dict(NEOX_SHAPE, model_type="gpt_neox", rotary_pct=1.0, use_parallel_residual=False),
    ),
    "smollm3": ("smollm3", dict(DEEP, model_type="smollm3", rope_theta=100.0, no_rope_layer_interval=4)),
}


def tensors_of(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    family = family_of(config)
    spec = family.spec(config)
    return {name: weight(name, shape) for name, shape in hf_shapes(family.rules(spec, ()), spec).items()}


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """Halves of a head's rows become neighbours."""
    first, second = np.split(w.reshape(heads, -1, *w.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(w.shape)


def split_heads(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows by head, then q, k, v -> all of q, all of k, all of v."""
    by_head = w.reshape(heads, 3, -1, *w.shape[1:])
    return np.concatenate([by_head[:, part].reshape(-1, *w.shape[1:]) for part in range(3)])


def with_experts_together(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All experts' tensors as one, in which the name has no expert's number."""
    whole: dict[str, Any] = {}
    for name, w in tensors.items():
        together = re.sub(r"(\.experts)\.\d+\.", r"\1.", name)
        whole[together] = w if together == name else [*whole.get(together, []), w]
    return {name: np.stack(w) if isinstance(w, list) else w for name, w in whole.items()}


def as_llama_cpp(architecture: str, config: Mapping[str, Any], name: str, w: np.ndarray) -> np.ndarray:
    """The numbers that llama.cpp's converter writes for an HF tensor."""
    heads = config.get("num_attention_heads", 0)
    if name.endswith("shared_expert_gate.weight"):
        return w.squeeze()
    if architecture in ("llama", "smollm3") and ".q_proj." in name:
        return permuted(w, heads)
    if architecture in ("llama", "smollm3") and ".k_proj." in name:
        return permuted(w, config.get("num_key_value_heads", heads))
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return w + 1
    if architecture == "gpt2" and w.ndim == 2 and ".h." in name:
        return w.T
    if architecture == "gptneox" and ".query_key_value." in name:
        return split_heads(w, heads)
    return w


def metadata_of(architecture: str, c: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for an HF config."""
    heads = c.get("num_attention_heads") or c["n_head"]
    width = c.get("hidden_size") or c["n_embd"]
    head_dim = c.get("head_dim") or width // heads
    rope_scaling = c.get("rope_scaling") or {}
    kind = rope_scaling.get("rope_type", rope_scaling.get("type"))
    rotated = {"phi2": 0.5, "gptneox": c.get("rotary_pct", 0.25)}.get(architecture, 1.0)
    metadata = {
        "block_count": c.get("num_hidden_layers") or c["n_layer"],
        "vocab_size": c["vocab_size"],
        "context_length": c.get("max_position_embeddings") or c["n_positions"],
        "embedding_length": width,
        "feed_forward_length": c.get("intermediate_size") or 4 * width,
        "attention.head_count": heads,
        "attention.head_count_kv": c.get("num_key_value_heads", heads),
        "rope.dimension_count": int(head_dim * rotated),
        "rope.freq_base": float(c.get("rope_theta", c.get("rotary_emb_base", 10000.0))),
        "attention.sliding_window": c.get("sliding_window") if c.get("use_sliding_window", True) else None,
        "rope.freq_base_swa": c.get("rope_local_base_freq"),
        "expert_count": c.get("num_experts") or c.get("num_local_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "rope.scaling.original_context_length": c.get("original_max_position_embeddings")
        or rope_scaling.get("original_max_position_embeddings"),
    }
    if architecture in ("phi2", "gpt2", "gptneox"):
        metadata["attention.layer_norm_epsilon"] = 1e-5
    else:
        metadata["attention.layer_norm_rms_epsilon"] = float(
            c.get("rms_norm_eps", 1e-5 if architecture == "phi3" else 1e-6)
        )
    if "head_dim" in c:
        metadata["attention.key_length"] = metadata["attention.value_length"] = head_dim
    if architecture == "gptneox":
        metadata["use_parallel_residual"] = c.get("use_parallel_residual", True)
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope_scaling["factor"])}
        metadata["rope.scaling.yarn_beta_fast"] = float(rope_scaling["beta_fast"]) if kind == "yarn" else None
    return {key: value for key, value in metadata.items() if value is not None}


def write_gguf(path: Path, architecture: str, config: Mapping[str, Any], extra: Mapping[str, np.ndarray] = {}) -> Path:
    """What llama.cpp would write of an HF checkpoint; names come from gguf's own map."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata_of(architecture, config).items():
        add: Callable[[str, Any], None] = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            bool: writer.add_bool,
        }[type(value)]
        add(f"{architecture}.{key}", value)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 8)
    tensors = {}
    for name, w in with_experts_together(tensors_of(config)).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensors[theirs] = as_llama_cpp(architecture, config, name, w)
    for part in ("long", "short"):
        if factors := (config.get("rope_scaling") or {}).get(f"{part}_factor"):
            tensors[f"rope_factors_{part}.weight"] = np.asarray(factors, np.float32)
    for name, w in (tensors | dict(extra)).items():
        writer.add_tensor(name, np.ascontiguousarray(w, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "config"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_spec_and_tensors_are_those_of_the_hf_checkpoint(
    tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", architecture, config))
    recipe = recipe_for(checkpoint)

    assert recipe.spec == family_of(config).spec(config)
    expected = tensors_of(config)
    assert checkpoint.names == expected.keys()
    for name, w in expected.items():
        np.testing.assert_allclose(checkpoint.read(name), w, rtol=0, atol=2e-7, err_msg=name)


def test_llama3_scaling_comes_back_as_its_divisors(tmp_path: Path) -> None:
    config = dict(CASES["llama_llama3"].config)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    spec = family_of(config).spec(config)
    rope = spec.blocks[0].mixer.rope
    assert rope is not None
    # At position 1 a table's angles are the frequencies themselves.
    one = jnp.ones(1, jnp.int32)
    scaled, plain = (rope_table(r, one, one * 64) for r in (rope, replace(rope, scaling=None)))
    angles = [
        np.arctan2(np.asarray(t.sin, np.float64), np.asarray(t.cos, np.float64)).ravel()[: head_dim // 2]
        for t in (scaled, plain)
    ]
    divisors = angles[1] / angles[0]
    assert divisors.max() > 2

    path = write_gguf(
        tmp_path / "x.gguf",
        "llama",
        config | {"rope_scaling": None},
        {"rope_freqs.weight": divisors.astype(np.float32)},
    )

    found = recipe_for(open_checkpoint(path)).spec.blocks[0].mixer.rope
    assert found is not None
    positions = jnp.arange(64, dtype=jnp.int32)
    lengths = jnp.full(64, 64, jnp.int32)
    np.testing.assert_allclose(
        rope_table(found, positions, lengths).cos, rope_table(rope, positions, lengths).cos, atol=1e-4
    )


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # of others it reads the config in part
def test_transformers_reads_the_same_model_from_gguf(tmp_path: Path, name: str) -> None:
    architecture, config = ARCHITECTURES[name]
    path = write_gguf(tmp_path / "x.gguf", architecture, config)
    done = convert(str(path), tmp_path / "native", verify=True)
    assert done.comparison is not None
    assert done.comparison.max_error < 1e-4


def test_a_gguf_becomes_an_hf_folder(tmp_path: Path) -> None:
    config = dict(CASES["llama"].config)
    source = write_gguf(tmp_path / "x.gguf", "llama", config)
    convert(str(source), tmp_path / "hf", to_hf=True)
    written = open_checkpoint(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    for name, w in tensors_of(config).items():
        np.testing.assert_array_equal(written.read(name), w)


def test_smollm2_converts_with_its_tokenizer(tmp_path: Path) -> None:
    convert(str(smollm2_gguf()), tmp_path / "native", dtype="bfloat16")

    tokenizer = load_tokenizer(tmp_path / "native")
    assert tokenizer is not None
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert tokenizer.eos_token_ids == {2}
    # Computed in float32: the best two tokens are 0.1 apart, less than bfloat16 tells from one another.
    model = load(tmp_path / "native", dtype="float32")
    logits = apply(model.params, jnp.asarray(prompt, jnp.int32), model.spec)
    assert tokenizer.token_text(int(logits[-1].argmax())) == "The"
