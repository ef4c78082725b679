"""An answer's text told apart as it comes: what was thought, what is said, which tools are called.

What may still become a mark or a call is held back until it is one or is not; a call's arguments are given as they
come.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxpaged.server.feed import Feed
from jaxpaged.server.tool_formats import CallPiece, Format, Parameters, Reading

OPENING, CLOSING = "<think>", "</think>"


class Parts(NamedTuple):
    """What is new of an answer."""

    reasoning: str
    pieces: list[str | CallPiece]  # what is said and called, in order

    @property
    def content(self) -> str:
        """What is said."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[CallPiece]:
        """What is called."""
        return [piece for piece in self.pieces if isinstance(piece, CallPiece)]


class Reader:
    """Reads one completion."""

    def __init__(
        self, *, thinks: bool, begins_thinking: bool, tools: Format | None, parameters: Parameters | None = None
    ) -> None:
        """`begins_thinking`: no mark opens the thoughts, since the prompt did. `parameters`: of the tools."""
        self._thoughts = _Thoughts(begins_thinking) if thinks else None
        self._calls = _Calls(tools, parameters or {}) if tools is not None else None

    def take(self, text: str, *, is_last: bool) -> Parts:
        """What this text adds to the parts."""
        reasoning = ""
        if self._thoughts is not None:
            reasoning, text = self._thoughts.take(text, is_last)
        if self._calls is not None:
            return Parts(reasoning, self._calls.take(text, is_last))
        return Parts(reasoning, [text] if text else [])


class _Thoughts:
    """Text before and after the mark that closes the thoughts."""

    def __init__(self, inside: bool) -> None:
        self._inside: bool | None = None  # nothing has come yet that would tell
        self._begins_inside = inside
        self._held = ""
        self._trims = True  # line ends around the marks belong to them

    def take(self, text: str, is_last: bool) -> tuple[str, str]:
        """(thought, said)"""
        text, self._held = self._held + text, ""
        if self._inside is None:
            begun = text.lstrip()
            if OPENING.startswith(begun[: len(OPENING)]) and len(begun) < len(OPENING) and not is_last:
                self._held = text
                return "", ""
            self._inside = self._begins_inside or begun.startswith(OPENING)
            text = begun[len(OPENING) :] if begun.startswith(OPENING) else text
            self._trims = self._inside
        thought = ""
        if self._inside:
            thought, mark, text = text.partition(CLOSING)
            if mark:
                self._inside = False
                thought = self._trimmed(thought).rstrip("\n")
                self._trims = True
            else:
                held = 0 if is_last else _with_line_ends(thought, _begun(thought, CLOSING))
                thought, self._held = thought[: len(thought) - held], thought[len(thought) - held :]
                return self._trimmed(thought), ""
        return thought, self._trimmed(text)

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        return text


class _Calls:
    """Text before, between and after calls, and the calls."""

    def __init__(self, form: Format, parameters: Parameters) -> None:
        self._form, self._parameters = form, parameters
        self._feed = Feed()
        self._reading: Reading | None = None
        self._has_read = False  # a call, where one was looked for last
        self._leaving = False  # what a mark opened: all up to the one that closes it is left out
        self._plain = False  # no call may come any more
        self._said = False  # something that is no white space
        self._blank = ""  # white space that may turn out to be nothing
        self._called = False

    def take(self, text: str, is_last: bool) -> list[str | CallPiece]:
        """What this adds to what is said and called."""
        feed, found = self._feed, list[str | CallPiece]()
        feed.rest += text
        feed.is_whole = is_last
        while True:
            if self._reading is not None:
                if not self._read(self._reading, found):
                    break
                self._reading = None
                if not self._has_read:
                    found.append(self._shown(feed.taken))
            elif self._leaving:
                if not self._leave():
                    break
            else:
                before, begins = self._before_calls()
                found.append(self._shown(before))
                if not begins:
                    break
                self._reading, self._has_read = self._form.read(feed, self._parameters), False
        if is_last and not self._called:  # it was part of the answer after all
            found.append(self._blank)
            self._blank = ""
        return [piece for piece in found if piece]

    def _before_calls(self) -> tuple[str, bool]:
        """Text up to where calls may begin, and whether they may."""
        feed, opening = self._feed, self._form.opening
        feed.mark()
        if opening:
            at = feed.rest.find(opening)
            if at < 0:
                return feed.take(len(feed.rest) - (0 if feed.is_whole else _begun(feed.rest, opening))), False
            before = feed.take(at)
            feed.mark()
            feed.take(len(opening))
            return before, True
        begun = feed.rest.lstrip()
        if self._plain or (begun and not begun.startswith(self._form.beginnings)):
            self._plain = True
            return feed.take(len(feed.rest)), False
        if not begun:
            return (feed.take(len(feed.rest)) if feed.is_whole else ""), False
        self._plain = True  # after these
        return "", True

    def _read(self, reading: Reading, found: list[str | CallPiece]) -> bool:
        """Add the pieces that are there; whether all there will be are."""
        try:
            for piece in reading:
                if piece is None:
                    return False
                found.append(piece)
                self._has_read = self._called = True
                self._blank = ""
                self._feed.mark()
        except (ValueError, RecursionError):
            pass
        self._leaving = self._has_read and bool(self._form.closing)
        return True

    def _leave(self) -> bool:
        """Pass over what is left before the closing mark, and it; whether it is there."""
        feed, closing = self._feed, self._form.closing
        at = feed.rest.find(closing)
        if at < 0:
            feed.take(len(feed.rest) - _begun(feed.rest, closing))
            return False
        feed.take(at + len(closing))
        self._leaving = False
        return True

    def _shown(self, text: str) -> str:
        """White space around calls, and where nothing else is said, is none of the answer."""
        self._blank += text
        if not (self._blank.strip() or (self._said and not self._called)):
            return ""
        self._said = True
        size = len(self._blank.rstrip()) if self._called else len(self._blank)
        shown, self._blank = self._blank[:size], self._blank[size:]
        return shown


def _begun(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _with_line_ends(text: str, held: int) -> int:
    """So much of the end, and the line ends before it."""
    return len(text) - len(text[: len(text) - held].rstrip("\n"))
