"""Messages to text by a checkpoint's Jinja template, sandboxed: a template is foreign code.

Renders as transformers does (its names, its options); turning the text into tokens belongs to the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxpaged.errors import RequestError

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}; the content is text, or OpenAI's list of text parts."""

TEMPLATE_SWITCHES = ("enable_thinking", "thinking")
"""What callers may set for any template, true or false; an effort to think turns them on or off."""


def render_chat(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The conversation as one text. `variables` reach the template: add_generation_prompt, tools, bos_token, ...

    Raises RequestError where the messages are malformed or the template refuses them.
    """
    checked = [_checked(message, place) for place, message in enumerate(messages)]
    if not checked:
        raise RequestError("messages is empty; give at least 1 message such as {'role': 'user', 'content': '...'}")
    try:
        return _compile(template).render(messages=checked, **({"tools": None, "documents": None} | variables))
    except jinja2.TemplateError as error:
        raise RequestError(f"the chat template refused the messages: {_one_line(error)}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"the chat template failed on the messages: {_one_line(error)}") from error


def _checked(message: Message, place: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{place}] is {message!r}; it must be a mapping with a 'role' and a 'content'")
    content = message.get("content")
    if isinstance(content, (str, type(None))):
        return dict(message)
    if not isinstance(content, Sequence):
        raise RequestError(f"messages[{place}] has content {content!r}; it must be text or a list of text parts")
    return dict(message) | {"content": "\n".join(_part_text(part, place) for part in content)}


def _part_text(part: Any, place: int) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RequestError(f"messages[{place}] has a part {part!r}; only {{'type': 'text', 'text': ...}} is served")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fault_of(template: str) -> str | None:
    """Why a text is no template, if it is none."""
    try:
        _environment().parse(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {_one_line(error)}"
    return None


@lru_cache(maxsize=32)
def variables_of(template: str) -> frozenset[str]:
    """What the template asks to be given, `messages` and the tokenizer's own tokens among it."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))
    except jinja2.TemplateError:  # said to be so where it is rendered
        return frozenset()


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for trainers; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own attribute

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter escapes HTML and sorts keys; templates want the plain text."""
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
