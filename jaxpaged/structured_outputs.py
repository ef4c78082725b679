"""What form an answer must have: a JSON schema, a regular expression, one of several texts, or a grammar.

Only the wish and the checks that need no tokenizer; compiled and followed by `engine/grammar.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpaged.errors import RequestError
from jaxpaged.settings import Settings

MAX_CHARACTERS = 128 << 10
"""Of a schema, an expression, all choices together or a grammar."""

FORMS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputsParams(Settings):
    r"""The form of one request's answers; exactly one of the first five. Raises RequestError where one is wrong.

    json                    a JSON schema, as a mapping or as text; stored as text
    regex                   a regular expression that the whole answer matches (Rust's syntax, without look-around)
    choice                  texts, one of which is the answer
    grammar                 a context-free grammar in Lark's notation, whose rule `start` is the answer
    json_object             any JSON object
    disable_any_whitespace  no white space in JSON but inside of strings
    whitespace_pattern      what may stand between the parts of JSON; None: at most 64 blanks, tabs or line ends, since
                            some models never stop making them
    """

    error: ClassVar[type[RequestError]] = RequestError

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        """Check that one form is given, and store it as text (choices: a tuple of texts)."""
        self._set("json_object", self.json_object or None)
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {len(given)} of {', '.join(FORMS)}; give exactly 1"
                + (f" of {', '.join(given)}" if given else "")
            )
        self._check_bool("disable_any_whitespace")
        if self.json_object is not None:
            self._check_bool("json_object")
        if self.json is not None:
            self._set("json", _schema(self.json))
        if self.choice is not None:
            self._set("choice", _choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and text):
                raise RequestError(f"{name} is {text!r:.60}; it must be a text of at least 1 character")
        texts = [*(self.choice or ()), *(getattr(self, name) for name in ("json", "regex", "grammar"))]
        size = sum(len(text) for text in texts if isinstance(text, str))
        if size > MAX_CHARACTERS:
            raise RequestError(f"{given[0]} has {size:,} characters; at most {MAX_CHARACTERS:,} are compiled")
        for text in (*texts, self.whitespace_pattern):
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise RequestError(f"{given[0]} holds a lone surrogate; it must be text")


def _schema(given: Any) -> str:
    """A schema as JSON text. `true` and `{}` are schemas too, which allow every value."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        if isinstance(schema, bool):
            return json.dumps(schema)
        if not isinstance(schema, Mapping):
            raise RequestError(f"json is {given!r:.60}; it must be a JSON schema, which is an object")
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"json is no JSON schema: {type(error).__name__}: {error}") from None


def _choices(given: Any) -> tuple[str, ...]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise RequestError(f"choice is {given!r:.60}; it must be a list of texts")
    choices = tuple(given)
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise RequestError(f"choice is {choices!r:.60}; it must be a list of at least 1 text, none of them empty")
    return choices
