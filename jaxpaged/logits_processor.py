"""One's own function on the logits: what it is. Compiled and called by `engine/processors.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def nothing(prompt_token_ids: Sequence[int]) -> tuple[()]:
    """The state of a function that keeps none."""
    return ()


@dataclass(frozen=True)
class LogitsProcessor:
    """A function that changes a sequence's logits before its next token is chosen, in JAX, with a state of its own.

    apply    apply(logits, state) -> (logits, state): float32 [V], after penalties, biases and bans
    init     init(prompt_token_ids) -> state, a pytree of arrays, before a sequence's first token; called on the host
    observe  observe(state, token) -> state, after a token (int32) was chosen; None where the state needs no token

    `apply` and `observe` are traced, for several sequences at once (`jax.vmap`), and compiled once each. Make one
    LogitsProcessor and give it to all requests: functions made anew are compiled anew.
    """

    apply: Callable[[Any, Any], tuple[Any, Any]]
    init: Callable[[Sequence[int]], Any] = nothing
    observe: Callable[[Any, Any], Any] | None = None
