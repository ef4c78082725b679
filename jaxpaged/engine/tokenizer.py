"""Text to token ids and back, from a Hugging Face directory or a GGUF's metadata.

Built on the `tokenizers` library alone: importing it takes a tenth of a second, transformers' AutoTokenizer three.
Incremental decoding belongs to the detokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxpaged.engine.chat_template import Message, render_chat
from jaxpaged.engine.gguf_vocab import tokenizer_from_metadata
from jaxpaged.errors import CheckpointError, RequestError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A vocabulary with its rules, end-of-sequence ids and chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        named_tokens: Mapping[str, str] | None = None,
    ):
        """`named_tokens` (bos_token and so on) are what the chat template may write."""
        backend.no_truncation()  # a tokenizer.json may carry the training run's settings
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = frozenset(eos_token_ids)
        self.chat_template = chat_template
        self.named_tokens = dict(named_tokens or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_token_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        steps = _decoder_steps(backend)
        self.byte_level = steps == ["ByteLevel"]
        """True where every token is a run of bytes, whatever its neighbours."""
        self._byte_fallback = "ByteFallback" in steps
        self._anchor = self.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self.decode(self._anchor, skip_special_tokens=False)
        self._token_texts: dict[int, str] = {}
        self._token_bytes: dict[int, bytes | None] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`; special tokens written in it are found. Raises RequestError where it is no text."""
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise RequestError(f"the prompt is {_excerpt(text)}; it must be text without lone surrogates") from None

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as text, ready for the assistant's answer. Raises RequestError."""
        if self.chat_template is None:
            raise RequestError("the model has no chat template; give its prompt to generate as text or token ids")
        given = self.named_tokens | variables
        return render_chat(self.chat_template, messages, add_generation_prompt=add_generation_prompt, **given)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The token ids of the rendered conversation; the template itself writes the special tokens."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids past the vocabulary have none."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token's text as it stands inside a text: its leading space kept, special tokens shown."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.continued([token_id])
        return text

    def continued(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` inside a text: a leading space, which `decode` may strip, is kept."""
        return self.decode([*self._anchor, *token_ids], skip_special_tokens=False)[len(self._anchor_text) :]

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for, or None where it is a piece of text."""
        if token_id not in self._token_bytes:
            token = self.backend.id_to_token(token_id) or ""
            if self.byte_level:
                self._token_bytes[token_id] = _bytes_of(token)
            else:
                byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
                self._token_bytes[token_id] = bytes([int(byte[1], 16)]) if byte else None
        return self._token_bytes[token_id]


def load_tokenizer(source: str | Path | Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of an HF or native directory, or of a GGUF's metadata; None where there is none.

    Raises CheckpointError where there is one that cannot be read.
    """
    if isinstance(source, Mapping):
        return _from_gguf(source) if "tokenizer.ggml.model" in source else None
    return _from_directory(Path(source))


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    backend = tokenizer_from_metadata(metadata)
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "unknown")}
    texts = {name: backend.id_to_token(i) for name, i in ids.items() if isinstance(i, int)}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
    return Tokenizer(
        backend,
        eos_token_ids=(i for name in ("eos", "eot", "eom") if isinstance(i := ids[name], int)),
        chat_template=metadata.get("tokenizer.chat_template"),
        named_tokens={names[name]: text for name, text in texts.items() if name in names and text is not None},
    )


def _from_directory(directory: Path) -> Tokenizer | None:
    settings = _read_json(directory / "tokenizer_config.json")
    backend = _backend(directory)
    if backend is None:
        return None
    _add_missing_tokens(backend, settings)

    named = {name: text for name in NAMED_TOKENS if (text := _token_text(settings.get(name))) is not None}
    configs = [_read_json(directory / name) for name in ("generation_config.json", "config.json")]
    configs += [nested for config in configs if isinstance(nested := config.get("text_config"), dict)]
    eos_token_ids = {i for config in configs for i in _ids(config.get("eos_token_id"))}
    if (own := backend.token_to_id(named.get("eos_token", ""))) is not None:
        eos_token_ids.add(own)
    return Tokenizer(
        backend,
        eos_token_ids=eos_token_ids,
        chat_template=_chat_template(directory, settings),
        named_tokens=named,
    )


def _backend(directory: Path) -> tokenizers.Tokenizer | None:
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"cannot read {path}: {error}; fetch it again") from error
    others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (directory / name).is_file()]
    return _converted(directory, others[0]) if others else None


def _converted(directory: Path, name: str) -> tokenizers.Tokenizer:
    """A tokenizer older than tokenizer.json, which only transformers can convert."""
    advice = f"{directory} has {name} but no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(f"{advice}; `pip install transformers` to convert it") from None
    try:
        converted = AutoTokenizer.from_pretrained(str(directory), use_fast=True, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{advice}, and transformers cannot convert it: {reason}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(f"{advice}, and transformers has only a slow tokenizer for it; add a tokenizer.json")
    return backend


def _add_missing_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add what tokenizer_config.json lists and an older tokenizer.json lacks, where the ids come out as listed."""
    listed = settings.get("added_tokens_decoder") or {}
    for token_id, token in sorted((int(i), t) for i, t in listed.items() if str(i).isdigit()):
        text = _token_text(token)
        if text is None or backend.token_to_id(text) is not None:
            continue
        if token_id != backend.get_vocab_size():
            raise CheckpointError(
                f"tokenizer_config.json gives {text!r} the id {token_id:,} but tokenizer.json's next free id is "
                f"{backend.get_vocab_size():,}; the two files do not belong together"
            )
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
        backend.add_tokens([tokenizers.AddedToken(text, special=bool(token.get("special")), **flags)])


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = _read_json(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(given, list):  # several, by name
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}.get("default")
    return given if isinstance(given, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object; fetch it again")
    return values


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[str]:
    """The kinds of the decoder's steps in order; [] where tokens are joined by spaces."""
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return [step["type"] for step in decoder.get("decoders", [decoder])]


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE (GPT-2) writes for each byte: itself if printable, else one past 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _bytes_of(token: str) -> bytes:
    """A byte-level token's bytes; one with other characters, which was added whole, is text."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _excerpt(value: object) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(given: Any) -> list[int]:
    return [i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int)]
