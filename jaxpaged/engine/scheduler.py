"""Which sequences compute how many tokens this step. Owns waiting and running; pages belong to PagePool.

One rule: every running sequence, oldest first, catches up with its tokens under one budget; what is left admits waiting
ones. A sequence one token behind is a decode, one further behind computes a chunk of its prompt. When pages run out the
youngest running sequence is preempted: its pages go back, and it waits, at the head of the queue, to be computed again.
The oldest is never preempted for another, and each sequence fits the pool alone, so every step makes progress.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Sequence
from jaxpaged.outputs import FinishReason

LONG_ROPE = b"long"
"""The salt of sequences whose keys are rotated with the long factors of a `LongRopeScaling`."""


class Chunk(NamedTuple):
    """`length` tokens of a sequence from position `start`; `samples` where the last of them asks for the next token."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


class Plan(NamedTuple):
    """One step's decision: sequences with one token each, and chunks of more."""

    decodes: list[Chunk]
    chunks: list[Chunk]

    @property
    def is_empty(self) -> bool:
        """True where nothing can be computed now."""
        return not self.decodes and not self.chunks

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of the chunks together."""
        return sum(c.length for c in self.chunks)


class Scheduler:
    """Continuous batching, first come first served."""

    def __init__(
        self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int, max_num_chunks: int, max_pages: int
    ) -> None:
        """Limits of one step: sequences, tokens, chunks. `max_pages` is the width of a page table."""
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_chunks = max_num_chunks
        self.max_pages = max_pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens looked up
        self.prefix_cache_hits = 0  # tokens found

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. That it can fit the pool is the caller's check."""
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        """Decide the next step and take the pages it needs; counts its tokens as computed."""
        plan = Plan([], [])
        budget = self.max_num_batched_tokens
        preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            self._lengthen(sequence)
            behind = sequence.num_tokens - sequence.num_computed_tokens
            length = min(behind, budget)
            if sequence.awaits_tokens or length == 0 or (length > 1 and len(plan.chunks) == self.max_num_chunks):
                index += 1
                continue
            while not self._grow(sequence, sequence.num_computed_tokens + length):
                preempted = True
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                budget -= length
                self._put(plan, sequence, length)
                index += 1
        if not preempted:
            self._admit(plan, budget)
        return plan

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """The one way out, for any reason, from any state: gives the pages back, after an error as if never filled."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if reason == "error":
            self.pool.unpublish(sequence.pages)
        else:
            self._publish(sequence)
        self._release(sequence)

    def _admit(self, plan: Plan, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.num_pending_tokens > 0:  # preempted a moment ago; its last token is still to be read
                return
            self._lengthen(sequence)
            self._start(sequence)
            length = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            # All its pages must be there, and one for each that runs: to be preempted at once would help nobody.
            missing = self._pages_for(sequence.num_tokens) - len(sequence.pages)
            fits = missing + len(self.running) <= self.pool.num_available
            crowded = length > 1 and len(plan.chunks) == self.max_num_chunks
            if crowded or not fits or not self._grow(sequence, sequence.num_computed_tokens + length):
                self._release(sequence)
                return
            self.waiting.popleft()
            self.running.append(sequence)
            if sequence.params.prompt_logprobs is None:
                self.prefix_cache_queries += sequence.num_tokens
                self.prefix_cache_hits += sequence.num_computed_tokens
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            budget -= length
            self._put(plan, sequence, length)

    def _lengthen(self, sequence: Sequence) -> None:
        """Where a sequence outgrows what its keys were rotated for, begin again with the long rotation."""
        if sequence.outgrows_ropes and sequence.num_pending_tokens == 0:
            self._release(sequence)
            sequence.rope_len, sequence.salt, sequence.long_after = sequence.num_tokens, LONG_ROPE, None

    def _start(self, sequence: Sequence) -> None:
        """Give a waiting sequence the cached pages of its prefix, if any; one that wants prompt logprobs takes none."""
        sequence.page_table = np.zeros(self.max_pages, np.int32)
        if sequence.params.prompt_logprobs is not None:
            return
        pages, sequence.digests = self.pool.match(sequence.token_ids, sequence.salt)
        self._extend(sequence, pages)
        sequence.num_computed_tokens = len(pages) * self.pool.page_size

    def _put(self, plan: Plan, sequence: Sequence, length: int) -> None:
        start = sequence.num_computed_tokens
        samples = start + length == sequence.num_tokens
        (plan.chunks if length > 1 else plan.decodes).append(Chunk(sequence, start, length, samples))
        sequence.num_computed_tokens += length
        sequence.num_pending_tokens += samples
        self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Make known every page full of known tokens. Steps run in order, so a later one may read it already."""
        size = self.pool.page_size
        full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // size
        for index in range(len(sequence.digests), full):
            parent = sequence.digests[-1] if sequence.digests else None
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            sequence.digests.append(self.pool.publish(sequence.pages[index], parent, tokens, sequence.salt))

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Pages for the first `num_tokens` tokens; False, and nothing changed, where the pool has too few."""
        missing = self._pages_for(num_tokens) - len(sequence.pages)
        if missing > self.pool.num_available:
            return False
        if missing > 0:
            self._extend(sequence, self.pool.allocate(missing))
        return True

    def _extend(self, sequence: Sequence, pages: list[int]) -> None:
        held = len(sequence.pages)
        sequence.page_table[held : held + len(pages)] = pages
        sequence.pages += pages

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.page_table[: len(sequence.pages)] = 0
        sequence.pages, sequence.digests = [], []
        sequence.num_computed_tokens = 0

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)
