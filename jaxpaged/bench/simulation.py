"""The real scheduler and page pool at work for requests of given lengths, with no model: tokens are made up.

So what a step does to memory, and what planning it costs, can be measured at any scale on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpaged import BeamSearchParams, RequestMetrics, SamplingParams
from jaxpaged.engine import batch
from jaxpaged.engine.beam_search import BeamSearch
from jaxpaged.engine.host_tier import HostTier
from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Request
from jaxpaged.engine.request import Sequence as TokenSequence
from jaxpaged.engine.scheduler import Plan, Scheduler

VOCAB = 50_000


class Memory(NamedTuple):
    """Sequences under way, slots that they hold, those with a token in them, slots held if nothing were shared."""

    num_running: int
    held: int
    used: int
    unshared: int


class StepTimes(NamedTuple):
    """Seconds of one step's host work."""

    plan: float
    pack: float
    update: float


class Simulation:
    """Requests through a scheduler, a step at a time."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        max_num_seqs: int = 1024,
        max_num_batched_tokens: int = 8192,
        max_model_len: int = 2048,
        host_pages: int = 0,
        seed: int = 0,
    ) -> None:
        """A pool of `num_pages`, the null page included, a scheduler before it and `host_pages` behind it."""
        self.pool = PagePool(num_pages, page_size, host=HostTier(host_pages) if host_pages else None)
        self.max_pages = -(-max_model_len // page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_chunks=batch.max_chunks(max_num_seqs),
            max_pages=self.max_pages,
        )
        self.buckets = batch.make_buckets(max_num_seqs, max_num_batched_tokens)
        self._beams: dict[str, BeamSearch] = {}
        self._random = np.random.default_rng(seed)
        self._num_added = 0

    def add(self, prompt: int, outputs: Sequence[int]) -> list[TokenSequence]:
        """Queue a request: the length of its prompt, and that of each of its completions."""
        first = self._sequence(prompt, outputs[0])
        first.forks = [first.fork(index, (0, index)) for index in range(1, len(outputs))]
        for fork, length in zip(first.forks, outputs[1:], strict=True):
            fork.max_tokens = length
        sequences = [first, *first.forks]
        self.scheduler.add(first)
        return sequences

    def add_beams(self, prompt: int, output: int, width: int) -> None:
        """Queue a beam search that goes on to the end."""
        first = self._sequence(prompt, output)
        first.chosen_on_host = True
        request = Request(first.request_id, None, first.token_ids, first.params, RequestMetrics(0.0), [first])
        self._beams[first.request_id] = BeamSearch(request, BeamSearchParams(width, max_tokens=output))
        self.scheduler.add(first)

    @property
    def is_done(self) -> bool:
        """True once nothing is left to compute."""
        return not self.scheduler.running and not self.scheduler.waiting

    def memory(self) -> Memory:
        """What lies in the pool now."""
        size, running = self.pool.page_size, self.scheduler.running
        last = {s.pages[-1]: len(s.pages) * size - s.num_computed_tokens for s in running}
        held = self.pool.num_held * size
        unshared = sum(len(s.pages) for s in running) * size
        return Memory(len(running), held, held - sum(last.values()), unshared)

    def step(self) -> Plan:
        """Plan a step and make up what it samples."""
        plan = self.scheduler.schedule()
        self.update(plan)
        return plan

    def run(self) -> None:
        """Steps until all have finished."""
        while not self.is_done:
            self.step()

    def timed_step(self, before: Plan) -> tuple[StepTimes, Plan]:
        """A step as the engine does it: packed too, and planned before the tokens of the step `before` are read."""
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        bucket = batch.choose([plan], self.buckets)
        feedback = {sequence: row for row, sequence in enumerate(sampled(before))}
        size, pages = self.pool.page_size, self.pool.num_pages
        batch.pack(plan, bucket, feedback, max_pages=self.max_pages, page_size=size, num_pages=pages)
        batch.pack_sampling(plan, bucket, VOCAB)
        for moves in (batch.pack_moves_out(plan), batch.pack_moves_in(plan, pages), batch.pack_copies(plan, pages)):
            list(moves)
        packed = time.perf_counter()
        self.update(before)
        return StepTimes(planned - start, packed - planned, time.perf_counter() - packed), plan

    def update(self, plan: Plan) -> None:
        """Append a token to every sequence that samples, and finish those that are done."""
        searches = set()
        for sequence in sampled(plan):
            if beams := self._beams.get(sequence.request_id):
                sequence.num_pending_tokens -= 1
                beams.take(sequence, *self._likeliest(beams.params.beam_width))
                searches.add(beams)
        for beams in searches:
            if beams.is_ready:
                beams.advance(self.scheduler)
        sequences = [s for s in sampled(plan) if s.request_id not in self._beams]
        tokens = self._random.integers(0, VOCAB, len(sequences)).tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.num_pending_tokens -= 1
            sequence.token_ids.append(token)
            if sequence.num_output_tokens >= sequence.max_tokens:
                self.scheduler.finish(sequence, "length")

    def _sequence(self, prompt: int, output: int) -> TokenSequence:
        tokens = self._random.integers(0, VOCAB, prompt).tolist()
        self._num_added += 1
        return TokenSequence(str(self._num_added), 0, SamplingParams(temperature=1.0), prompt, tokens, output, (0, 0))

    def _likeliest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Made-up tokens and log probabilities: uniform shares of what is left, so that the first have 1/2, 1/4, ..."""
        left = np.cumprod(self._random.uniform(size=4 * count))
        shares = np.concatenate([[1 - left[0]], left[:-1] - left[1:]])
        best = np.sort(shares)[::-1][:count]
        tokens = self._random.choice(VOCAB, count, replace=False)
        return tokens, np.log(np.maximum(best, 1e-30)).astype(np.float32)


def sampled(plan: Plan) -> Iterator[TokenSequence]:
    """The sequences that get a token from this step."""
    yield from (chunk.sequence for chunk in (*plan.decodes, *plan.chunks) if chunk.samples)
    yield from (fork.sequence for fork in plan.forks)
