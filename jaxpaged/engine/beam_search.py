"""The beams of one request: which continuations go on, which have ended, and when nothing better can come.

Each beam is a sequence like any other, except that the host chooses its next token. Once all beams have said what their
likeliest next tokens are, the best continuations over all of them go on: a beam's first continuation is the sequence
itself, further ones are forks of it, and beams without any are finished. Same hypotheses as transformers' beam search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxpaged.engine.request import Request, Sequence
from jaxpaged.engine.scheduler import Scheduler
from jaxpaged.outputs import FinishReason
from jaxpaged.sampling_params import BeamSearchParams


class Hypothesis(NamedTuple):
    """A continuation of the prompt: its tokens, the sum of their log probabilities, that over a power of its length."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


class _Branch(NamedTuple):
    cumulative_logprob: np.float32
    parent: _Beam
    token_id: int


@dataclass(slots=True, eq=False)
class _Beam:
    """`candidates` are its likeliest next tokens and their log probabilities, None until they are known."""

    sequence: Sequence
    cumulative_logprob: np.float32
    candidates: tuple[np.ndarray, np.ndarray] | None = None


class BeamSearch:
    """Beam search over one request, a token of every beam at a time."""

    def __init__(self, request: Request, params: BeamSearchParams) -> None:
        """`request` has one sequence, whose params ask for enough logprobs."""
        (first,) = request.sequences
        self.params = params
        self._request = request
        self._max_tokens = first.max_tokens
        self._eos_token_ids = first.eos_token_ids
        self._beams = [_Beam(first, np.float32(0))]
        self._ended: list[Hypothesis] = []  # best first
        self._num_made = 1

    @property
    def is_ready(self) -> bool:
        """True once every beam's candidates are known."""
        return all(beam.candidates is not None for beam in self._beams)

    def hypotheses(self) -> list[Hypothesis]:
        """What has ended so far, best first; behind it, where the search was cut off, the beams as they are."""
        cut = [
            self._hypothesis(s.output_token_ids, beam.cumulative_logprob, s.finish_reason)
            for beam in self._beams
            if (s := beam.sequence).finish_reason in ("abort", "error")
        ]
        return [*self._ended, *cut][: self.params.beam_width]

    def take(self, sequence: Sequence, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """What may follow a beam: its likeliest tokens."""
        beam = next(b for b in self._beams if b.sequence is sequence)
        beam.candidates = (token_ids, logprobs)
        sequence.awaits_choice = True

    def advance(self, scheduler: Scheduler) -> None:
        """Choose among all candidates: a new set of beams, or the end."""
        branches = self._choose()
        is_over = not branches or not self._may_improve(branches[0].cumulative_logprob)
        for beam in self._beams:
            if is_over or not any(branch.parent is beam for branch in branches):
                scheduler.finish(beam.sequence, "stop")
        if is_over:
            self._beams = []
            return
        beams = []
        for parent in self._beams:
            own = [branch for branch in branches if branch.parent is parent]
            for branch in own[1:]:
                child = parent.sequence.fork(self._num_made, parent.sequence.seed)
                self._num_made += 1
                child.token_ids.append(branch.token_id)
                child.awaits_choice = False
                scheduler.fork(parent.sequence, child)
                beams.append(_Beam(child, branch.cumulative_logprob))
            for branch in own[:1]:
                parent.sequence.token_ids.append(branch.token_id)
                parent.sequence.awaits_choice = False
                beams.append(_Beam(parent.sequence, branch.cumulative_logprob))
        self._beams = beams
        self._request.sequences = [beam.sequence for beam in beams]

    def _choose(self) -> list[_Branch]:
        """The best branches that go on, best first; those among the best of all that end become hypotheses."""
        width = self.params.beam_width
        branches = [
            _Branch(beam.cumulative_logprob + logprob, beam, int(token_id))
            for beam in self._beams
            for token_id, logprob in zip(*(beam.candidates or ()), strict=True)
        ]
        branches.sort(key=lambda branch: -branch.cumulative_logprob)
        going_on: list[_Branch] = []
        for rank, branch in enumerate(branches):
            sequence = branch.parent.sequence
            is_last = sequence.num_output_tokens + 1 >= self._max_tokens
            if branch.token_id not in self._eos_token_ids and not is_last:
                going_on.append(branch)
            elif rank < width:
                reason: FinishReason = "stop" if branch.token_id in self._eos_token_ids else "length"
                token_ids = [*sequence.output_token_ids, branch.token_id]
                self._ended.append(self._hypothesis(token_ids, branch.cumulative_logprob, reason))
        self._ended = sorted(self._ended, key=lambda h: -h.score)[:width]
        return going_on[:width]

    def _may_improve(self, best: np.float32) -> bool:
        """Whether the best beam could still end above the worst hypothesis, judged as `early_stopping` says."""
        if len(self._ended) < self.params.beam_width:
            return True
        if self.params.early_stopping is True:
            return False
        length = self._beams[0].sequence.num_output_tokens + 1
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self._max_tokens
        return self._score(best, length) > self._ended[-1].score

    def _hypothesis(self, token_ids: list[int], total: np.float32, reason: FinishReason | None) -> Hypothesis:
        score = self._score(total, len(token_ids)) if token_ids else -math.inf
        return Hypothesis(token_ids, float(total), score, reason or "abort")

    def _score(self, total: np.float32, length: int) -> float:
        return float(total / np.float32(length**self.params.length_penalty))
