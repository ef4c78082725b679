"""What goes wrong, as HTTP says it: a status, and OpenAI's error object. A client's fault is never a 5xx."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from jaxpaged.errors import EngineDeadError, QueueFullError, RequestError, TooLongError

log = logging.getLogger("jaxpaged")

MAX_MESSAGE = 600  # characters: a message may quote what was sent, but not all of it

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY = {429: "1", 503: "5"}  # seconds after which to try again


class Fault(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
        self.code = code
        self.headers = dict(headers or {}) | ({"Retry-After": RETRY[status]} if status in RETRY else {})

    def as_object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    def as_json(self) -> bytes:
        """The error object's bytes."""
        return msgspec.json.encode(self.as_object())


def fault_of(error: BaseException) -> Fault:
    """How an exception is answered; what is nobody's known fault is logged as ours."""
    match error:
        case Fault():
            return error
        case TooLongError():  # clients that shorten what they send look for this
            return Fault(400, str(error), code="context_length_exceeded")
        case RequestError():
            return Fault(400, str(error))
        case RecursionError():  # nothing that was asked is nested but the request itself
            return Fault(400, "the request is nested too deeply; flatten it")
        case QueueFullError():
            return Fault(429, str(error))
        case EngineDeadError():
            return Fault(503, str(error))
    log.error("a request failed", exc_info=error)
    return Fault(500, f"internal error: {type(error).__name__}")
