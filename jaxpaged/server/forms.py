"""The form that an answer must have, as clients ask for it: OpenAI's response_format, and vLLM's fields old and new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jaxpaged.errors import RequestError
from jaxpaged.structured_outputs import StructuredOutputsParams


class Asks(Protocol):
    """The fields in which a client may say it."""

    response_format: dict[str, Any] | None
    structured_outputs: dict[str, Any] | None
    guided_json: Any
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None


def form_of(request: Asks) -> StructuredOutputsParams | None:
    """What the request asks for; None for plain text. Raises RequestError, also where it asks twice."""
    guided = {
        name: getattr(request, f"guided_{name}")
        for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")
        if getattr(request, f"guided_{name}") is not None
    }
    asked = {
        "response_format": _from_response_format(request.response_format),
        "structured_outputs": {n: v for n, v in (request.structured_outputs or {}).items() if v is not None},
        "guided_*": guided,
    }
    given = {name: fields for name, fields in asked.items() if fields}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} are given; give 1 of them")
    return StructuredOutputsParams(**fields) if (fields := next(iter(given.values()), None)) else None


def _from_response_format(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    match asked:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json": schema}
        case {"type": "json_schema"}:
            raise RequestError("response_format has no schema; put it at response_format.json_schema.schema")
    raise RequestError(f"response_format has type {asked.get('type')!r:.40}; known: text, json_object, json_schema")
