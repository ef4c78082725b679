"""The engine: requests in, a step at a time, outputs out. Owns requests and their text; the rest has owners of its own.

`step` is schedule, dispatch, read, update. A step is dispatched before the one before it is read, so the host works on
step n while the device computes step n + 1; outputs therefore come one step late.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxpaged.config import EngineConfig
from jaxpaged.engine.detokenizer import Detokenizer
from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Request, Sequence, seed_words
from jaxpaged.engine.runner import InFlight, PromptPart, Runner
from jaxpaged.engine.scheduler import LONG_ROPE, Scheduler
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.engine.weights import fitting
from jaxpaged.errors import ConfigError, RequestError
from jaxpaged.model.params import Params
from jaxpaged.model.sampling import MAX_LOGPROBS, Logprobs
from jaxpaged.model.spec import Decoder, DynamicNtkScaling, LongRopeScaling
from jaxpaged.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from jaxpaged.sampling_params import SamplingParams

OutputKind = Literal["cumulative", "delta", "final"]
"""What `step` returns of a request that moved on: all so far, what is new, or nothing before its end."""

UpdatePolicy = Literal["keep", "recompute", "abort"]
"""What happens to requests under way when the weights change."""

Prompt = str | Seq[int]
"""Text, or token ids."""


class EngineStats(NamedTuple):
    """A snapshot. Page counts leave out the null page; token counts run from the engine's start."""

    num_waiting: int
    num_running: int
    pages_total: int
    pages_free: int
    pages_cached: int  # hold a prefix that nobody uses now
    pages_held: int
    page_size: int
    page_bytes: int
    kv_waste: float  # share of the held slots that held no token, over all steps so far
    num_preemptions: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_compilations: int
    max_model_len: int


@dataclass(slots=True, eq=False)
class _Tracked:
    """A request with what only the engine knows of it."""

    request: Request
    output_kind: OutputKind
    detokenizers: list[Detokenizer]
    num_reported: list[int]  # output tokens that earlier deltas held


