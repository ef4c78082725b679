"""From what callers ask to requests: encodes and checks prompts, makes sequences. Owns the seeds of who brings none."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import get_args

import numpy as np

from jaxpaged.config import EngineConfig
from jaxpaged.engine.adapters import Adapter
from jaxpaged.engine.grammar import Grammar, Grammars
from jaxpaged.engine.prompts import Prompt
from jaxpaged.engine.request import Request, Sequence, seed_words
from jaxpaged.engine.scheduler import LONG_ROPE
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.errors import RequestError, TooLongError
from jaxpaged.model.sampling import MAX_LOGPROBS
from jaxpaged.model.spec import Decoder, DynamicNtkScaling, LongRopeScaling
from jaxpaged.outputs import Pooling, RequestMetrics
from jaxpaged.sampling_params import BeamSearchParams, SamplingParams

EMBEDDING = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
"""The parameters of a request for an embedding: it ends where its one token would be taken."""


class Intake:
    """Makes requests that the engine can serve, and refuses all others with a RequestError."""

    def __init__(
        self,
        spec: Decoder,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        """For one engine: `max_model_len` is what it found to fit."""
        self.spec = spec
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self._random = random.Random(config.seed)
        self._grammars = Grammars(tokenizer, eos_token_ids, spec.vocab_size)

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        prompt_text: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: Pooling | None = None,
        grammar: Grammar | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """A request of as many sequences as completions: the first is to be computed, the others forked from it."""
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise RequestError(
                f"priority is {priority} but scheduling_policy is {self.config.scheduling_policy!r}; "
                "leave it out, or set scheduling_policy='priority'"
            )
        if pooling is not None and (pooling not in get_args(Pooling) or params is not EMBEDDING):
            raise RequestError(f"pooling is {pooling!r}; known: {', '.join(get_args(Pooling))}, each without params")
        token_ids = self.encode(prompt, params)
        eos_token_ids = frozenset[int]() if params.ignore_eos else self.eos_token_ids
        grammar = grammar or self.grammar(params)
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        first = Sequence(
            request_id=request_id,
            index=0,
            params=replace(params, logprobs=0) if params.ranks and params.logprobs is None else params,
            prompt_len=len(token_ids),
            token_ids=list(token_ids),
            max_tokens=min(params.max_tokens or self.max_model_len, self.max_model_len - len(token_ids)),
            seed=seed_words(seed, 0),
            eos_token_ids=eos_token_ids,
            bad_words=tuple(self._bad_words(params)),
            salt=_rope_salt(self.spec, len(token_ids)),
            long_after=_long_after(self.spec, len(token_ids)),
            cache_salt=(cache_salt or "").encode(),
            adapter=adapter,
            priority=priority,
            pooling=pooling,
            matcher=None if grammar is None else grammar.matcher(may_end=bool(eos_token_ids)),
        )
        first.forks = [first.fork(index, seed_words(seed, index)) for index in range(1, params.num_completions)]
        text = prompt if isinstance(prompt, str) else prompt_text
        metrics = RequestMetrics(time.monotonic())
        request = Request(request_id, text, token_ids, params, metrics, [first, *first.forks], seed)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(token_ids)
        return request

    def beam_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: BeamSearchParams,
        *,
        prompt_text: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """A request of one sequence, the first beam, that reports each step's likeliest tokens and chooses none."""
        # The best `beam_width` continuations that do not end are among each beam's so many likeliest.
        wanted = params.beam_width + (0 if params.ignore_eos else len(self.eos_token_ids))
        if wanted > min(MAX_LOGPROBS, self.spec.vocab_size):
            raise RequestError(
                f"beam_width is {params.beam_width}, which takes the {wanted} likeliest tokens of each beam; "
                f"lower it by {wanted - min(MAX_LOGPROBS, self.spec.vocab_size)}"
            )
        sampling = SamplingParams(
            temperature=0.0, max_tokens=params.max_tokens, ignore_eos=params.ignore_eos, logprobs=wanted
        )
        request = self.request(
            request_id,
            prompt,
            sampling,
            prompt_text=prompt_text,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        (first,) = request.sequences
        first.chosen_on_host = True
        first.score_temperature = params.temperature or 1.0
        return request

    def score_request(
        self, request_id: str, before: Seq[int], after: Seq[int], adapter: Adapter | None = None
    ) -> Request:
        """A request whose prompt logprobs are those of all tokens but the last, which it samples.

        Keys are rotated as they were when `after` was sampled after the prompt `before`.
        """
        *tokens, last = *before, *after
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=0,
            allowed_token_ids=(last,),
        )
        request = self.request(request_id, tokens, params, adapter=adapter)
        (first,) = request.sequences
        first.rope_len = len(before)
        first.salt, first.long_after = _rope_salt(self.spec, len(before)), _long_after(self.spec, len(before))
        return request

    def encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's token ids, once they and `params` are known to fit. Changes nothing: any thread may ask."""
        tokens = self.tokens(prompt, room=self.max_model_len - (params is not EMBEDDING))
        self._check(params)
        return tokens

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """What the answer must look like, compiled; None where it may look like anything. Any thread may ask.

        Raises RequestError, and QueueFullError where others' forms take too long.
        """
        return None if params.form is None else self._grammars.get(params.form)

    def tokens(self, prompt: Prompt, *, room: int, add_special_tokens: bool = True) -> list[int]:
        """Token ids of this model, from 1 to `room` of them.

        What is far too long is refused before time is spent on each of its characters or tokens.
        """
        limit = self.max_model_len
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the model came without a tokenizer; give the prompt as token ids")
            if len(prompt) > limit * self.tokenizer.longest_token:
                raise TooLongError(
                    f"the prompt has {len(prompt):,} characters but max_model_len is {limit:,} tokens of at most "
                    f"{self.tokenizer.longest_token:,} characters; shorten it or raise max_model_len"
                )
            prompt = self.tokenizer.encode(prompt, add_special_tokens)
        if isinstance(prompt, (bytes, dict)) or not isinstance(prompt, (Seq, np.ndarray)):
            raise RequestError(f"the prompt is a {type(prompt).__name__}; give text or a list of token ids")
        if len(prompt) == 0:
            raise RequestError("the prompt is empty; it needs at least 1 token")
        if len(prompt) > room:
            included = ", the answer included" if room < limit else ""
            raise TooLongError(
                f"the prompt has {len(prompt):,} tokens but max_model_len is {limit:,}{included}; "
                "shorten it or raise max_model_len"
            )
        vocab = self.spec.vocab_size
        for token in prompt:
            if not isinstance(token, (int, np.integer)) or isinstance(token, bool) or not 0 <= token < vocab:
                raise RequestError(f"the prompt holds {token!r}; token ids of this model are 0 to {vocab - 1:,}")
        return [int(token) for token in prompt]

    def _check(self, params: SamplingParams) -> None:
        vocab = self.spec.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and not 0 <= wanted <= min(MAX_LOGPROBS, vocab):
                raise RequestError(f"{name} is {wanted}; it must be 0 to {min(MAX_LOGPROBS, vocab)}")
        named = (*(params.logit_bias or ()), *(params.allowed_token_ids or ()), *(params.stop_token_ids or ()))
        if named and max(named) >= vocab:
            raise RequestError(f"token id {max(named):,} is named but this model's are 0 to {vocab - 1:,}")
        ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self.eos_token_ids)
        if params.min_tokens > 0 and params.allowed_token_ids and ends.issuperset(params.allowed_token_ids):
            raise RequestError(
                f"min_tokens is {params.min_tokens:,} but each of the {len(params.allowed_token_ids):,} allowed tokens "
                "ends the answer; allow another, or set min_tokens to 0"
            )
        if (params.stop_strings or params.bad_words) and self.tokenizer is None:
            raise RequestError("stop strings and bad_words need a tokenizer, and the model came without one")

    def _bad_words(self, params: SamplingParams) -> Iterator[tuple[int, ...]]:
        """Each bad word's token ids, as it stands at the beginning and inside of a text."""
        for word in params.bad_words or ():
            if self.tokenizer is not None:
                forms = {tuple(self.tokenizer.encode(text, False)) for text in (word, " " + word.lstrip())}
                yield from (form for form in forms if form)


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
