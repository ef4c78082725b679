"""Text to token ids and back, from a Hugging Face directory or a GGUF's metadata.

Built on the `tokenizers` library alone: importing it takes a tenth of a second, transformers' AutoTokenizer three.
Incremental decoding belongs to the detokenizer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jaxpaged.engine.chat_template import Message, render_chat
from jaxpaged.engine.gguf_vocab import gguf_vocabulary
from jaxpaged.engine.hf_vocab import hf_vocabulary
from jaxpaged.errors import RequestError, TooLongError


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
        """The token ids of `text`; special tokens written in it are found. Raises RequestError where it is no text.

        Other threads may run meanwhile: of the library's ways to encode, the batched ones alone let them.
        """
        try:
            (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoded.ids)
        except TypeError:
            raise RequestError(f"the prompt is {_excerpt(text)}; it must be text without lone surrogates") from None

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token stands for; in a text of unknown characters one may stand for more."""
        return max(map(len, self.backend.get_vocab()), default=1)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text, ready for the assistant's answer. Raises RequestError."""
        template = chat_template if chat_template is not None else self.chat_template
        if template is None:
            raise RequestError("the model has no chat template; give its prompt to generate as text or token ids")
        given = self.named_tokens | variables
        return render_chat(template, messages, add_generation_prompt=add_generation_prompt, **given)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        max_characters: int | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The token ids of the rendered conversation; the template itself writes the special tokens.

        `chat_template` is one to use instead of the model's. With `continue_final_message` they end where the last
        message's content does, which the answer goes on with.

        Those written in a message, or in what is given beside messages, are text like any other: whoever writes a
        message cannot end it, or begin another's. Raises RequestError, also where the conversation has over
        `max_characters`.
        """
        opening, closing, end = (f"\ufdd0{secrets.token_hex(8)}" for _ in range(3))
        if continue_final_message:
            messages, add_generation_prompt = _ended(messages, end), False

        def rendered(messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
            text = self.render_chat(messages, add_generation_prompt, chat_template=chat_template, **variables)
            return _before(end, text) if continue_final_message else text

        marked = [self._marked(message, opening, closing) for message in messages]
        given = {name: self._marked(value, opening, closing) for name, value in variables.items()}
        text = rendered(marked, given)
        if max_characters is not None and len(text) > max_characters:
            raise TooLongError(
                f"the messages have {len(text):,} characters but {max_characters:,} can fit the model's length; "
                "shorten them"
            )
        pieces = re.split(f"{opening}(.*?){closing}", text)
        is_marked = any(one is not other for one, other in zip(marked, messages, strict=True))
        is_marked = is_marked or any(given[name] is not value for name, value in variables.items())
        if is_marked and "".join(pieces) != rendered(messages, variables):
            raise RequestError(
                "a message holds special tokens, and the chat template does more with it than to write it down; "
                "take them out of the message"
            )
        token_ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                token_ids += self._literal.encode(piece, add_special_tokens=False).ids
            else:
                token_ids += self.encode(piece, add_special_tokens=False)
        return token_ids

    def _marked(self, value: Any, opening: str, closing: str) -> Any:
        """The value with every special token in its texts between the marks, or itself where there is none."""
        if isinstance(value, str):
            if not any(special in value for special in self._special_texts):
                return value
            return self._special_pattern.sub(lambda found: f"{opening}{found[0]}{closing}", value)
        if isinstance(value, Mapping):
            pairs = {self._marked(k, opening, closing): self._marked(v, opening, closing) for k, v in value.items()}
            same = all(k in value and v is value[k] for k, v in pairs.items())
            return value if same else pairs
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
            parts = [self._marked(part, opening, closing) for part in value]
            return value if all(one is other for one, other in zip(parts, value, strict=True)) else parts
        return value

    @cached_property
    def _special_texts(self) -> list[str]:
        """The longest first, so that of one that begins another the whole is found."""
        texts = (self.backend.id_to_token(token) for token in self.special_token_ids)
        return sorted(filter(None, texts), key=len, reverse=True)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._special_texts)))

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same vocabulary, to which special tokens are text."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

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


def _ended(messages: Sequence[Message], end: str) -> list[Message]:
    """The messages with a mark where the last one's content ends. Raises RequestError where it has none."""
    last = messages[-1] if messages else None
    match last.get("content") if isinstance(last, Mapping) else None:
        case str(text) if text:
            return [*messages[:-1], {**(last or {}), "content": text + end}]
        case [*parts, {"type": "text", "text": str(text)}]:
            return [*messages[:-1], {**(last or {}), "content": [*parts, {"type": "text", "text": text + end}]}]
    raise RequestError("continue_final_message is true, but the last message has no text to go on from; give it some")


def _before(end: str, text: str) -> str:
    before, _, after = text.partition(end)
    if len(before) == len(text) or end in after:
        raise RequestError(
            "continue_final_message is true, but the chat template does more with the last message than to write it "
            "down; give the prompt to /v1/completions as text"
        )
    return before


def load_tokenizer(source: str | Path | Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of an HF or native directory, or of a GGUF's metadata; None where there is none.

    Raises CheckpointError where there is one that cannot be read.
    """
    if not isinstance(source, Mapping):
        found = hf_vocabulary(Path(source))
    elif "tokenizer.ggml.model" in source:
        found = gguf_vocabulary(source)
    else:
        found = None
    if found is None:
        return None
    return Tokenizer(
        found.pipeline,
        eos_token_ids=found.eos_token_ids,
        chat_template=found.chat_template,
        named_tokens=found.named_tokens,
    )


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
