"""Tokenizers small enough to read, as GGUF metadata."""

from __future__ import annotations

from typing import Any

from jaxpaged.engine.tokenizer import BYTE_OF_CHARACTER

PIECES = ["▁", "a", "b", "n", "▁a", "an", "▁b", "ana", "▁ban", "▁bana", "<b>"]


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """SentencePiece with byte fallback, as Llama 2 has: 3 controls, 256 bytes, pieces, one of them user-defined."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 1), 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES), 0, -1)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: the 256 bytes, a few merges, one control and one user-defined token."""
    merges = ["a n", "an a", "Ġ b", "Ġb ana", "1 2", "12 3", "4 5"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*BYTE_OF_CHARACTER, *merged, "<|end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 4],
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    } | changes
