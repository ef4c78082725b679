"""What comes back for a request: plain data, vLLM's names. Filled by the engine, read by callers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]

Pooling = Literal["mean", "last"]
"""How the hidden states of a text's tokens become its embedding: their mean, or the last one."""


class Logprob(NamedTuple):
    """One token's log probability at one place, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""At one place: token id -> Logprob, the token that stands there first, then the most likely ones by rank."""


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of one monotonic clock; None until they did."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival until the first of its tokens was scheduled."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival until the first generated token was known."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt. `stop_reason` is the stop string or stop token id that ended it, None for eos.

    `weight_versions` says for each token how often weights had been changed when it was made, by
    `Engine.update_params` or an adapter's by `update_lora`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        """True once nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions so far; the first prompt token has no logprobs: `[None, {...}, ...]`.

    `embedding` is what a request with a pooling asked for, float32 [dim], as the model gives it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    embedding: np.ndarray | None = field(default=None, compare=False)
