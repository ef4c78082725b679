"""What the API is, as an OpenAPI document: made of the types by which requests are decoded, so that they agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import msgspec

from jaxpaged.server import protocol
from jaxpaged.server.answers import Json
from jaxpaged.server.openapi_fields import refined


class Operation(NamedTuple):
    """One thing to ask."""

    summary: str
    request: type[msgspec.Struct] | None = None
    kind: str = "application/json"  # of the answer
    streams: bool = False


_SCORE = Operation("Say how alike texts are", protocol.ScoreRequest)
_RERANK = Operation("Order documents by how alike they are to a query", protocol.RerankRequest)
OPERATIONS: dict[str, dict[str, Operation]] = {
    "/": {"get": Operation("A page to chat and to look at the page pool", kind="text/html")},
    "/v1/models": {"get": Operation("The names of the model")},
    "/v1/models/{model}": {"get": Operation("The model, by one of its names")},
    "/v1/completions": {"post": Operation("Go on with a text", protocol.CompletionRequest, streams=True)},
    "/v1/chat/completions": {"post": Operation("Answer a conversation", protocol.ChatRequest, streams=True)},
    "/v1/responses": {
        "post": Operation("Answer a text, in OpenAI's newer form", protocol.ResponseRequest, streams=True)
    },
    "/v1/embeddings": {"post": Operation("Embed texts", protocol.EmbeddingRequest)},
    **{path: {"post": _SCORE} for path in ("/v1/score", "/score")},
    **{path: {"post": _RERANK} for path in ("/v1/rerank", "/rerank", "/v2/rerank")},
    "/tokenize": {"post": Operation("Text or messages to token ids", protocol.TokenizeRequest)},
    "/detokenize": {"post": Operation("Token ids to text", protocol.DetokenizeRequest)},
    "/tokenizer_info": {"get": Operation("The special tokens and the chat template")},
    "/health": {"get": Operation("Whether the engine is well")},
    "/ping": {"get": Operation("Whether the engine is well"), "post": Operation("Whether the engine is well")},
    "/version": {"get": Operation("The version of the server")},
    "/metrics": {"get": Operation("Counts and times, for Prometheus", kind="text/plain")},
    "/load": {"get": Operation("Requests under way")},
    "/pool": {"get": Operation("Who holds which page")},
    "/openapi.json": {"get": Operation("This document")},
    "/reset_prefix_cache": {"post": Operation("Forget cached prefixes")},
    "/pause": {"post": Operation("Take no step until told to")},
    "/resume": {"post": Operation("Go on after a pause")},
    "/sleep": {"post": Operation("Give the memory back until woken up")},
    "/wake_up": {"post": Operation("Go on after sleep")},
    "/v1/load_lora_adapter": {"post": Operation("Read an adapter, to be asked by name", protocol.LoadLoRARequest)},
    "/v1/unload_lora_adapter": {"post": Operation("Forget an adapter", protocol.UnloadLoRARequest)},
}

FAULTS = {
    "400": "The request cannot be served; the message says why",
    "401": "The API key is missing or wrong",
    "403": "The page of another site asks",
    "404": "There is no such model",
    "408": "The body did not come in time",
    "413": "The body is too large",
    "415": "The body does not say that it is JSON",
    "429": "Too many requests wait",
    "500": "The server is at fault",
    "503": "The engine is dead, or the server shuts down",
}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(paths: Collection[str], *, models: Sequence[str], vocab_size: int, has_keys: bool) -> Json:
    """The document of a server that answers at these paths, to these models' names."""
    served = {path: operations for path, operations in OPERATIONS.items() if path in paths}
    kinds = [o.request for operations in served.values() for o in operations.values() if o.request is not None]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components: Json = {"schemas": refined(schemas, models, vocab_size) | {"Error": _ERROR}}
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": "jaxpaged", "version": version("jaxpaged")},
        "paths": {
            path: {method: _operation(path, method, operation, models) for method, operation in operations.items()}
            for path, operations in served.items()
        },
        "components": components,
    }
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _operation(path: str, method: str, operation: Operation, models: Sequence[str]) -> Json:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    content: dict[str, Any] = {operation.kind: {}}
    if operation.streams:
        content["text/event-stream"] = {}
    told = FAULTS if method == "post" else {code: FAULTS[code] for code in ("401", "500", "503")}
    found: Json = {
        "operationId": f"{method}{path}".replace("/", "_").strip("_"),
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            **{code: {"description": text, "content": error} for code, text in told.items()},
        },
    }
    if "{model}" in path:
        schema = {"type": "string", "enum": list(models)}
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
        found["responses"]["404"] = {"description": FAULTS["404"], "content": error}
    if path in ("/health", "/ping"):
        found["security"] = []
    if operation.request is not None:
        schema = {"$ref": f"#/components/schemas/{operation.request.__name__}"}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found
