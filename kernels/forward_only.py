"""A plain answer for whoever asks for the derivative of an op that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def forward_only(op: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """`op` as it is; differentiating it raises NotImplementedError with `reason`, not something from deep inside."""
    guarded = jax.custom_jvp(lambda args, kwargs: op(*args, **kwargs))

    @guarded.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(reason)

    return lambda *args, **kwargs: guarded(args, kwargs)
