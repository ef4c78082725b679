"""What llama.cpp did to a Hugging Face checkpoint when it wrote the GGUF file, undone: config, names and numbers.

An `Architecture` is a table of names, a function that makes the config from the metadata, and, where the writer changed
the numbers themselves, how each such tensor is changed back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.convert.gguf_reader import GgufFile, shortest
from jaxpaged.convert.stored_tensor import Array, StoredTensor, Undo
from jaxpaged.errors import CheckpointError

Config = dict[str, Any]

NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


_CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


class Facts:
    """The metadata of one architecture by short key, and the tensors that tell what the metadata leaves out."""

    def __init__(self, path: object, file: GgufFile):
        self.path, self.metadata, self.tensors = path, file.metadata, file.tensors
        self.architecture = str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """`llama.block_count` for `block_count`; the default where the file does not say."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, (list, str)) and not isinstance(default, str):
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {str(value)[:60]}, expected a number")
        return value

    def need(self, key: str) -> Any:
        """The same, where the model means nothing without it."""
        if (value := self.get(key)) is None:
            raise CheckpointError(f"{self.path} lacks the metadata {self.architecture}.{key}; convert the model again")
        return value

    def count(self, key: str) -> int:
        """A needed number that must be a positive integer: it sizes what we build next."""
        value = self.need(key)
        if type(value) is not int or not 0 < value < 2**31:
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is {value!r}, expected a positive count")
        return value

    def head_dim(self) -> int:
        """The head's size where no key gives it: the width shared out among the heads."""
        width, heads = self.count("embedding_length"), self.count("attention.head_count")
        if width % heads:
            raise CheckpointError(
                f"{self.path} says that {heads} heads share a width of {width}; convert the model again"
            )
        return width // heads

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor of this GGUF name."""
        return tensor in self.tensors

    def factors(self, tensor: str) -> list[float]:
        """One divisor per rotary frequency."""
        return [shortest(x) for x in self.tensors[tensor].read().astype(np.float32).ravel()]


class Architecture(NamedTuple):
    """`names`: GGUF module -> HF module, `{i}` for the layer; `undo(name, config)`: how a tensor's numbers go back."""

    names: Mapping[str, str]
    config: Callable[[Facts], Config]
    undo: Callable[[str, Config], Undo | None] = lambda name, config: None


def gguf_config(path: object, file: GgufFile) -> Config:
    """An HF config.json for the file. Raises CheckpointError where the architecture is unknown."""
    facts = Facts(path, file)
    architecture = ARCHITECTURES.get(facts.architecture)
    if architecture is None:
        raise CheckpointError(
            f"{path} has architecture {facts.architecture!r}; the GGUF architectures we read are "
            + ", ".join(sorted(ARCHITECTURES))
        )
    if not facts.has("token_embd.weight") or len(facts.tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{path} holds no matrix token_embd.weight; it is no complete language model")
    if facts.get("expert_count", 0) and not any("{e}" in theirs for theirs in architecture.names.values()):
        raise CheckpointError(
            f"{path} has {facts.count('expert_count')} experts; mixtures that we read are "
            + ", ".join(sorted(k for k, a in ARCHITECTURES.items() if any("{e}" in v for v in a.names.values())))
        )
    config = _common(facts) | architecture.config(facts)
    return config | {"architectures": [_CLASSES[config["model_type"]]]}


def gguf_tensors(path: object, file: GgufFile, config: Config) -> dict[str, StoredTensor]:
    """The file's tensors under their HF names, with the numbers HF has. A name not in the table stays as it is."""
    architecture = ARCHITECTURES[str(file.metadata["general.architecture"])]
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        if name in NOT_WEIGHTS:
            continue
        undo, theirs = architecture.undo(name, config), _hf_name(name, architecture.names)
        if "{e}" in theirs:
            tensors |= {theirs.replace("{e}", str(e)): expert for e, expert in enumerate(_experts(tensor))}
        elif name.endswith(".ffn_gate_inp_shexp.weight"):  # a matrix of one row, which the writer took for a vector
            tensors[theirs] = tensor._replace(shape=(1, *tensor.shape[-1:]))
        else:
            tensors[theirs] = _undone(tensor, undo, path, name) if undo else tensor
    return tensors


def _experts(tensor: StoredTensor) -> list[StoredTensor]:
    """The experts' tensors that lie in one, one after another."""
    count, *shape = tensor.shape
    each = tensor.nbytes // count
    return [tensor._replace(offset=tensor.offset + i * each, nbytes=each, shape=tuple(shape)) for i in range(count)]


def _hf_name(name: str, names: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    if layer:
        theirs = names.get(f"blk.{{i}}.{layer[2]}")
        return f"{theirs.replace('{i}', layer[1])}.{kind}" if theirs else name
    return f"{names[module]}.{kind}" if module in names else name


def _undone(tensor: StoredTensor, undo: Undo, path: object, name: str) -> StoredTensor:
    try:  # what shape comes out is found on an array of that shape without memory
        shape = undo.of(np.broadcast_to(np.float32(0), tensor.shape)).shape
    except ValueError as error:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(tensor.shape)}, against its metadata"
        ) from error
    return tensor._replace(shape=shape, undo=undo)


