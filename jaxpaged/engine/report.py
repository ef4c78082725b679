"""What callers are told of a request: completions so far, what is new, logprobs, hypotheses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from jaxpaged.engine.beam_search import BeamSearch
from jaxpaged.engine.detokenizer import Detokenizer
from jaxpaged.engine.request import Request, Sequence
from jaxpaged.engine.runner import PromptPart
from jaxpaged.engine.shards import Shard
from jaxpaged.engine.tokenizer import Tokenizer
from jaxpaged.model.sampling import Logprobs
from jaxpaged.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from jaxpaged.sampling_params import SamplingParams

OutputKind = Literal["cumulative", "delta", "final"]
"""What `step` returns of a request that moved on: all so far, what is new, or nothing before its end."""


@dataclass(slots=True, eq=False)
class Tracked:
    """A request under way with what only the engine knows of it."""

    request: Request
    output_kind: OutputKind
    detokenizers: list[Detokenizer]  # one per sequence; none for beams, whose text is made in the end
    num_reported: list[int]  # output tokens that earlier deltas held
    beams: BeamSearch | None = None
    shard: Shard = field(init=False)  # where it was queued


def report(tracked: Tracked, tokenizer: Tokenizer | None) -> RequestOutput:
    """The request as its caller wants to see it now; counts what deltas hold as reported."""
    request = tracked.request
    request.metrics.num_preemptions = sum(s.num_preemptions for s in request.sequences)
    completions = _completions(tracked) if tracked.beams is None else _hypotheses(tracked, tracked.beams, tokenizer)
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=completions,
        finished=request.finished,
        prompt_logprobs=request.prompt_logprobs,
        metrics=request.metrics,
        num_cached_tokens=request.sequences[0].num_cached_tokens,
        embedding=request.sequences[0].embedding,
    )


def token_logprobs(logprobs: Logprobs, row: int, token: int, wanted: int, tokenizer: Tokenizer | None) -> TokenLogprobs:
    """The token that stands there first, then the `wanted` likeliest."""

    def text(token: int) -> str | None:
        return tokenizer.token_text(token) if tokenizer is not None else None

    found = {token: Logprob(float(logprobs.chosen[row]), int(logprobs.rank[row]), text(token))}
    for rank, (other, value) in enumerate(
        zip(logprobs.top_ids[row, :wanted].tolist(), logprobs.top[row, :wanted].tolist(), strict=True), 1
    ):
        if other not in found:
            found[other] = Logprob(value, rank, text(other))
    return found


def take_prompt_logprobs(tracked: Tracked, part: PromptPart, tokenizer: Tokenizer | None) -> None:
    """Put a part of a prompt's logprobs where it belongs."""
    found = tracked.request.prompt_logprobs
    if found is None:
        return
    tokens, wanted = part.sequence.token_ids, part.sequence.params.prompt_logprobs or 0
    for row, position in enumerate(range(part.start, part.start + part.num_rows), part.first_row):
        found[position] = token_logprobs(part.logprobs, row, tokens[position], wanted, tokenizer)


def _completions(tracked: Tracked) -> list[CompletionOutput]:
    delta, params = tracked.output_kind == "delta", tracked.request.params
    sequences = tracked.request.sequences
    chosen: Iterable[int] = range(len(sequences))
    if params.ranks:
        chosen = sorted(chosen, key=lambda index: _rank(sequences[index]))[: params.n]
    completions = []
    for place, index in enumerate(chosen):
        sequence, detokenizer = sequences[index], tracked.detokenizers[index]
        first = sequence.prompt_len + (tracked.num_reported[index] if delta else 0)
        wanted = params.logprobs is not None
        completions.append(
            CompletionOutput(
                index=place,
                text=detokenizer.delta() if delta else detokenizer.text,
                token_ids=sequence.token_ids[first:],
                cumulative_logprob=sequence.cumulative_logprob if wanted or params.ranks else None,
                logprobs=sequence.logprobs[first - sequence.prompt_len :] if wanted else None,
                weight_versions=sequence.weight_versions[first - sequence.prompt_len :],
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
            )
        )
        tracked.num_reported[index] = sequence.num_output_tokens
    return completions


def _rank(sequence: Sequence) -> tuple[bool, float]:
    """The likeliest first, behind all that ended by themselves what was cut off."""
    return sequence.finish_reason in ("abort", "error"), -sequence.cumulative_logprob


def _hypotheses(tracked: Tracked, beams: BeamSearch, tokenizer: Tokenizer | None) -> list[CompletionOutput]:
    completions = []
    for index, hypothesis in enumerate(beams.hypotheses()):
        shown = hypothesis.token_ids[:-1] if hypothesis.finish_reason == "stop" else hypothesis.token_ids
        detokenizer = Detokenizer(tokenizer, SamplingParams(), tracked.request.prompt_token_ids)
        detokenizer.append(shown)
        detokenizer.finish()
        completions.append(
            CompletionOutput(
                index=index,
                text=detokenizer.text,
                token_ids=hypothesis.token_ids,
                cumulative_logprob=hypothesis.cumulative_logprob,
                finish_reason=hypothesis.finish_reason,
            )
        )
    return completions
