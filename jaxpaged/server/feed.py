"""A text that comes in pieces, read by generators that yield None where they need more of it.

What is read does not depend on where the text was cut: a reader decides on what it has seen, and waits where another
character could change its mind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator

Wait = Generator[None, None, str]
"""Yields None until there is enough, and then returns what was read."""

_QUOTED = re.compile(r'["\\]')
_BARE = re.compile(r'["{}\[\]<]')
_SCALAR_END = re.compile(r"[,;:}\]\s]")


class Feed:
    """What has come and not been read; `taken` is what was read since `mark` was last called."""

    def __init__(self) -> None:
        self.rest = ""
        self.taken = ""
        self.is_whole = False
        """Nothing more will come."""

    def take(self, size: int) -> str:
        """Read so many characters, which are there."""
        found, self.rest = self.rest[:size], self.rest[size:]
        self.taken += found
        return found

    def mark(self) -> None:
        """What was read until now is done with."""
        self.taken = ""


def peek(feed: Feed) -> Wait:
    """The next character that is no white space, which is passed over; "" at the end."""
    while True:
        blank = len(feed.rest) - len(feed.rest.lstrip())
        feed.take(blank)
        if feed.rest or feed.is_whole:
            return feed.rest[:1]
        yield None


def starts_with(feed: Feed, text: str) -> Generator[None, None, bool]:
    """Whether the next characters are these."""
    while len(feed.rest) < len(text) and text.startswith(feed.rest) and not feed.is_whole:
        yield None
    return feed.rest.startswith(text)


def until(feed: Feed, text: str) -> Wait:
    """All before `text`, which is read too. Raises ValueError where it does not come."""
    seen = 0
    while (at := feed.rest.find(text, max(0, seen - len(text) + 1))) < 0:
        if feed.is_whole:
            raise ValueError(f"no {text!r}")
        seen = len(feed.rest)
        yield None
    found = feed.take(at)
    feed.take(len(text))
    return found


def pieces_of_value(feed: Feed) -> Generator[str | None, None, None]:
    """A JSON value's text as it comes: an object or list up to its last bracket, a string up to its quote, a word.

    Brackets and quotes alone are looked at, and `<`, which stands in strings only. Raises ValueError where the text
    ends, or a mark comes, before the value has ended.
    """
    first = yield from peek(feed)
    if first not in ('"', "{", "["):
        while not (end := _SCALAR_END.search(feed.rest)) and not feed.is_whole:
            yield None
        yield feed.take(end.start() if end else len(feed.rest))
        return
    depth, quoted, at = 0, False, 0
    while True:
        found = (_QUOTED if quoted else _BARE).search(feed.rest, at)
        cut = found is not None and found[0] == "\\" and found.end() == len(feed.rest) and not feed.is_whole
        if found is None or cut:
            if piece := feed.take(len(feed.rest) - cut):
                yield piece
            if feed.is_whole:
                raise ValueError("the value does not end")
            yield None
            at = 0
            continue
        at = found.end()
        match found[0]:
            case "\\":
                at += 1
            case '"':
                quoted = not quoted
            case "{" | "[":
                depth += 1
            case "<":
                yield feed.take(found.start())
                raise ValueError("the value does not end")
            case _:
                depth -= 1
        if depth <= 0 and not quoted:
            yield feed.take(at)
            return


def value(feed: Feed) -> Wait:
    """The text of the JSON value that comes, once all of it is there. Raises ValueError."""
    text = ""
    for piece in pieces_of_value(feed):
        if piece is None:
            yield None
        else:
            text += piece
    return text


def string(feed: Feed) -> Generator[None, None, str]:
    """The JSON string that comes. Raises ValueError where something else does."""
    if (yield from peek(feed)) != '"':
        raise ValueError("no string")
    return str(json.loads((yield from value(feed))))
