"""From the engine's outputs to OpenAI's objects: choices, logprobs, usage. Pure: no request's state is kept here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.outputs import Logprob, RequestOutput, TokenLogprobs

Json = dict[str, Any]


def usage(outputs: Sequence[RequestOutput], num_generated: int) -> Json:
    """Tokens of all prompts, each counted once, and of all completions."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": num_generated,
        "total_tokens": prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class TokenNames:
    """What tokens are called in logprobs: their text, or the id where that was asked for or is all there is."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self.tokenizer, self.as_ids = tokenizer, as_ids

    def name(self, token: int) -> str:
        """Half a character has no text: it is called by its bytes, as OpenAI does."""
        if self.tokenizer is None or self.as_ids:
            return f"token_id:{token}"
        text = self.tokenizer.token_text(token)
        if "\ufffd" in text and (raw := self.tokenizer.token_bytes(token)) is not None:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text

    def raw(self, token: int) -> list[int]:
        """The token's bytes."""
        if self.tokenizer is None:
            return []
        raw = self.tokenizer.token_bytes(token)
        return list(raw if raw is not None else self.tokenizer.token_text(token).encode())


def completion_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], names: TokenNames, offset: int, wanted: int
) -> Json:
    """The four lists of the completions endpoint; the first token of an echoed prompt has no logprob."""
    lists: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(token_ids, entries, strict=True):
        name = names.name(token)
        lists["tokens"].append(name)
        lists["token_logprobs"].append(None if entry is None else _finite(entry[token]))
        lists["top_logprobs"].append(None if entry is None else _by_name(entry, names, wanted))
        lists["text_offset"].append(offset)
        offset += len(names.tokenizer.token_text(token)) if names.tokenizer else 0
    return lists


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs], names: TokenNames, wanted: int
) -> list[Json]:
    """The chat endpoint's list: each token with the `wanted` likeliest in its place."""

    def one(token: int, logprob: Logprob) -> Json:
        return {"token": names.name(token), "logprob": _finite(logprob), "bytes": names.raw(token)}

    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        top = [one(other, logprob) for other, logprob in entry.items() if (logprob.rank or 0) <= wanted]
        top.sort(key=lambda other: -float(other["logprob"]))
        content.append(one(token, entry[token]) | {"top_logprobs": top})
    return content


def prompt_logprobs(entries: Sequence[TokenLogprobs | None] | None) -> list[Json | None] | None:
    """vLLM's form: per prompt token, token id -> logprob, rank and text."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _finite(lp), "rank": lp.rank, "decoded_token": lp.decoded_token}
            for token, lp in entry.items()
        }
        for entry in entries
    ]


def _by_name(entry: TokenLogprobs, names: TokenNames, wanted: int) -> dict[str, float]:
    """The token itself and the likeliest; of several of one name, the likeliest stands."""
    found: dict[str, float] = {}
    for place, (token, logprob) in enumerate(entry.items()):
        if place == 0 or (logprob.rank or 0) <= wanted:
            name = names.name(token)
            found[name] = max(found.get(name, -9999.0), _finite(logprob))
    return found


def _finite(logprob: Logprob) -> float:
    """JSON has no infinities; -9999 is what clients of vLLM know."""
    return max(logprob.logprob, -9999.0)
