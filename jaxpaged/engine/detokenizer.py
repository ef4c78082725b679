"""Token ids to text as they come, one `Detokenizer` per sequence, and where a stop string ends it.

Text may be shown once no later token can change it: it holds no half of a UTF-8 character, and its end cannot become a
stop string. The work per token does not grow with the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.sampling_params import SamplingParams


class Detokenizer:
    """The text of one sequence. Without a tokenizer, or where the params want no text, it is always empty."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int] = ()):
        """The text continues the prompt's, as in vLLM: after a prompt, a leading space is kept."""
        self._stream: TokenStream | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = token_stream(tokenizer, params.skip_special_tokens, at_start=not prompt_token_ids)
        self._stops = [StopString(text) for text in params.stop_strings]
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._shown: list[str] = []
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._num_taken = 0  # pieces of _shown that delta() has given
        self.num_tokens = 0
        """How many tokens were taken; with several per call, those after the one that completed a stop were not."""
        self.stop_reason: str | None = None

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Take the next tokens; the stop string that they complete, or None.

        A stop string completed by an earlier token than number `min_tokens` is text like any other. A stop token is not
        to be appended, unless it shall be seen.
        """
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            if self._stream is not None:
                self._take(self._stream.push(token_id))
        return self.stop_reason

    def finish(self) -> None:
        """No more tokens will come: show what was held back, half a character as the replacement character."""
        if self._stream is not None and self.stop_reason is None:
            self._held += self._stream.flush()
        self._show(self._held)
        self._held = ""

    @property
    def text(self) -> str:
        """All text that may be shown now."""
        return "".join(self._shown)

    def delta(self) -> str:
        """The text that became showable since the last call."""
        new = "".join(self._shown[self._num_taken :])
        self._num_taken = len(self._shown)
        return new

    def _take(self, new: str) -> None:
        text = self._held + new
        for end, character in enumerate(new, len(self._held) + 1):
            completed = [stop.text for stop in self._stops if stop.advance(character)]
            if completed and self.num_tokens >= self._min_tokens:
                self.stop_reason = max(completed, key=len)
                self._held = ""
                self._show(text[: end if self._include_stop else end - len(self.stop_reason)])
                return
        settled = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._show(text[:settled])
        self._held = text[settled:]

    def _show(self, text: str) -> None:
        if text:
            self._shown.append(text)


class StopString:
    """How much of one stop string the text ends with, followed character by character (Knuth, Morris and Pratt).

    What is found does not depend on how the text was cut into tokens.
    """

    def __init__(self, text: str):
        self.text = text
        self.matched = 0
        """The length of the longest end of the text so far that begins the stop string, short of all of it."""
        self._shorter = [0]  # for each beginning, the length of the longest shorter one that it ends with
        for character in text[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def advance(self, character: str) -> bool:
        """Take the text's next character; True where it completes the stop string."""
        self.matched = self._longer(self.matched, character)
        if self.matched < len(self.text):
            return False
        self.matched = self._shorter[-1]
        return True

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)


class TokenStream(Protocol):
    """Decodes one token after the other; the pieces joined are the text."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""

    def flush(self) -> str:
        """What is left at the end, cut short as it may be."""


def token_stream(tokenizer: Tokenizer, skip_special_tokens: bool, at_start: bool) -> TokenStream:
    """The stream that fits the tokenizer; `at_start` where no text goes before, so that a leading space is dropped."""
    hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
    if tokenizer.byte_level:
        return ByteLevelStream(tokenizer, hidden)
    return PieceStream(tokenizer, hidden, at_start)


class ByteLevelStream:
    """For byte-level vocabularies: each token is some bytes, and the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int]):
        self._tokenizer, self._hidden = tokenizer, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id) or b"")

    def flush(self) -> str:
        """The replacement character where a character was cut short."""
        return self._decoder.decode(b"", final=True)


class PieceStream:
    """For every other vocabulary: a token is a piece of text, or one byte of a character that no piece has.

    Bytes are shown as soon as they are whole characters. `Tokenizer.decode` instead replaces every byte of a run that
    ends in invalid ones, the characters before them too; only there the two differ.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], at_start: bool):
        self._tokenizer, self._hidden, self._at_start = tokenizer, hidden, at_start
        self._run: list[int] = []  # byte tokens, not yet a character
        self._run_bytes = bytearray()

    def push(self, token_id: int) -> str:
        """The token's text, or that of the character which it completes."""
        if token_id in self._hidden:
            return ""
        byte = self._tokenizer.token_bytes(token_id)
        if byte is None:
            return self.flush() + self._text([token_id])
        self._run.append(token_id)
        self._run_bytes += byte
        try:
            self._run_bytes.decode()
        except UnicodeDecodeError:
            return ""
        return self.flush()

    def flush(self) -> str:
        """The run's text: its characters, or a replacement character for each byte."""
        run, self._run = self._run, []
        self._run_bytes.clear()
        return self._text(run) if run else ""

    def _text(self, token_ids: list[int]) -> str:
        if self._at_start:
            self._at_start = False
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)
        if len(token_ids) == 1:
            return self._tokenizer.token_text(token_ids[0])
        return self._tokenizer.continued(token_ids)
