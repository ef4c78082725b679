"""A checkpoint folder small enough to chat with in a test: two Llama layers and a byte-level vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import write_checkpoint
from tiny_vocabularies import byte_level_metadata

from jaxpaged.engine.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DIM, FFN, HEADS, HEAD_DIM, LAYERS = 32, 48, 4, 8, 2


def write_chat_model(folder: Path) -> Path:
    """An HF folder: config, weights, tokenizer with a chat template. The end token is beyond what it says by itself."""
    tokenizer = load_tokenizer(byte_level_metadata())
    assert tokenizer is not None
    vocab = tokenizer.vocab_size
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "eos_token_id": vocab - 2,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (vocab, DIM),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HEADS * HEAD_DIM, DIM) for name in "qkv"}
        shapes |= {f"{prefix}.self_attn.o_proj.weight": (DIM, HEADS * HEAD_DIM)}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (FFN, DIM) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (DIM, FFN)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")}
    write_checkpoint(folder, config, shapes)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder
