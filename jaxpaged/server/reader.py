"""An answer's text told apart as it comes: what was thought, what is said, which tools are called.

What may still become a mark is held back until it is one or is not; a call is given once all of it is there.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxpaged.server.tool_formats import Call, Format

OPENING, CLOSING = "<think>", "</think>"


class Parts(NamedTuple):
    """What is new of an answer."""

    reasoning: str
    content: str
    calls: list[Call]


class Reader:
    """Reads one completion."""

    def __init__(self, *, thinks: bool, begins_thinking: bool, tools: Format | None) -> None:
        """`begins_thinking`: no mark opens the thoughts, since the prompt did."""
        self._thoughts = _Thoughts(begins_thinking) if thinks else None
        self._calls = _Calls(tools) if tools is not None else None

    def take(self, text: str, *, is_last: bool) -> Parts:
        """The parts that this text completes."""
        reasoning, calls = "", list[Call]()
        if self._thoughts is not None:
            reasoning, text = self._thoughts.take(text, is_last)
        if self._calls is not None:
            text, calls = self._calls.take(text, is_last)
        return Parts(reasoning, text, calls)


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
    """Text before calls, and the calls."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._held = ""
        self._inside = False  # behind an opening mark
        self._said = False  # something that is no white space
        self._blank = ""  # white space that may turn out to be nothing
        self._called = False

    def take(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        """(said, calls)"""
        text, self._held = self._held + text, ""
        if not self._form.opening:
            return self._whole(text, is_last)
        said, calls = "", list[Call]()
        while True:
            if not self._inside:
                before, mark, rest = text.partition(self._form.opening)
                if not mark:
                    held = 0 if is_last else _begun(text, self._form.opening)
                    said += text[: len(text) - held]
                    self._held = text[len(text) - held :]
                    break
                said += before if before.strip() or not self._called else ""
                text, self._inside = rest, True
            closing = self._form.closing
            body, mark, rest = text.partition(closing) if closing else (text, "", "")
            if not mark and not is_last:
                self._held = text
                break
            try:
                calls += self._form.parse(body)
                self._called = True
            except ValueError:
                said += self._form.opening + body + mark
            text, self._inside = rest, False
            if not mark:
                break
        return self._shown(said, is_last), calls

    def _whole(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        if self._said or (text.strip() and not text.lstrip().startswith(self._form.beginnings)):
            self._said = True
            return text, []
        if not is_last:
            self._held = text
            return "", []
        try:
            return "", self._form.parse(text)
        except ValueError:
            return text, []

    def _shown(self, said: str, is_last: bool) -> str:
        """White space around calls, and where nothing else is said, is none of the answer."""
        said, self._blank = self._blank + said, ""
        if said.strip() or (self._said and not self._called):
            self._said = True
            return said
        if not is_last:
            self._blank = said
        return said if is_last and not self._called else ""


def _begun(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _with_line_ends(text: str, held: int) -> int:
    """So much of the end, and the line ends before it."""
    return len(text) - len(text[: len(text) - held].rstrip("\n"))
