"""Load on an OpenAI-compatible server: who was answered when, and what that comes to. Names are vLLM's.

ttft   seconds from a request's sending to its first text
itl    seconds between two pieces of its text
tpot   seconds of each token after the first, on average
e2el   seconds from its sending to its end
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.bench.http_client import HTTPError, Server, post_events
from jaxpaged.bench.workload import Ask

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(slots=True)
class Answer:
    """What became of one request."""

    sent: float  # seconds from the start
    prompt_tokens: int = 0
    output_tokens: int = 0
    times: list[float] = field(default_factory=list)  # of its pieces of text
    ended: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """See above."""
        return self.times[0] - self.sent

    @property
    def itl(self) -> list[float]:
        """Each of them."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """None where there was one token."""
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def e2el(self) -> float:
        """See above."""
        return self.ended - self.sent

    def meets(self, limits: Mapping[str, float]) -> bool:
        """True where it was answered and none of its times, each of its gaps too, is above its limit in seconds."""
        if self.error is not None:
            return False
        worst = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "itl": max(self.itl, default=0.0), "e2el": self.e2el}
        return all(worst[name] <= limit for name, limit in limits.items())


class Target(NamedTuple):
    """Where and how to ask."""

    server: Server
    endpoint: str
    model: str
    extra: Mapping[str, Any] = {}

    def body(self, ask: Ask) -> dict[str, Any]:
        """The request, as a chat or a completion."""
        if self.endpoint.endswith("/chat/completions"):
            what: dict[str, Any] = {"messages": [{"role": "user", "content": ask.prompt}]}
        else:
            what = {"prompt": ask.prompt}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "max_tokens": ask.output, **what, **options, **self.extra}


async def load(
    target: Target, asks: Sequence[Ask], max_concurrency: int | None, told: Callable[[], object]
) -> tuple[list[Answer], float]:
    """Send each request when its time has come, at most so many at once, and say how long all took."""
    seats: AbstractAsyncContextManager[Any] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    start = time.perf_counter()

    async def one(ask: Ask) -> Answer:
        await asyncio.sleep(start + ask.arrival - time.perf_counter())
        async with seats:
            answer = await _ask(target, ask, start)
        told()
        return answer

    answers = await asyncio.gather(*map(one, asks))
    return list(answers), time.perf_counter() - start


async def _ask(target: Target, ask: Ask, start: float) -> Answer:
    answer = Answer(time.perf_counter() - start)
    try:
        async with aclosing(post_events(target.server, target.endpoint, target.body(ask))) as events:
            async for event in events:
                now = time.perf_counter() - start
                if usage := event.get("usage"):
                    answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                if any(_text(choice) for choice in event.get("choices") or ()):
                    answer.times.append(now)
        answer.ended = time.perf_counter() - start
        answer.output_tokens = answer.output_tokens or len(answer.times)  # a server that gives no usage
        if not answer.times:
            answer.error = "the answer held no text"
    except (HTTPError, OSError, LookupError, TypeError, AttributeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def summary(
    answers: Sequence[Answer], seconds: float, limits: Mapping[str, float], percentiles: Sequence[float]
) -> dict[str, Any]:
    """All that was measured, times in milliseconds."""
    good = [answer for answer in answers if answer.error is None]
    prompt, output = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
    }
    if limits:
        found["request_goodput"] = sum(answer.meets(limits) for answer in good) / seconds
    seen = {
        "ttft": [answer.ttft for answer in good],
        "tpot": [answer.tpot for answer in good if answer.tpot is not None],
        "itl": [gap for answer in good for gap in answer.itl],
        "e2el": [answer.e2el for answer in good],
    }
    for name in METRICS:
        values = 1e3 * np.asarray(seen[name] or [math.nan])
        found |= {
            f"mean_{name}_ms": values.mean(),
            f"median_{name}_ms": np.median(values),
            f"std_{name}_ms": values.std(),
        }
        found |= {f"p{p:g}_{name}_ms": np.percentile(values, p) for p in percentiles}
    return {name: _rounded(value) for name, value in found.items()}


def details(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of each request in order; times in seconds."""
    return {
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "start_times": [_rounded(answer.sent) for answer in answers],
        "ttfts": [_rounded(answer.ttft) if answer.times else None for answer in answers],
        "itls": [[_rounded(gap) for gap in answer.itl] for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def _rounded(value: Any) -> Any:
    """JSON knows no NaN, and no clock is better than a microsecond."""
    if isinstance(value, int):
        return value
    return round(float(value), 6) if math.isfinite(value) else None
