"""Prompts cut to their last tokens, where a client asks for that with `truncate_prompt_tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import RequestError
from jaxpaged.server.async_engine import AsyncEngine

Prompts = Sequence[tuple[Any, str | None]]
"""Each with its text, where that is known."""


async def cut(engine: AsyncEngine, prompts: Prompts, most: int | None, room: int) -> Prompts:
    """The prompts with at most so many tokens each, or with as many as there is room for: -1. Raises RequestError."""
    if most is None:
        return prompts
    if most != -1 and not 1 <= most <= room:
        raise RequestError(f"truncate_prompt_tokens is {most:,}; it must be 1 to {room:,}, or -1 for as many as fit")
    most = room if most == -1 else most
    return [(await engine.offload(_last, engine.tokenizer, prompt, most), None) for prompt, _ in prompts]


def _last(tokenizer: Tokenizer | None, prompt: Any, most: int) -> Any:
    """The last tokens; of a text those that stand for it, between the special ones that begin and end any text."""
    if not isinstance(prompt, str) or tokenizer is None:
        return prompt if isinstance(prompt, str) else prompt[-most:]
    text = prompt[-most * tokenizer.longest_token :]  # what is far too long costs no more time than what is too long
    whole = tokenizer.encode(text)
    if len(whole) <= most and len(text) == len(prompt):
        return whole
    bare = tokenizer.encode(text, False)
    starts = range(len(whole) - len(bare) + 1)
    start = next((at for at in starts if whole[at : at + len(bare)] == bare), 0)
    front, back = whole[:start], whole[start + len(bare) :]
    left = most - len(front) - len(back)
    return [*front, *bare[-left:], *back] if left > 0 else bare[-most:]
