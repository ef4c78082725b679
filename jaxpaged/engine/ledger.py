"""The requests under way: who they are, what finished steps make of them, and what their callers are told of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from jaxpaged.engine.beam_search import BeamSearch
from jaxpaged.engine.grammar import GrammarError
from jaxpaged.engine.report import Tracked, report, take_prompt_logprobs, token_logprobs
from jaxpaged.engine.request import Sequence
from jaxpaged.engine.runner import InFlight
from jaxpaged.engine.shards import Shards
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.model.sampling import Logprobs
from jaxpaged.outputs import FinishReason, RequestOutput

log = logging.getLogger("jaxpaged")

_NO_TOKEN = "the logits are not finite, or no token is left that structured_outputs and the other parameters allow"


class Ledger:
    """Owns `requests`, by id, from `add` to the output that says they have finished."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer | None, scrub: Callable[[list[int], int], None]) -> None:
        """`scrub(pages, shard)` zeroes pages in which a broken sequence may have left NaN."""
        self.requests: dict[str, Tracked] = {}
        self.undelivered: list[RequestOutput] = []  # for whoever steps next, or does now
        self.prompt_tokens = self.generation_tokens = 0
        self._shards, self._tokenizer, self._scrub = shards, tokenizer, scrub

    def add(self, tracked: Tracked) -> None:
        """Queue a request in the shard that suits it best."""
        request = tracked.request
        self.requests[request.request_id] = tracked
        self.prompt_tokens += len(request.prompt_token_ids)
        tracked.shard = self._shards.add(request.sequences[0])

    def abort(self, request_id: str) -> bool:
        """End a request now, in whatever state; its last output is among the undelivered. False for an unknown id."""
        tracked = self.requests.get(request_id)
        if tracked is None:
            return False
        self.finish(tracked, "abort", None)
        self.undelivered.append(self._report(tracked, time.monotonic()))
        return True

    def take(self, step: InFlight) -> list[RequestOutput]:
        """Take what a finished step sampled."""
        now = time.monotonic()
        tokens, healthy = step.outputs.tokens.tolist(), step.outputs.healthy.tolist()
        moved: dict[str, Tracked] = {}
        for part in step.prompt_parts:
            if (tracked := self.requests.get(part.sequence.request_id)) is not None:
                take_prompt_logprobs(tracked, part, self._tokenizer)
        step.embedded.take()
        for row, chunk in step.rows:
            sequence = chunk.sequence
            tracked = self.requests.get(sequence.request_id)
            if tracked is not None and tracked.request.metrics.first_scheduled_time is None:
                tracked.request.metrics.first_scheduled_time = now
            if not chunk.samples:
                continue
            sequence.num_pending_tokens -= 1
            if sequence.finished or tracked is None:
                continue  # stopped or aborted while this step was under way
            moved[sequence.request_id] = tracked
            confirmed = tracked.shard.scheduler.confirm(chunk, tokens[row:]) if chunk.draft else 0
            for at in range(row, row + 1 + confirmed):
                if not sequence.finished:
                    self._take_row(tracked, sequence, step, at, tokens[at], healthy[at], now)
        for tracked in moved.values():
            if tracked.beams is not None and not tracked.request.finished and tracked.beams.is_ready:
                tracked.beams.advance(tracked.shard.scheduler)
        reported = (self._report(tracked, now) for tracked in moved.values() if self._is_due(tracked))
        return list(reported)

    def finish(
        self, tracked: Tracked, reason: FinishReason, stop_reason: str | None, only: Sequence | None = None
    ) -> None:
        """End a request, or one of its completions; beams end together."""
        for sequence in tracked.request.sequences:
            is_meant = only is None or sequence is only or tracked.beams is not None
            if is_meant and not sequence.finished:
                self._end(tracked, sequence, reason, stop_reason)

    def _take_row(
        self, tracked: Tracked, sequence: Sequence, step: InFlight, row: int, token: int, is_healthy: bool, now: float
    ) -> None:
        """Take what a row says of a sequence's next token."""
        if not is_healthy:
            reason = "the logits are not finite" if sequence.matcher is None else _NO_TOKEN
            return self.finish(tracked, "error", reason, sequence)
        sequence.weight_versions.append(step.param_version)
        logprobs = step.outputs.logprobs
        try:
            if sequence.pooling is not None:
                self._end(tracked, sequence, "stop", None)
            elif tracked.beams is not None:
                self._take_candidates(tracked.beams, sequence, logprobs, row)
            else:
                self._take_token(tracked, sequence, token, logprobs, row)
        except GrammarError as error:
            return self.finish(tracked, "error", str(error), sequence)
        except Exception as error:  # a defect that this request meets is no reason to end the others
            log.exception("request %r failed and ends; please report this", sequence.request_id)
            return self.finish(tracked, "error", f"{type(error).__name__}: {error}", sequence)
        metrics = tracked.request.metrics
        metrics.first_token_time = metrics.first_token_time or now
        metrics.last_token_time = now

    def _take_token(self, tracked: Tracked, sequence: Sequence, token: int, logprobs: Logprobs, row: int) -> None:
        """Append a sampled token and see whether it ends the sequence."""
        params = sequence.params
        sequence.token_ids.append(token)
        self.generation_tokens += 1
        if params.logprobs is not None:
            entry = token_logprobs(logprobs, row, token, params.logprobs, self._tokenizer)
            sequence.logprobs.append(entry)
            sequence.cumulative_logprob += entry[token].logprob
        detokenizer = tracked.detokenizers[sequence.index]
        may_stop = sequence.num_output_tokens >= params.min_tokens
        if may_stop and token in sequence.eos_token_ids:
            return self._end(tracked, sequence, "stop", None)
        if may_stop and token in (params.stop_token_ids or ()):
            if params.include_stop_str_in_output:
                detokenizer.append([token])
            return self._end(tracked, sequence, "stop", token)
        stop = detokenizer.append([token])
        if stop is not None:
            return self._end(tracked, sequence, "stop", stop)
        if sequence.matcher is not None and sequence.matcher.take(token):
            return self._end(tracked, sequence, "stop", None)
        if sequence.num_output_tokens >= sequence.max_tokens:
            return self._end(tracked, sequence, "length", None)
        if sequence.matcher is not None:
            sequence.matcher.look_ahead()  # the device computes another step meanwhile

    def _take_candidates(self, beams: BeamSearch, sequence: Sequence, logprobs: Logprobs, row: int) -> None:
        """Remember what may follow a beam."""
        self.generation_tokens += 1
        wanted = sequence.params.logprobs or 0
        beams.take(sequence, np.asarray(logprobs.top_ids[row, :wanted]), np.asarray(logprobs.top[row, :wanted]))

    def _end(self, tracked: Tracked, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None) -> None:
        shard = tracked.shard
        pages = [page for page in sequence.pages if shard.pool.references(page) == 1]
        shard.scheduler.finish(sequence, reason, stop_reason)
        if reason == "error":
            self._scrub(pages, shard.index)
        if tracked.beams is None:
            tracked.detokenizers[sequence.index].finish()

    def _is_due(self, tracked: Tracked) -> bool:
        """Of completions that are to be ranked nothing is said before the end."""
        return tracked.request.finished or (tracked.output_kind != "final" and not tracked.request.params.ranks)

    def _report(self, tracked: Tracked, now: float) -> RequestOutput:
        """The request as its caller wants to see it; forgets it when it has finished."""
        request = tracked.request
        if request.finished:
            del self.requests[request.request_id]
            request.metrics.finished_time = now
        return report(tracked, self._tokenizer)
