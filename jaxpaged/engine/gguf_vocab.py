"""The vocabulary inside a GGUF file, from its metadata.

Two kinds exist: byte-level BPE ("gpt2"), where `tokenizer.ggml.pre` names how text is cut before merging, and
SentencePiece BPE ("llama"), whose merges are told by the pieces' scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers

from jaxpaged.engine.vocabulary import CUTS, Merge, Vocabulary, bpe, byte_level_bpe, frame
from jaxpaged.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
LLAMA_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # of a SentencePiece vocabulary that does not name them
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
END_NAMES = ("eos", "eot", "eom")  # end of sequence, of turn, of message


def gguf_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """What the metadata describes. Raises CheckpointError where it describes none we know."""
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            pipeline, add_bos = _byte_level(tokens, metadata)
        case "llama":
            metadata = {f"tokenizer.ggml.{name}_token_id": i for name, i in LLAMA_IDS.items()} | dict(metadata)
            pipeline, add_bos = _sentencepiece(tokens, metadata), True
        case kind:
            raise CheckpointError(f"the GGUF's tokenizer is of kind {kind!r}; known: gpt2, llama")

    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for wanted, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        found = [token for token, given in zip(tokens, types, strict=False) if given == wanted]
        pipeline.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])

    ids = {name: _token_id(name, tokens, metadata) for name in {*NAMES, *END_NAMES}}
    named = {NAMES[name]: tokens[i] for name, i in ids.items() if name in NAMES and i is not None}
    ends = [
        [named[NAMES[name]]] if metadata.get(f"tokenizer.ggml.add_{name}_token", add) and NAMES[name] in named else []
        for name, add in (("bos", add_bos), ("eos", False))
    ]
    frame(pipeline, *ends)
    eos_token_ids = frozenset(i for name in END_NAMES if (i := ids[name]) is not None)
    return Vocabulary(pipeline, eos_token_ids, metadata.get("tokenizer.chat_template"), named)


def _token_id(name: str, tokens: Sequence[str], metadata: Mapping[str, Any]) -> int | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise CheckpointError(f"the GGUF's {name} token is {token_id:,} but its vocabulary has {len(tokens):,} tokens")
    return token_id


def _byte_level(tokens: Sequence[str], metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in CUTS:
        raise CheckpointError(f"the GGUF's pre-tokenizer is {name!r}; known: {', '.join(CUTS)}")
    merges: list[Merge] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    return byte_level_bpe(vocab, merges, CUTS[name]), CUTS[name].add_bos


def _sentencepiece(tokens: Sequence[str], metadata: Mapping[str, Any]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(
            f"the GGUF's tokenizer has {len(tokens):,} tokens but {len(scores or ()):,} scores; convert the file again"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = _token_id("unknown", tokens, metadata) or 0
    pipeline = bpe(vocab, _merges_by_score(vocab, scores), byte_fallback=True, unk_token=tokens[unknown], fuse_unk=True)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return pipeline


def _merges_by_score(vocab: Mapping[str, int], scores: Sequence[float]) -> list[Merge]:
    """Every way to make a piece of two others, the best-scored piece first: what SentencePiece does at run time."""
    merges = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[i], vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    values = metadata.get(key)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"the GGUF's metadata has no list of strings {key}; its tokenizer cannot be built")
    return values
