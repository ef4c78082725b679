"""The forms in which callers give prompts, one or several: text, token ids, arrays, vLLM's mappings of either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.errors import RequestError
from jaxpaged.settings import nearest

Prompt = str | Sequence[int]
"""Text, or token ids."""

AnyPrompt = Prompt | np.ndarray | Mapping[str, Any]
"""The same, an array of token ids, or a mapping with a "prompt" or "prompt_token_ids"."""

FIELDS = ("prompt", "prompt_token_ids", "cache_salt")


class Given(NamedTuple):
    """One prompt, the text that it is reported by where it has another form, and whom it shares its pages with."""

    prompt: Prompt
    text: str | None = None
    cache_salt: str | None = None


def listed(prompts: AnyPrompt | Iterable[AnyPrompt]) -> list[AnyPrompt]:
    """One prompt or several (a list, a generator, the rows of an array) as a list. Raises RequestError."""
    if isinstance(prompts, (str, bytes, Mapping)):
        return [prompts]
    if _is_array(prompts):
        array = np.asarray(prompts)
        return [array] if array.ndim == 1 and array.size else list(array) if array.ndim else [array]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"the prompts are a {type(prompts).__name__}; give text, token ids, or a list of either")
    found: list[Any] = list(prompts)
    is_one = bool(found) and isinstance(found[0], (int, np.integer))  # its token ids are checked one by one elsewhere
    return [found] if is_one else found


def given(prompt: AnyPrompt) -> Given:
    """The parts of one prompt; whether its tokens are the model's is checked elsewhere. Raises RequestError."""
    if not isinstance(prompt, Mapping):
        return Given(_token_ids(prompt))
    for name in prompt:
        if name not in FIELDS:
            raise RequestError(f"a prompt has no {name!r}{nearest(str(name), FIELDS)}")
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if (text is None and token_ids is None) or not isinstance(text, (str, type(None))):
        raise RequestError(f"the prompt is {dict(prompt)!r:.80}; give its text as 'prompt', or 'prompt_token_ids'")
    salt = prompt.get("cache_salt")
    if not isinstance(salt, (str, type(None))):
        raise RequestError(f"cache_salt is {salt!r:.60}; it must be text")
    return Given(text or "", None, salt) if token_ids is None else Given(_token_ids(token_ids), text, salt)


def _token_ids(prompt: Any) -> Prompt:
    """Arrays, JAX's among them, as numpy's, whose elements the host may look at."""
    if not _is_array(prompt):
        return prompt  # type: ignore[no-any-return]
    array = np.asarray(prompt)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        raise RequestError(
            f"the prompt is an array of {array.dtype} of shape {array.shape}; token ids are whole numbers of shape [T]"
        )
    return array  # type: ignore[return-value]


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "ndim")
