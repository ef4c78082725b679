"""What the types of requests do not say of their fields: ranges, the shapes of prompts and messages, what is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxpaged.model.sampling import MAX_LOGPROBS
from jaxpaged.server.answers import Json
from jaxpaged.server.protocol import MAX_ENTRIES, MAX_N, MAX_PROMPTS, Unserved

_AT_LEAST_ONE = {"minimum": 1}
_PENALTY = {"minimum": -2, "maximum": 2}
_LOGPROBS = {"minimum": 0, "maximum": MAX_LOGPROBS}
_RANGES: dict[str, Json] = {
    "n": {"minimum": 1, "maximum": MAX_N},
    "best_of": {"minimum": 1, "maximum": MAX_N},
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": {"minimum": 1e-6, "maximum": 1e6},
    "max_tokens": _AT_LEAST_ONE,
    "max_completion_tokens": _AT_LEAST_ONE,
    "max_output_tokens": _AT_LEAST_ONE,
    "min_tokens": {"minimum": 0},
    "logprobs": _LOGPROBS,
    "top_logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "top_n": {"minimum": 0},
    "request_id": {"minLength": 1, "maxLength": 256},
}
_LENGTHS: dict[str, Json] = {name: {"maxItems": most} for name, most in MAX_ENTRIES.items() if name != "logit_bias"}
RANGES = _RANGES | _LENGTHS

_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
}
MESSAGES: Json = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]},
        },
    },
}


def refined(schemas: Mapping[str, Json], models: Sequence[str], vocab_size: int) -> dict[str, Json]:
    """The schemas with all of it; fields that are known but not served are left out."""
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}, "minItems": 1}
    several = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
    texts = {"type": "string", "minLength": 1}
    prompts = {"anyOf": [texts, ids, several | {"items": texts}, several | {"items": ids}]}
    given = {
        "messages": MESSAGES,
        "model": {"enum": [*models, None]},
        "tokens": ids | {"minItems": 0},
        ("CompletionRequest", "prompt"): prompts,
        ("EmbeddingRequest", "input"): prompts,
        ("ScoreRequest", "text_1"): prompts,
        ("ScoreRequest", "text_2"): prompts,
        ("RerankRequest", "query"): texts,
        ("RerankRequest", "documents"): several | {"items": texts},
        ("ResponseRequest", "input"): {"anyOf": [texts, MESSAGES]},
    }
    found = {}
    for name, schema in schemas.items():
        fields = {f: s for f, s in schema.get("properties", {}).items() if f not in Unserved.__struct_fields__}
        for field, before in fields.items():
            fields[field] = given.get((name, field)) or given.get(field) or _in_range(before, RANGES.get(field, {}))
        found[name] = schema | ({"properties": fields} if fields else {})
    return found


def _in_range(schema: Json, limits: Json) -> Json:
    """Within the limits, or null."""
    if "anyOf" not in schema or not limits:
        return schema
    return schema | {"anyOf": [_limited(option, limits) for option in schema["anyOf"]]}


def _limited(option: Json, limits: Json) -> Json:
    """JSON Schema passes over limits of another type than the value's, but readers of documents should not have to."""
    kinds = {"maxItems": "array", "minLength": "string", "maxLength": "string"}
    numbers = ("integer", "number")
    fits = {n: v for n, v in limits.items() if option.get("type") in ((kinds[n],) if n in kinds else numbers)}
    return option | fits
