"""The vocabulary of a Hugging Face directory: tokenizer.json and the files around it, read without transformers.

transformers is asked only to convert vocabularies older than tokenizer.json; GPT-2's are read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from jaxpaged.engine.vocabulary import CUTS, Vocabulary, byte_level_bpe, frame
from jaxpaged.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_GPT2_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def hf_vocabulary(directory: Path) -> Vocabulary | None:
    """What the directory's files describe; None where there is no vocabulary. Raises CheckpointError."""
    settings = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
    configs = [_read_json(directory / name) for name in ("generation_config.json", "config.json")]
    if (directory / "tokenizer.json").is_file():
        pipeline = _from_file(directory / "tokenizer.json")
    elif (directory / "merges.txt").is_file() and _is_gpt2(settings, configs[1]):
        settings = _GPT2_TOKENS | settings
        pipeline = _from_vocab_and_merges(directory, settings)
    else:
        others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (directory / name).is_file()]
        if not others:
            return None
        pipeline = _converted(directory, others[0])
    _add_missing_tokens(pipeline, settings)

    configs += [nested for config in configs if isinstance(nested := config.get("text_config"), dict)]
    eos_token_ids = {i for config in configs for i in _ids(config.get("eos_token_id"))}
    named = _named_tokens(settings)
    if (own := pipeline.token_to_id(named.get("eos_token", ""))) is not None:
        eos_token_ids.add(own)
    return Vocabulary(pipeline, frozenset(eos_token_ids), _chat_template(directory, settings), named)


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"cannot read {path}: {error}; fetch it again") from error


def _is_gpt2(settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    kind = settings.get("tokenizer_class")
    return kind in _GPT2_CLASSES or (kind is None and config.get("model_type") in ("gpt2", "opt"))


def _from_vocab_and_merges(directory: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's files of 2019, OPT's too: vocab.json and merges.txt. Special tokens are the named ones."""
    vocab = _read_json(directory / "vocab.json")
    lines = [
        line.split() for line in _read_text(directory / "merges.txt").split("\n") if not line.startswith("#version")
    ]
    pipeline = byte_level_bpe(vocab, [(line[0], line[1]) for line in lines if len(line) == 2], CUTS["gpt-2"])
    special = [text for text in _named_tokens(settings).values() if text in vocab]
    pipeline.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(special)])
    bos = _token_text(settings.get("bos_token"))
    frame(pipeline, [bos] if settings.get("add_bos_token") and bos is not None else [])
    return pipeline


def _converted(directory: Path, name: str) -> Tokenizer:
    """A tokenizer older than tokenizer.json, which only transformers can convert."""
    advice = f"{directory} has {name} but no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(f"{advice}; `pip install transformers` to convert it") from None
    try:
        converted = AutoTokenizer.from_pretrained(str(directory), use_fast=True, trust_remote_code=False)
    except Exception as error:  # it raises what it likes
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{advice}, and transformers cannot convert it: {reason}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(f"{advice}, and transformers has only a slow tokenizer for it; add a tokenizer.json")
    return backend


def _add_missing_tokens(pipeline: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add what tokenizer_config.json lists and an older tokenizer.json lacks, where the ids come out as listed."""
    listed = settings.get("added_tokens_decoder") or {}
    for token_id, token in sorted((int(i), t) for i, t in listed.items() if str(i).isdigit()):
        text = _token_text(token)
        if text is None or pipeline.token_to_id(text) is not None:
            continue
        if token_id != pipeline.get_vocab_size():
            raise CheckpointError(
                f"tokenizer_config.json gives {text!r} the id {token_id:,} but tokenizer.json's next free id is "
                f"{pipeline.get_vocab_size():,}; the two files do not belong together"
            )
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
        pipeline.add_tokens([AddedToken(text, special=bool(token.get("special")), **flags)])


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    given = _read_json(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(given, list):  # several, by name
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}.get("default")
    return given if isinstance(given, str) else None


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name in NAMED_TOKENS if (text := _token_text(settings.get(name))) is not None}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(given: Any) -> list[int]:
    return [i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; fetch it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object; fetch it again")
    return values
