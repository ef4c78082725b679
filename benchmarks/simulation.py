"""The real scheduler and page pool at work for requests of given lengths, with no model: tokens are made up.

So what a step does to memory, and what planning it costs, can be measured at any scale on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxpaged import SamplingParams
from jaxpaged.engine import batch
from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Sequence as TokenSequence
from jaxpaged.engine.scheduler import Plan, Scheduler

VOCAB = 50_000


class Lengths(NamedTuple):
    """A request: prompt tokens, generated tokens."""

    prompt: int
    output: int


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
        seed: int = 0,
    ) -> None:
        """A pool of `num_pages`, the null page included, and a scheduler in front of it."""
        self.pool = PagePool(num_pages, page_size)
        self.max_pages = -(-max_model_len // page_size)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_chunks=batch.max_chunks(max_num_seqs),
            max_pages=self.max_pages,
        )
        self.buckets = batch.make_buckets(max_num_seqs, max_num_batched_tokens)
        self.finished: list[TokenSequence] = []
        self._random = np.random.default_rng(seed)
        self._num_added = 0

    def add(self, lengths: Lengths, n: int = 1) -> TokenSequence:
        """Queue a request with `n` completions of one length."""
        tokens = self._random.integers(0, VOCAB, lengths.prompt).tolist()
        params = SamplingParams(temperature=1.0)
        first = TokenSequence(str(self._num_added), 0, params, lengths.prompt, tokens, lengths.output, (0, 0))
        first.forks = [first.fork(index, (0, index)) for index in range(1, n)]
        self._num_added += 1
        self.scheduler.add(first)
        return first

    def step(self) -> Plan:
        """Plan a step and make up what it samples."""
        plan = self.scheduler.schedule()
        self.update(plan)
        return plan

    def timed_step(self, before: Plan) -> tuple[StepTimes, Plan]:
        """A step as the engine does it: packed too, and planned before the tokens of the step `before` are read."""
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        bucket = batch.choose(plan, self.buckets)
        feedback = {sequence: row for row, sequence in enumerate(sampled(before))}
        size, pages = self.pool.page_size, self.pool.num_pages
        batch.pack(plan, bucket, feedback, max_pages=self.max_pages, page_size=size, num_pages=pages)
        batch.pack_sampling(plan, bucket, VOCAB)
        packed = time.perf_counter()
        self.update(before)
        return StepTimes(planned - start, packed - planned, time.perf_counter() - packed), plan

    def update(self, plan: Plan) -> None:
        """Append a token to every sequence that samples, and finish those that are done."""
        sequences = list(sampled(plan))
        tokens = self._random.integers(0, VOCAB, len(sequences)).tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.num_pending_tokens -= 1
            sequence.token_ids.append(token)
            if sequence.num_output_tokens >= sequence.max_tokens:
                self.scheduler.finish(sequence, "length")
                self.finished.append(sequence)


def sampled(plan: Plan) -> Iterator[TokenSequence]:
    """The sequences that get a token from this step."""
    yield from (chunk.sequence for chunk in (*plan.decodes, *plan.chunks) if chunk.samples)
    yield from (fork.sequence for fork in plan.forks)
