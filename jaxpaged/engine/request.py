"""A request, what a caller asked for, and its sequences: the token ids of one completion each.

Sequences are what the scheduler schedules. A sequence has `num_tokens` and `num_computed_tokens`; everything else
(prefill, decode, chunks, preemption) follows from the distance between the two.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxpaged.engine.adapters import Adapter
from jaxpaged.engine.grammar import Matcher
from jaxpaged.outputs import FinishReason, Pooling, RequestMetrics, TokenLogprobs
from jaxpaged.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one completion, prompt included, and the pages they lie in.

    `num_pending_tokens` counts tokens that dispatched steps have sampled and the host has not read yet: they are on the
    device, at the end of the sequence. A computed token's K/V is in the pool or will be when dispatched steps have run.
    """

    request_id: str
    index: int
    params: SamplingParams
    prompt_len: int
    token_ids: list[int]
    max_tokens: int  # tokens to generate at most, the model's length considered
    seed: tuple[int, int]  # two 32-bit words
    eos_token_ids: frozenset[int] = frozenset()  # that end it; empty where they are ignored
    bad_words: tuple[tuple[int, ...], ...] = ()  # `params.bad_words` as token ids
    salt: bytes = b""  # sequences share pages only where their salts are equal,
    cache_salt: bytes = b""  # both this one, told by how keys are rotated, and the caller's own,
    adapter: Adapter | None = None  # and where both have this adapter or none
    priority: int = 0  # the lowest is served first
    arrival: int = 0  # the scheduler's count of requests
    chosen_on_host: bool = False  # each next token is, after its logits have been read
    awaits_choice: bool = False  # nothing is to be computed until the host has chosen a token
    score_temperature: float = 1.0  # its logprobs are those of the logits over this
    rope_len: int = 0  # tokens are rotated for max(this, position + 1), at first for the prompt's length
    long_after: int | None = None  # once longer than this, all keys are computed anew for `long` ropes
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int = 0  # found in the prefix cache when first admitted
    num_preemptions: int = 0
    pages: list[int] = field(default_factory=list)
    root: bytes = b""  # the pool's digest before the first page, from when this sequence began to be computed
    digests: list[bytes] = field(default_factory=list)  # of the full pages, as far as they are known to the pool
    page_table: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # `pages` in an array, zeros behind
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    forks: list[Sequence] = field(default_factory=list)  # of the same tokens, to go on from its next logits
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)  # of each generated token
    processor_states: dict[int, Any] = field(default_factory=dict)  # see engine/processors.py
    pooling: Pooling | None = None  # wanted is an embedding, and no token
    hidden_sum: np.ndarray | None = None  # float32 [M], over the tokens computed and read so far that `pooling` takes
    matcher: Matcher | None = None  # of the form that the answer must have, after the known tokens
    num_drafted: int = 0  # tokens that a dispatched step computes on trial, behind the computed ones
    draft_state: Any = None  # see engine/drafts.py

    draw: np.ndarray | None = field(init=False, default=None)  # temperature, top_k, top_p, min_p, seed; None: greedy
    may_draft: bool = field(init=False, default=False)  # whether each next token depends on the tokens before it alone
    _needs_history: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """See `rope_len`; and remember what every step asks."""
        self.rope_len = self.rope_len or self.prompt_len
        params = self.params
        self._needs_history = needs_history(params)
        by_others = self._needs_history or self.chosen_on_host or params.processor is not None
        self.may_draft = not by_others and self.pooling is None
        if not params.greedy:
            self.draw = np.array([params.temperature, params.top_k, params.top_p, params.min_p, *self.seed])

    @property
    def order(self) -> tuple[int, int, int]:
        """Who comes first: by priority, then by arrival."""
        return self.priority, self.arrival, self.index

    @property
    def prefix_salt(self) -> bytes:
        """What must be equal for pages to be shared through the prefix cache."""
        own = self.salt if self.adapter is None else self.adapter.salt + self.salt
        return bytes([len(own)]) + own + self.cache_salt

    @property
    def num_tokens(self) -> int:
        """Prompt and answer, tokens not read yet included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens that the host knows."""
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens that the host knows."""
        return self.token_ids[self.prompt_len :]

    @property
    def finished(self) -> bool:
        """True once nothing more will be computed for it."""
        return self.finish_reason is not None

    @property
    def awaits_tokens(self) -> bool:
        """True while nothing may be scheduled before pending tokens are read.

        They are the last ones it may have, or the next token's logits depend on them through the host, or they tell
        what becomes of its draft, or with them the sequence outgrows its ropes and all of it is computed anew.
        """
        if self.num_pending_tokens == 0:
            return False
        is_full = len(self.token_ids) + self.num_pending_tokens - self.prompt_len >= self.max_tokens
        return is_full or self._needs_history or self.chosen_on_host or self.num_drafted > 0 or self.outgrows_ropes

    @property
    def is_computed_whole(self) -> bool:
        """True where each token's hidden state is wanted, so that no prefix can be taken from the cache."""
        return self.params.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def embedding(self) -> np.ndarray | None:
        """Float32 [M], once all of the prompt has been read and the logits after it were finite."""
        if self.pooling is None or self.hidden_sum is None or self.finish_reason != "stop":
            return None
        return self.hidden_sum / self.prompt_len if self.pooling == "mean" else self.hidden_sum

    @property
    def outgrows_ropes(self) -> bool:
        """True once its keys must be computed anew with long ropes."""
        return self.long_after is not None and self.num_tokens > self.long_after

    def fork(self, index: int, seed: tuple[int, int]) -> Sequence:
        """Another sequence of the tokens known so far, nothing of it computed or shared yet."""
        return replace(
            self,
            index=index,
            seed=seed,
            token_ids=list(self.token_ids),
            num_computed_tokens=0,
            num_pending_tokens=0,
            num_preemptions=0,
            pages=[],
            digests=[],
            page_table=np.zeros(0, np.int32),
            forks=[],
            logprobs=list(self.logprobs),
            weight_versions=list(self.weight_versions),
            processor_states=dict(self.processor_states),
            matcher=None if self.matcher is None else self.matcher.copy(),
            num_drafted=0,
            draft_state=None,
        )


@dataclass(slots=True, eq=False)
class Request:
    """What a caller asked: a prompt, parameters, and one sequence for each completion."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    sequences: list[Sequence]
    seed: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        """True once all its sequences are."""
        return all(s.finished for s in self.sequences)


def needs_history(params: SamplingParams) -> bool:
    """True where a token's logits are changed on the host by the tokens before it."""
    return bool(
        params.bad_words
        or params.structured_outputs
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def seed_words(seed: int, index: int) -> tuple[int, int]:
    """The random key of completion `index` of a request with this seed, as two 32-bit words."""
    text = f"{seed}:{index}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
