"""The tokenizer inside a GGUF file: its metadata rebuilt as a `tokenizers` pipeline.

Two kinds exist: byte-level BPE ("gpt2"), where `tokenizer.ggml.pre` names how text is cut before merging, and
SentencePiece BPE ("llama"), whose merges are told by the pieces' scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxpaged.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type


class Cut(NamedTuple):
    """How text is cut into words before BPE: one split after the other, each inside the pieces of the last."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%s"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_gpt2 = Cut((_GPT2,))
_digit_gpt2 = Cut((r"\p{N}", _GPT2))
_llama3 = Cut((_WORDS % r"\p{N}{1,3}",), ignore_merges=True, add_bos=True)
_qwen2 = Cut((_WORDS % r"\p{N}",), nfc=True)
_tekken = Cut((_CASED_WORDS % ("", "") + r"|\p{N}|" + _PUNCTUATION,), ignore_merges=True, add_bos=True)
_gpt4o = Cut((_CASED_WORDS % (_CONTRACTION, _CONTRACTION) + r"|\p{N}{1,3}|" + _PUNCTUATION,))

CUTS: dict[str, Cut] = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "olmo": _gpt2,
    "smollm": _digit_gpt2,
    "starcoder": _digit_gpt2,
    "llama-bpe": _llama3,
    "smaug-bpe": Cut((_WORDS % r"\p{N}{1,3}",)),
    "dbrx": Cut((_WORDS % r"\p{N}{1,3}",)),
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "tekken": _tekken,
    "gpt-4o": _gpt4o,
}
"""By `tokenizer.ggml.pre`."""


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The pipeline that a GGUF's metadata describes. Raises CheckpointError where it describes none we know."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    match kind:
        case "gpt2":
            pipeline, add_bos = _byte_level(tokens, metadata)
        case "llama":
            pipeline, add_bos = _sentencepiece(tokens, metadata), True
        case _:
            raise CheckpointError(f"the GGUF's tokenizer is of kind {kind!r}; known: gpt2, llama")

    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, given in zip(tokens, types, strict=False) if given == wanted]
        pipeline.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])

    before = _added_token("bos", tokens, metadata, default=add_bos)
    after = _added_token("eos", tokens, metadata, default=False)
    if before or after:
        template = [*(text for text, _ in before), "$A", *(text for text, _ in after)]
        pipeline.post_processor = processors.TemplateProcessing(single=template, special_tokens=before + after)
    return pipeline


def _added_token(name: str, tokens: Sequence[str], metadata: Mapping[str, Any], default: bool) -> list[tuple[str, int]]:
    """The token that every text begins (bos) or ends (eos) with, as [(text, id)]; [] for none."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not metadata.get(f"tokenizer.ggml.add_{name}_token", default) or token_id is None:
        return []
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"the GGUF's {name} token is {token_id:,} but its vocabulary has {len(tokens):,} tokens")
    return [(tokens[token_id], token_id)]


def _byte_level(tokens: Sequence[str], metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in CUTS:
        raise CheckpointError(f"the GGUF's pre-tokenizer is {name!r}; known: {', '.join(CUTS)}")
    cut = CUTS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    pipeline = _bpe(vocab, merges, ignore_merges=cut.ignore_merges)
    if cut.nfc:
        pipeline.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    pipeline.decoder = decoders.ByteLevel()
    return pipeline, cut.add_bos


def _sentencepiece(tokens: Sequence[str], metadata: Mapping[str, Any]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise CheckpointError(
            f"the GGUF's tokenizer has {len(tokens):,} tokens but {len(scores or ()):,} scores; convert the file again"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    pipeline = _bpe(
        vocab, _merges_by_score(vocab, scores), byte_fallback=True, unk_token=tokens[unknown], fuse_unk=True
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return pipeline


def _merges_by_score(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best-scored piece first: what SentencePiece does at run time."""
    merges = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[i], vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _bpe(vocab: dict[str, int], merges: Sequence[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **options))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"the GGUF's tokenizer is broken: {error}; convert the file again") from error


def _strings(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    values = metadata.get(key)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"the GGUF's metadata has no list of strings {key}; its tokenizer cannot be built")
    return values
