"""What a checkpoint says of its tokens, and the byte-level BPE pipelines that several kinds of checkpoints describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxpaged.errors import CheckpointError


class Vocabulary(NamedTuple):
    """A pipeline from text to ids and back; ids that end an answer; what a chat template is and may write.

    `named_tokens` are bos_token, eos_token and so on.
    """

    pipeline: Tokenizer
    eos_token_ids: frozenset[int]
    chat_template: str | None
    named_tokens: Mapping[str, str]


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

_KINDS = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 olmo mpt jais exaone4 trillion granite-docling": Cut((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": Cut((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 pixtral": Cut((_WORDS % r"\p{N}{1,3}",), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe chatglm-bpe glm4": Cut((_WORDS % r"\p{N}{1,3}",)),
    "qwen2 deepseek-r1-qwen megrez hunyuan": Cut((_WORDS % r"\p{N}",), nfc=True),
    "stablelm2": Cut((_WORDS % r"\p{N}",)),
    "tekken": Cut((_CASED_WORDS % ("", "") + r"|\p{N}|" + _PUNCTUATION,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4": Cut((_CASED_WORDS % (_CONTRACTION, _CONTRACTION) + r"|\p{N}{1,3}|" + _PUNCTUATION,)),
}

CUTS: dict[str, Cut] = {name: cut for names, cut in _KINDS.items() for name in names.split()}
"""By the name that GGUF files call them, `tokenizer.ggml.pre`."""

Merge = tuple[str, str]


def bpe(vocab: Mapping[str, int], merges: Sequence[Merge], **options: Any) -> Tokenizer:
    """BPE without anything before or behind it. Raises CheckpointError where a merge makes no known token."""
    try:
        return Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), **options))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"the tokenizer is broken: {error}; fetch or convert it again") from error


def byte_level_bpe(vocab: Mapping[str, int], merges: Sequence[Merge], cut: Cut) -> Tokenizer:
    """Text cut into words, their UTF-8 bytes merged by rank (GPT-2)."""
    pipeline = bpe(vocab, merges, ignore_merges=cut.ignore_merges)
    if cut.nfc:
        pipeline.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def frame(pipeline: Tokenizer, before: Sequence[str], after: Sequence[str] = ()) -> None:
    """Let every encoded text begin and end with these special tokens."""
    if not before and not after:
        return
    ids = [(token, pipeline.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    pipeline.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