def _common(facts: Facts) -> Config:
    """What every architecture has, in llama's words."""
    heads, width = facts.count("attention.head_count"), facts.count("embedding_length")
    token = {
        f"{kind}_token_id": facts.metadata.get(f"tokenizer.ggml.{name}_token_id")
        for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return token | {
        "vocab_size": facts.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": facts.count("feed_forward_length"),
        "num_hidden_layers": facts.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("attention.head_count_kv", heads),
        "max_position_embeddings": facts.count("context_length"),
        "tie_word_embeddings": not facts.has("output.weight"),
    }


def _rms(facts: Facts) -> Config:
    """What the llama-like architectures share."""
    return {
        "head_dim": facts.get("attention.key_length") or facts.get("rope.dimension_count") or facts.head_dim(),
        "rms_norm_eps": facts.need("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": facts.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(facts),
        "attention_bias": facts.has("blk.0.attn_q.bias"),
    }


def _rope_scaling(facts: Facts) -> Config | None:
    if facts.has("rope_freqs.weight"):
        # Llama 3's scaling, written out as one divisor per frequency. The formula's parameters are gone, but longrope
        # with these divisors and no other change is the same function.
        factors, length = facts.factors("rope_freqs.weight"), facts.count("context_length")
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        }
    kind = facts.get("rope.scaling.type", "none")
    factor = facts.get("rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "longrope" and not facts.has("rope_factors_long.weight")):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        # llama.cpp's attn_factor multiplies what the paper's formula gives, HF's attention_factor replaces it.
        own = facts.get("rope.scaling.yarn_attn_factor", facts.get("rope.scaling.attn_factor", 1.0))
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": facts.count("rope.scaling.original_context_length"),
            "attention_factor": own * (0.1 * math.log(max(factor, 1.0)) + 1.0),
            "beta_fast": facts.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": facts.get("rope.scaling.yarn_beta_slow", 1.0),
        }
    raise CheckpointError(f"{facts.path} has rope scaling {kind!r}; those we read are linear, yarn and none")


def _experts_of(facts: Facts, count: str) -> Config:
    return {count: facts.count("expert_count"), "num_experts_per_tok": facts.count("expert_used_count")}


def _llama(facts: Facts) -> Config:
    if facts.get("expert_count", 0):
        return _rms(facts) | _experts_of(facts, "num_local_experts") | {"model_type": "mixtral", "sliding_window": None}
    window = facts.get("attention.sliding_window")
    kind = {"model_type": "mistral", "sliding_window": window} if window else {"model_type": "llama"}
    return _rms(facts) | kind | {"mlp_bias": facts.has("blk.0.ffn_up.bias")}


def _qwen(model_type: str) -> Callable[[Facts], Config]:
    return lambda facts: _rms(facts) | {"model_type": model_type, "use_sliding_window": False}


def _qwen_moe(model_type: str, *, renormalizes: bool) -> Callable[[Facts], Config]:
    def config(facts: Facts) -> Config:
        shared = facts.get("expert_shared_feed_forward_length")
        return (
            _qwen(model_type)(facts)
            | _experts_of(facts, "num_experts")
            | {
                "moe_intermediate_size": facts.count("expert_feed_forward_length"),
                "norm_topk_prob": facts.get("expert_weights_norm", renormalizes),
                "qkv_bias": facts.has("blk.0.attn_q.bias"),
            }
            | ({"shared_expert_intermediate_size": shared} if shared else {})
        )

    return config


def _olmoe(facts: Facts) -> Config:
    return _rms(facts) | _experts_of(facts, "num_experts") | {"model_type": "olmoe", "norm_topk_prob": False}


def _smollm3(facts: Facts) -> Config:
    layers = facts.count("block_count")
    # llama.cpp leaves every fourth layer without rope and writes no key for it.
    rope = [int((i + 1) % 4 != 0) for i in range(layers)]
    return _rms(facts) | {"model_type": "smollm3", "no_rope_layers": rope, "use_sliding_window": False}


def _gemma(facts: Facts) -> Config:
    act = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return _rms(facts) | act | {"model_type": "gemma", "tie_word_embeddings": True}


def _gemma2(facts: Facts) -> Config:
    return _gemma(facts) | {
        "model_type": "gemma2",
        "sliding_window": facts.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(facts, period=2),
        "query_pre_attn_scalar": _gemma_scale_dim(facts, layers_of_27b=46),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.get("final_logit_softcapping", 30.0),
    }


def _gemma3(facts: Facts) -> Config:
    return _gemma(facts) | {
        "model_type": "gemma3_text",
        "sliding_window": facts.need("attention.sliding_window"),
        "layer_types": _layer_types(facts, period=6),
        "query_pre_attn_scalar": _gemma_scale_dim(facts, layers_of_27b=62),
        "rope_theta": facts.get("rope.freq_base", 1e6),
        "rope_local_base_freq": facts.get("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
        "use_bidirectional_attention": False,
    }


def _layer_types(facts: Facts, period: int) -> list[str]:
    layers = range(facts.count("block_count"))
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in layers]


def _gemma_scale_dim(facts: Facts, layers_of_27b: int) -> int:
    """Scores are divided by the root of this: the head's size, but for the 27B models. GGUF has no key; depth tells."""
    if facts.count("block_count") == layers_of_27b:
        return facts.head_dim()
    return int(_rms(facts)["head_dim"])


def _phi3(facts: Facts) -> Config:
    width = facts.head_dim()
    config = _rms(facts) | {
        "model_type": "phi3",
        "head_dim": width,
        "partial_rotary_factor": facts.get("rope.dimension_count", width) / width,
        "sliding_window": facts.get("attention.sliding_window") or None,
        "original_max_position_embeddings": facts.get("rope.scaling.original_context_length")
        or facts.count("context_length"),
    }
    if facts.has("rope_factors_long.weight") and facts.has("rope_factors_short.weight"):
        long, short = facts.factors("rope_factors_long.weight"), facts.factors("rope_factors_short.weight")
        config["rope_scaling"] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    return config


def _phi2(facts: Facts) -> Config:
    return {
        "model_type": "phi",
        "layer_norm_eps": facts.need("attention.layer_norm_epsilon"),
        "hidden_act": "gelu_new",
        "partial_rotary_factor": facts.count("rope.dimension_count") / facts.head_dim(),
        "rope_theta": facts.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(facts),
        "qk_layernorm": False,
    }


def _gpt2(facts: Facts) -> Config:
    return {
        "model_type": "gpt2",
        "n_embd": facts.count("embedding_length"),
        "n_layer": facts.count("block_count"),
        "n_head": facts.count("attention.head_count"),
        "n_inner": facts.count("feed_forward_length"),
        "n_positions": facts.count("context_length"),
        "n_ctx": facts.count("context_length"),
        "layer_norm_epsilon": facts.need("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,  # llama.cpp writes the head again, as a copy
    }


def _gpt_neox(facts: Facts) -> Config:
    return {
        "model_type": "gpt_neox",
        "layer_norm_eps": facts.need("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "rotary_pct": facts.count("rope.dimension_count") / facts.head_dim(),
        "rotary_emb_base": facts.get("rope.freq_base", 10000.0),
        "rope_theta": facts.get("rope.freq_base", 10000.0),
        "use_parallel_residual": facts.get("use_parallel_residual", True),
        "attention_bias": True,
    }


def _pairs_to_halves(heads: int) -> Undo:
    """llama.cpp turns neighbouring pairs and reorders q's and k's rows for that; HF turns halves."""

    def undo(w: Array) -> Array:
        rows = w.reshape(heads, -1, 2, *w.shape[1:])  # [H, D/2, 2, ...]
        return rows.swapaxes(1, 2).reshape(w.shape)

    return Undo(rows=undo)


def _undo_llama(name: str, config: Config) -> Undo | None:
    part = name.split(".")[-2]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return _pairs_to_halves(heads[part]) if name.startswith("blk.") and part in heads else None


def _undo_gemma(name: str, config: Config) -> Undo | None:
    """GGUF holds the weight that multiplies, HF that weight less one."""
    return Undo(numbers=lambda w: w - np.asarray(1, w.dtype)) if name.endswith("norm.weight") else None


def _undo_gpt2(name: str, config: Config) -> Undo | None:
    """HF's Conv1D holds [in, out]; GGUF has [out, in] everywhere."""
    linears = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return Undo(turned=True) if name.endswith(linears) else None


def _undo_gpt_neox(name: str, config: Config) -> Undo | None:
    """GGUF holds all heads of q, then k, then v; HF a head's q, k and v side by side."""
    heads = config["num_attention_heads"]

    def undo(w: Array) -> Array:
        parts = w.reshape(3, heads, -1, *w.shape[1:])  # [3, H, D, ...]
        return parts.swapaxes(0, 1).reshape(w.shape)

    return Undo(rows=undo) if ".attn_qkv." in name else None


def _layers(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.{{i}}.{ours}": f"{prefix}.{{i}}.{theirs}" for ours, theirs in names.items()}


_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
} | _layers(
    "model.layers",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
_MIXTRAL = _LLAMA | _layers(
    "model.layers",
    {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    },
)
_QWEN_MOE = _LLAMA | _layers(
    "model.layers",
    {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
        "ffn_up_exps": "mlp.experts.{e}.up_proj",
        "ffn_down_exps": "mlp.experts.{e}.down_proj",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
)
_GEMMA2 = _LLAMA | _layers(
    "model.layers",
    {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
_PHI3 = _LLAMA | _layers("model.layers", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"})
_PHI2 = _LLAMA | {"output_norm": "model.final_layernorm"}
_PHI2 |= _layers("model.layers", {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"})
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _layers(
    "transformer.h",
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
_GPT_NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
} | _layers(
    "gpt_neox.layers",
    {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_MIXTRAL, _llama, _undo_llama),
    "olmoe": Architecture(_QWEN_MOE, _olmoe),
    "qwen2": Architecture(_LLAMA, _qwen("qwen2")),
    "qwen2moe": Architecture(_QWEN_MOE, _qwen_moe("qwen2_moe", renormalizes=False)),
    "qwen3": Architecture(_LLAMA, _qwen("qwen3")),
    "qwen3moe": Architecture(_QWEN_MOE, _qwen_moe("qwen3_moe", renormalizes=True)),
    "smollm3": Architecture(_LLAMA, _smollm3, _undo_llama),
    "gemma": Architecture(_LLAMA, _gemma, _undo_gemma),
    "gemma2": Architecture(_GEMMA2, _gemma2, _undo_gemma),
    "gemma3": Architecture(_GEMMA2, _gemma3, _undo_gemma),
    "phi3": Architecture(_PHI3, _phi3),
    "phi2": Architecture(_PHI2, _phi2),
    "gpt2": Architecture(_GPT2, _gpt2, _undo_gpt2),
    "gptneox": Architecture(_GPT_NEOX, _gpt_neox, _undo_gpt_neox),
}