class Engine:
    """Runs any number of requests together. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        spec: Decoder,
        params: Params,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Seq[int] = (),
        show_progress: bool = False,
    ) -> None:
        """Make the pool; with `config.warmup`, compile. Raises ConfigError where model, memory or config do not fit."""
        self.config = config or EngineConfig()
        self.spec = spec
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids) | (tokenizer.eos_token_ids if tokenizer else frozenset())
        self.runner = Runner(spec, params, self.config)
        self.max_model_len = self.runner.max_model_len
        cache = self.runner.cache
        self.pool = PagePool(cache.num_pages, cache.page_size, enable_caching=self.config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.runner.max_num_batched_tokens,
            max_num_chunks=self.runner.max_num_chunks,
            max_pages=self.runner.max_pages,
        )
        self._requests: dict[str, _Tracked] = {}
        self._in_flight: InFlight | None = None
        self._aborted: list[RequestOutput] = []
        self._random = random.Random(self.config.seed)
        self._prompt_tokens = self._generation_tokens = self._num_steps = 0
        self._slots_held = self._slots_wasted = 0
        if self.config.warmup:
            self.runner.warm_up(show_progress=show_progress)

    @property
    def params(self) -> Params:
        """The weights that the next step will use."""
        return self.runner.params

    @property
    def has_unfinished(self) -> bool:
        """True while `step` has something to do or to say."""
        return bool(self._requests or self._aborted or self._in_flight)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        output_kind: OutputKind = "cumulative",
        prompt_text: str | None = None,
    ) -> None:
        """Queue a request. Raises RequestError, with nothing queued, where it can never be served.

        `prompt_text` is reported as the prompt of one given as token ids.
        """
        params = params or SamplingParams()
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own")
        token_ids = self._encode(prompt)
        self._check(token_ids, params)
        text = prompt if isinstance(prompt, str) else prompt_text
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        bad_words = tuple(self._bad_words(params))
        sequences = [
            Sequence(
                request_id=request_id,
                index=index,
                params=params,
                prompt_len=len(token_ids),
                token_ids=list(token_ids),
                max_tokens=min(params.max_tokens or self.max_model_len, self.max_model_len - len(token_ids)),
                seed=seed_words(seed, index),
                eos_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
                bad_words=bad_words,
                salt=_rope_salt(self.spec, len(token_ids)),
                long_after=_long_after(self.spec, len(token_ids)),
            )
            for index in range(params.n)
        ]
        request = Request(request_id, text, token_ids, params, RequestMetrics(time.monotonic()), sequences)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(token_ids)
        detokenizers = [Detokenizer(self.tokenizer, params, token_ids) for _ in sequences]
        self._requests[request_id] = _Tracked(request, output_kind, detokenizers, [0] * params.n)
        self._prompt_tokens += len(token_ids)
        first, *first.forks = sequences  # the prompt is computed once
        self.scheduler.add(first)

    def abort(self, request_id: str) -> bool:
        """End a request now, in whatever state; its last output comes with the next step. False for an unknown id."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return False
        for sequence, detokenizer in zip(tracked.request.sequences, tracked.detokenizers, strict=True):
            if not sequence.finished:
                self._finish(sequence, detokenizer, "abort", None)
        self._aborted.append(self._report(tracked, time.monotonic()))
        return True

    def step(self) -> list[RequestOutput]:
        """Schedule and dispatch a step, then read the one before it: the outputs of requests that moved on."""
        plan = self.scheduler.schedule()
        before = self._in_flight
        self._in_flight = None if plan.is_empty else self.runner.dispatch(plan, before)
        self._num_steps += self._in_flight is not None
        self._measure_waste()
        outputs, self._aborted = self._aborted, []
        if before is not None:
            outputs += self._update(self.runner.read(before))
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests are not touched."""
        self.pool.reset_prefix_cache()

    def update_params(self, params: Params, policy: UpdatePolicy = "keep") -> None:
        """Use other weights from the next step on: the given arrays themselves where they lie as the old ones do.

        All of them or none: raises ConfigError that lists every leaf that does not fit. Nothing is compiled. Requests
        under way go on with the keys and values they have (`keep`), have them computed anew (`recompute`) or end
        (`abort`). Prefixes cached so far are forgotten. `CompletionOutput.weight_versions` tells which weights made
        which token: 0 the first, one more with each call.
        """
        if policy not in get_args(UpdatePolicy):
            raise ConfigError(f"policy is {policy!r}; known: {', '.join(get_args(UpdatePolicy))}")
        self.runner.params = fitting(params, self.runner.params, self.spec)
        self.runner.param_version += 1
        self.pool.reset_prefix_cache()
        if policy == "recompute":
            self.scheduler.preempt_all()
        elif policy == "abort":
            for request_id in list(self._requests):
                self.abort(request_id)

    def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        return EngineStats(
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            pages_total=self.pool.num_pages - 1,
            pages_free=self.pool.num_free,
            pages_cached=self.pool.num_cached,
            pages_held=self.pool.num_held,
            page_size=self.pool.page_size,
            page_bytes=self.runner.page_bytes,
            kv_waste=self._slots_wasted / self._slots_held if self._slots_held else 0.0,
            num_preemptions=self.scheduler.num_preemptions,
            prefix_cache_queries=self.scheduler.prefix_cache_queries,
            prefix_cache_hits=self.scheduler.prefix_cache_hits,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_steps=self._num_steps,
            num_compilations=self.runner.num_compilations,
            max_model_len=self.max_model_len,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the model came without a tokenizer; give the prompt as token ids")
            prompt = self.tokenizer.encode(prompt)
        if isinstance(prompt, (bytes, dict)) or not isinstance(prompt, (Seq, np.ndarray)):
            raise RequestError(f"the prompt is a {type(prompt).__name__}; give text or a list of token ids")
        vocab = self.spec.vocab_size
        for token in prompt:
            if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or not 0 <= token < vocab:
                raise RequestError(f"the prompt holds {token!r}; token ids of this model are 0 to {vocab - 1:,}")
        return [int(token) for token in prompt]

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        limit = self.max_model_len
        if not token_ids:
            raise RequestError("the prompt is empty; it needs at least 1 token")
        if len(token_ids) >= limit:
            raise RequestError(
                f"the prompt has {len(token_ids):,} tokens but max_model_len is {limit:,}, the answer included; "
                "shorten it or raise max_model_len"
            )
        vocab = self.spec.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and not 0 <= wanted <= min(MAX_LOGPROBS, vocab):
                raise RequestError(f"{name} is {wanted}; it must be 0 to {min(MAX_LOGPROBS, vocab)}")
        named = (*(params.logit_bias or ()), *(params.allowed_token_ids or ()), *(params.stop_token_ids or ()))
        if named and max(named) >= vocab:
            raise RequestError(f"token id {max(named):,} is named but this model's are 0 to {vocab - 1:,}")
        if (params.stop_strings or params.bad_words) and self.tokenizer is None:
            raise RequestError("stop strings and bad_words need a tokenizer, and the model came without one")

    def _bad_words(self, params: SamplingParams) -> Iterator[tuple[int, ...]]:
        """Each bad word's token ids, as it stands at the beginning and inside of a text."""
        for word in params.bad_words or ():
            if self.tokenizer is not None:
                forms = {tuple(self.tokenizer.encode(text, False)) for text in (word, " " + word.lstrip())}
                yield from (form for form in forms if form)

    def _update(self, step: InFlight) -> list[RequestOutput]:
        """Take what a finished step sampled."""
        now = time.monotonic()
        outputs = step.outputs
        tokens, healthy = outputs.tokens.tolist(), outputs.healthy.tolist()
        moved: dict[str, _Tracked] = {}
        for part in step.prompt_parts:
            self._take_prompt_logprobs(part)
        for row, (sequence, _, _, samples) in step.rows:
            tracked = self._requests.get(sequence.request_id)
            if tracked is not None and tracked.request.metrics.first_scheduled_time is None:
                tracked.request.metrics.first_scheduled_time = now
            if not samples:
                continue
            sequence.num_pending_tokens -= 1
            if sequence.finished or tracked is None:
                continue  # stopped or aborted while this step was under way
            moved[sequence.request_id] = tracked
            if not healthy[row]:
                self._finish(sequence, tracked.detokenizers[sequence.index], "error", "the logits are not finite")
                continue
            sequence.weight_versions.append(step.param_version)
            self._take_token(tracked, sequence, tokens[row], outputs.logprobs, row)
            metrics = tracked.request.metrics
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
        reported = (self._report(tracked, now) for tracked in moved.values() if self._is_due(tracked))
        return list(reported)

    def _take_token(self, tracked: _Tracked, sequence: Sequence, token: int, logprobs: Logprobs, row: int) -> None:
        """Append a sampled token and see whether it ends the sequence."""
        params = sequence.params
        sequence.token_ids.append(token)
        self._generation_tokens += 1
        if params.logprobs is not None:
            entry = self._token_logprobs(logprobs, row, token, params.logprobs)
            sequence.logprobs.append(entry)
            sequence.cumulative_logprob += entry[token].logprob
        detokenizer = tracked.detokenizers[sequence.index]
        may_stop = sequence.num_output_tokens >= params.min_tokens
        if may_stop and token in sequence.eos_token_ids:
            return self._finish(sequence, detokenizer, "stop", None)
        if may_stop and token in (params.stop_token_ids or ()):
            if params.include_stop_str_in_output:
                detokenizer.append([token])
            return self._finish(sequence, detokenizer, "stop", token)
        stop = detokenizer.append([token])
        if stop is not None:
            return self._finish(sequence, detokenizer, "stop", stop)
        if sequence.num_output_tokens >= sequence.max_tokens:
            self._finish(sequence, detokenizer, "length", None)

    def _finish(
        self, sequence: Sequence, detokenizer: Detokenizer, reason: FinishReason, stop_reason: str | int | None
    ) -> None:
        pages = [page for page in sequence.pages if self.pool.references(page) == 1]
        self.scheduler.finish(sequence, reason, stop_reason)
        if reason == "error":
            self.runner.scrub(pages)
        detokenizer.finish()

    def _is_due(self, tracked: _Tracked) -> bool:
        return tracked.output_kind != "final" or tracked.request.finished

    def _report(self, tracked: _Tracked, now: float) -> RequestOutput:
        """The request as its caller wants to see it; forgets it when it has finished."""
        request = tracked.request
        delta = tracked.output_kind == "delta"
        if request.finished:
            del self._requests[request.request_id]
            request.metrics.finished_time = now
        request.metrics.num_preemptions = sum(s.num_preemptions for s in request.sequences)
        completions = []
        for index, (sequence, detokenizer) in enumerate(zip(request.sequences, tracked.detokenizers, strict=True)):
            first = sequence.prompt_len + (tracked.num_reported[index] if delta else 0)
            wanted = sequence.params.logprobs is not None
            completions.append(
                CompletionOutput(
                    index=index,
                    text=detokenizer.delta() if delta else detokenizer.text,
                    token_ids=sequence.token_ids[first:],
                    cumulative_logprob=sequence.cumulative_logprob if wanted else None,
                    logprobs=sequence.logprobs[first - sequence.prompt_len :] if wanted else None,
                    weight_versions=sequence.weight_versions[first - sequence.prompt_len :],
                    finish_reason=sequence.finish_reason,
                    stop_reason=sequence.stop_reason,
                )
            )
            tracked.num_reported[index] = sequence.num_output_tokens
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=completions,
            finished=request.finished,
            prompt_logprobs=request.prompt_logprobs,
            metrics=request.metrics,
            num_cached_tokens=request.sequences[0].num_cached_tokens,
        )

    def _take_prompt_logprobs(self, part: PromptPart) -> None:
        tracked = self._requests.get(part.sequence.request_id)
        if tracked is None or tracked.request.prompt_logprobs is None:
            return
        wanted = part.sequence.params.prompt_logprobs or 0
        for row in range(part.num_rows):
            position = part.start + row
            token = part.sequence.token_ids[position]
            tracked.request.prompt_logprobs[position] = self._token_logprobs(part.logprobs, row, token, wanted)

    def _token_logprobs(self, logprobs: Logprobs, row: int, token: int, wanted: int) -> TokenLogprobs:
        """The token that stands there first, then the `wanted` likeliest."""
        found = {token: Logprob(float(logprobs.chosen[row]), int(logprobs.rank[row]), self._text(token))}
        for rank, (other, value) in enumerate(
            zip(logprobs.top_ids[row, :wanted].tolist(), logprobs.top[row, :wanted].tolist(), strict=True), 1
        ):
            if other not in found:
                found[other] = Logprob(value, rank, self._text(other))
        return found

    def _text(self, token: int) -> str | None:
        return self.tokenizer.token_text(token) if self.tokenizer is not None else None

    def _measure_waste(self) -> None:
        """A held slot is wasted while no token is in it: at most the rest of each sequence's last page."""
        size = self.pool.page_size
        last = {s.pages[-1]: len(s.pages) * size - s.num_computed_tokens for s in self.scheduler.running if s.pages}
        self._slots_held += self.pool.num_held * size
        self._slots_wasted += sum(last.values())


def request_ids(prefix: str = "request") -> Iterator[str]:
    """Names for callers that need none of their own."""
    return (f"{prefix}-{number}" for number in count())


def _rope_salt(spec: Decoder, prompt_len: int) -> bytes:
    """Keys rotated for the prompt's length are shared only with prompts of the same (kind of) length."""
    for block in spec.blocks:
        match block.mixer.rope and block.mixer.rope.scaling:
            case DynamicNtkScaling(original_max_positions=original) if prompt_len > original:
                return prompt_len.to_bytes(8, "little")
            case LongRopeScaling(original_max_positions=original) if prompt_len > original:
                return LONG_ROPE
    return b""


def _long_after(spec: Decoder, prompt_len: int) -> int | None:
    """The length past which a sequence changes over to long factors; None where it never does, or began with them."""
    for block in spec.blocks:
        match block.mixer.rope and block.mixer.rope.scaling:
            case LongRopeScaling(original_max_positions=original) if prompt_len <= original:
                return original
    return None
