"""Which sequences compute how many tokens this step. Owns waiting and running; pages belong to PagePool.

One rule: every running sequence, first come first, catches up with its tokens under one budget; what is left admits
waiting ones. A sequence one token behind is a decode, one further behind computes a chunk of its prompt. When pages run
out the last running sequence is preempted: its pages go back, and it waits to be computed again.

Who is first is told by priority, then by arrival, and it is told strictly: no sequence is admitted before another that
comes first, and none is preempted for one that comes later. So under equal priorities a request waits for earlier ones
only. The first is never preempted for another, and each sequence fits the pool alone, so every step makes progress.

Forks share the pages of the sequence that they come from, the last and partial one too. Reference counts tell: who
writes to a page that others hold takes a copy first, and the last holder writes in place.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from jaxpaged.engine.adapters import Adapter, Adapters
from jaxpaged.engine.drafts import Drafter
from jaxpaged.engine.host_tier import Move
from jaxpaged.engine.page_pool import NULL_PAGE, ON_HOST, PagePool
from jaxpaged.engine.request import Sequence
from jaxpaged.outputs import FinishReason

LONG_ROPE = b"long"
"""The salt of sequences whose keys are rotated with the long factors of a `LongRopeScaling`."""

_order = attrgetter("order")


class Chunk(NamedTuple):
    """`length` tokens of a sequence from position `start`; `samples` where the last of them asks for the next token.
    Behind a decode there may be a draft, each of whose tokens asks for the one after it.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    draft: tuple[int, ...] = ()


class Fork(NamedTuple):
    """A sequence that samples its next token from the logits of another one's chunk or decode in the same step."""

    sequence: Sequence
    of: Chunk


class Copy(NamedTuple):
    """A page to be copied, after those before it in the plan."""

    source: int
    target: int


class Plan(NamedTuple):
    """One step's decision: sequences with one token each, chunks of more, forks of both, and what is to be done before
    anything is computed: pages moved out to the host, then pages moved in from there, then pages copied.
    """

    decodes: list[Chunk]
    chunks: list[Chunk]
    forks: list[Fork] = []  # noqa: RUF012  # nobody changes the defaults: `schedule` gives lists of its own
    copies: list[Copy] = []  # noqa: RUF012
    moves_out: list[Move] = []  # noqa: RUF012
    moves_in: list[Move] = []  # noqa: RUF012

    @property
    def is_empty(self) -> bool:
        """True where nothing can be computed now."""
        return not self.decodes and not self.chunks

    @property
    def num_chunk_tokens(self) -> int:
        """Tokens of the chunks together."""
        return sum(c.length for c in self.chunks)

    @property
    def num_drafted(self) -> int:
        """Tokens of the drafts together."""
        return sum(len(c.draft) for c in self.decodes)


class Scheduler:
    """Continuous batching: who comes first is served first."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_chunks: int,
        max_pages: int,
        long_prefill_token_threshold: int | None = None,
        max_num_partial_prefills: int | None = None,
        window: int | None = None,
        drafter: Drafter | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """Limits of one step: sequences, tokens, chunks. `max_pages` is the width of a page table.

        A chunk has at most `long_prefill_token_threshold` tokens, and at most `max_num_partial_prefills` sequences are
        under way whose prompts need another step. `window` is the most keys that any layer's query sees, None where
        a layer sees all: pages that have fallen out of it are given back. The `drafter` guesses ahead, and a sequence
        with one of the `adapters` runs while that has a slot.
        """
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_chunks = max_num_chunks
        self.max_pages = max_pages
        self.max_chunk_len = long_prefill_token_threshold or max_num_batched_tokens
        self.max_num_partial_prefills = max_num_partial_prefills
        self.window = window
        self.drafter = drafter
        self.adapters = adapters
        self.waiting: list[Sequence] = []  # the next to be admitted first
        self.running: list[Sequence] = []  # the first to be served first, the last to be preempted last
        if adapters is not None:
            adapters.watch(self.running)
        self.num_arrivals = 0
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # tokens looked up
        self.prefix_cache_hits = 0  # tokens found
        self.host_cache_hits = 0  # those of them that were on the host

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, its forks with it. That it can fit the pool is the caller's check."""
        for one in (sequence, *sequence.forks):
            one.arrival = self.num_arrivals
        self.num_arrivals += 1
        insort(self.waiting, sequence, key=_order)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start `child`, whose tokens begin with those computed of `parent`, from there: the pages are shared.

        Where the parent is still to compute what the child needs, the child waits for the same logits; where there is
        no room for it now, it waits to be computed by itself.
        """
        child.arrival = parent.arrival
        if parent.num_pending_tokens == 0 and parent.token_ids == child.token_ids:
            (self._parent_of(parent) or parent).forks.append(child)
        elif parent in self.running and len(self.running) < self.max_num_seqs:
            self._share(parent, child, min(parent.num_computed_tokens, len(child.token_ids) - 1))
        else:
            insort(self.waiting, child, key=_order)

    def schedule(self) -> Plan:
        """Decide the next step and take the pages it needs; counts its tokens as computed."""
        plan = Plan([], [], [], [], [], [])
        budget = self.max_num_batched_tokens
        preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.long_after is not None:
                self._lengthen(sequence)
            length = self._length(sequence, budget)
            crowded = length > 1 and len(plan.chunks) == self.max_num_chunks
            forked = plan.forks and _is_forked(plan, sequence)
            if length == 0 or sequence.awaits_tokens or crowded or forked:
                index += 1
                continue
            while not self._grow(sequence, length, plan):
                preempted = True
                last = self.running[-1]
                self._preempt(last)
                if last is sequence:
                    break
            else:
                budget -= length
                self._put(plan, sequence, length)
                index += 1
        if not preempted:
            self._admit(plan, budget)
        while plan.is_empty and self._is_stalled():
            self._preempt(self.running[-1])
            self._admit(plan, budget)
        if self.drafter is not None and not plan.chunks and not plan.forks:
            self._draft(plan, self.drafter)
        if (
            self.pool.host is not None and not plan.is_empty
        ):  # who takes pages computes something: an empty one has none
            for moves, planned in zip((plan.moves_out, plan.moves_in), self.pool.host.take_moves(), strict=True):
                moves += planned
        return plan

    @property
    def awaits_tokens(self) -> bool:
        """True where a running sequence could be given a draft once the tokens of dispatched steps are known."""
        if self.drafter is None or len(self.running) >= self.drafter.max_tokens:
            return False
        behind = (s for s in self.running if s.num_tokens - s.num_computed_tokens <= 1)
        return any(self.drafter.is_ready(s) for s in behind)

    def confirm(self, chunk: Chunk, tokens: Seq[int]) -> int:
        """How many of a draft's tokens are the ones sampled before them: those were computed. `tokens` are what was
        sampled after the chunk and after each of them; the pages of the others go back.
        """
        sequence = chunk.sequence
        pairs = enumerate(zip(chunk.draft, tokens, strict=False))
        count = next((index for index, (guess, token) in pairs if guess != token), len(chunk.draft))
        sequence.num_drafted = 0
        if sequence.num_computed_tokens == chunk.start + 1:  # else its pages were taken back
            sequence.num_computed_tokens += count
            held = self._pages_for(sequence.num_computed_tokens)
            self.pool.release(sequence.pages[held:])
            sequence.page_table[held : len(sequence.pages)] = 0
            del sequence.pages[held:]
        if self.drafter is not None:
            self.drafter.learn(sequence, len(chunk.draft), count)
        return count

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """The one way out, for any reason, from any state: gives the pages back, after an error as if never filled."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if self.adapters is not None and sequence.adapter is not None:
            self.adapters.touch(sequence.adapter)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            parent = self._parent_of(sequence)
            if parent is not None:
                parent.forks.remove(sequence)
        for fork in sequence.forks:
            insort(self.waiting, fork, key=_order)
        sequence.forks = []
        if reason == "error":
            self.pool.unpublish(_real(sequence.pages))
        else:
            self._publish(sequence)
        self._release(sequence)

    def preempt_all(self, adapter: Adapter | None = None) -> None:
        """Take all pages back: every running sequence, or every one with this adapter, is computed anew, in its old
        turn.
        """
        for sequence in reversed(list(self.running)):
            if adapter is None or sequence.adapter is adapter:
                self._preempt(sequence)

    def withdraw(self, plan: Plan) -> None:
        """Take back a plan that could not be run: nothing of it was computed or sampled, so all is computed anew."""
        for chunk in (*plan.decodes, *plan.chunks):
            chunk.sequence.num_pending_tokens -= chunk.samples
            chunk.sequence.num_drafted = 0
        for fork in plan.forks:
            fork.sequence.num_pending_tokens -= 1
        self.preempt_all()
        self.pool.reset_prefix_cache()

    def _parent_of(self, sequence: Sequence) -> Sequence | None:
        """Whose logits a fork waits for that is yet to begin."""
        return next((s for s in (*self.running, *self.waiting) if sequence in s.forks), None)

    def _admit(self, plan: Plan, budget: int) -> None:
        while budget > 0 and len(self.running) < self.max_num_seqs and (sequence := self._next()):
            if sequence.num_pending_tokens > 0:  # preempted a moment ago; its last token is still to be read
                return
            if not self._has_adapter(sequence):
                return
            self._lengthen(sequence)
            self._start(sequence)
            length = self._length(sequence, budget)
            if not self._may_start(plan, sequence, length):
                self._release(sequence)
                return
            self._bring(sequence)
            if not self._grow(sequence, length, plan):
                self._release(sequence)
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=_order)
            if not sequence.is_computed_whole:
                self.prefix_cache_queries += sequence.num_tokens
                self.prefix_cache_hits += sequence.num_computed_tokens
            if sequence.num_preemptions == 0:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            budget -= length
            self._put(plan, sequence, length)

    def _has_adapter(self, sequence: Sequence) -> bool:
        """Whether the adapter that a waiting sequence wants has a slot, or could be given one."""
        if self.adapters is None or sequence.adapter is None:
            return True
        return self.adapters.seat(sequence.adapter)

    def _next(self) -> Sequence | None:
        """The first of the waiting sequences that have something to compute."""
        return next((s for s in self.waiting if not s.awaits_choice), None)

    def _is_stalled(self) -> bool:
        """True where all that run await the host's choice, which awaits one that could be computed in their place."""
        following = self._next()
        is_possible = following is not None and following.num_pending_tokens == 0
        return is_possible and bool(self.running) and all(s.awaits_choice for s in self.running)

    def _may_start(self, plan: Plan, sequence: Sequence, length: int) -> bool:
        """Whether a waiting sequence may compute its first chunk now."""
        if length > 1 and len(plan.chunks) == self.max_num_chunks:
            return False
        behind = sequence.num_tokens - sequence.num_computed_tokens
        if length < behind and self.max_num_partial_prefills is not None:
            partial = sum(s.num_tokens - s.num_computed_tokens > 1 for s in self.running)
            if partial >= self.max_num_partial_prefills:
                return False
        if not self.running:
            return True
        # All its pages must be there, and some for all to grow: to be preempted at once would help nobody.
        missing = self._pages_for(sequence.num_tokens) - len(sequence.pages) + sequence.pages.count(ON_HOST)
        return missing + self._headroom(sequence) <= self.pool.num_available

    def _headroom(self, sequence: Sequence) -> int:
        """Pages to leave when a sequence is admitted: half as many as run, since others end before each needs one, and
        from its second preemption on twice as many each time, up to all that they can ever need. So it cannot be
        preempted for ever.
        """
        forks = len(sequence.forks)
        halves = 1 << max(0, sequence.num_preemptions - 1)  # of a page, for each
        if halves == 1:
            return -(-len(self.running) // 2) + forks
        growing = (self._pages_for(s.prompt_len + s.max_tokens) - len(s.pages) + 1 for s in (*self.running, sequence))
        return -(-sum(min(halves, 2 * pages) for pages in growing) // 2) + forks

    def _length(self, sequence: Sequence, budget: int) -> int:
        return min(sequence.num_tokens - sequence.num_computed_tokens, budget, self.max_chunk_len)

    def _lengthen(self, sequence: Sequence) -> None:
        """Where a sequence outgrows what its keys were rotated for, begin again with the long rotation."""
        if sequence.outgrows_ropes and sequence.num_pending_tokens == 0:
            self._release(sequence)
            sequence.rope_len, sequence.salt, sequence.long_after = sequence.num_tokens, LONG_ROPE, None
            sequence.root = self.pool.root(sequence.prefix_salt)

    def _start(self, sequence: Sequence) -> None:
        """Give a waiting sequence the cached pages of its prefix, if any, unless it is computed whole."""
        sequence.page_table = np.zeros(self.max_pages, np.int32)
        sequence.root = self.pool.root(sequence.prefix_salt)
        if sequence.is_computed_whole:
            return
        pages, sequence.digests = self.pool.match(sequence.token_ids, sequence.prefix_salt)
        self._extend(sequence, pages)
        sequence.num_computed_tokens = len(pages) * self.pool.page_size

    def _bring(self, sequence: Sequence) -> None:
        """Pages for what was found on the host, as far as any window reaches."""
        if ON_HOST not in sequence.pages:
            return
        if self.window is not None:
            self._slide(sequence, self.window)
        where = [index for index, page in enumerate(sequence.pages) if page == ON_HOST]
        pages = self.pool.bring([sequence.digests[index] for index in where])
        for index, page in zip(where, pages, strict=True):
            sequence.pages[index] = sequence.page_table[index] = page
        self.host_cache_hits += len(pages) * self.pool.page_size

    def _put(self, plan: Plan, sequence: Sequence, length: int) -> None:
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = end = start + length
        samples = end == sequence.num_tokens
        chunk = Chunk(sequence, start, length, samples)
        (plan.chunks if length > 1 else plan.decodes).append(chunk)
        sequence.num_pending_tokens += samples
        if end >= (len(sequence.digests) + 1) * self.pool.page_size:
            self._publish(sequence)
        if samples and sequence.forks:
            self._start_forks(plan, chunk)

    def _draft(self, plan: Plan, drafter: Drafter) -> None:
        """Guess ahead for those that decode and whose tokens are all known, as far as pages and rows are left."""
        room = min(drafter.max_tokens, self.max_num_batched_tokens) - len(plan.decodes)
        for index, chunk in enumerate(plan.decodes):
            sequence = chunk.sequence
            is_known = chunk.samples and sequence.num_pending_tokens == 1  # the one that is sampled now
            is_known = is_known and sequence.num_output_tokens >= sequence.params.min_tokens
            if not is_known or room <= 0 or not drafter.is_ready(sequence):
                continue
            limit = min(room, sequence.max_tokens - sequence.num_output_tokens - 1)
            if sequence.long_after is not None:
                limit = min(limit, sequence.long_after - len(sequence.token_ids))
            pages = len(sequence.pages) + self.pool.num_available
            limit = min(limit, pages * self.pool.page_size - sequence.num_computed_tokens)
            draft = drafter.draft(sequence, limit)
            if not draft:
                continue
            missing = self._pages_for(sequence.num_computed_tokens + len(draft)) - len(sequence.pages)
            self._extend(sequence, self.pool.allocate(missing))
            sequence.num_drafted = len(draft)
            plan.decodes[index] = chunk._replace(draft=draft)
            room -= len(draft)

    def _start_forks(self, plan: Plan, chunk: Chunk) -> None:
        """Forks sample from the same logits and go on by themselves, as many as may run; the others wait for a seat."""
        parent = chunk.sequence
        for fork in parent.forks:
            if len(self.running) < self.max_num_seqs:
                self._share(parent, fork, parent.num_computed_tokens)
                fork.num_pending_tokens += 1
                plan.forks.append(Fork(fork, chunk))
            else:
                insort(self.waiting, fork, key=_order)
        parent.forks = []

    def _share(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Let `child` run with the parent's first `num_tokens` tokens as its own, computed already."""
        pages = parent.pages[: self._pages_for(num_tokens)]
        self.pool.retain(_real(pages))
        child.page_table = np.zeros(self.max_pages, np.int32)
        self._extend(child, pages)
        child.root = parent.root
        child.digests = parent.digests[: num_tokens // self.pool.page_size]
        child.num_computed_tokens = num_tokens
        child.rope_len, child.salt, child.long_after = parent.rope_len, parent.salt, parent.long_after
        insort(self.running, child, key=_order)

    def _publish(self, sequence: Sequence) -> None:
        """Make known every page full of known tokens. Steps run in order, so a later one may read it already."""
        size = self.pool.page_size
        full = min(sequence.num_computed_tokens, len(sequence.token_ids)) // size
        for index in range(len(sequence.digests), full):
            parent = sequence.digests[-1] if sequence.digests else sequence.root
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            sequence.digests.append(self.pool.publish(sequence.pages[index], parent, tokens))

    def _grow(self, sequence: Sequence, length: int, plan: Plan) -> bool:
        """Pages to write the next `length` tokens to, held by nobody else; False where the pool has too few of them."""
        if self.window is not None:
            self._slide(sequence, self.window)
        start = sequence.num_computed_tokens
        index, offset = divmod(start, self.pool.page_size)
        if length == 1 and offset > 0 and self.pool.is_writable(sequence.pages[index]):
            return True  # most steps of most sequences
        is_shared = offset > 0 and self.pool.references(sequence.pages[index]) > 1
        missing = self._pages_for(start + length) - len(sequence.pages)
        if (missing or is_shared) and missing + is_shared > self.pool.num_available:
            return False
        if is_shared:
            source, (target,) = sequence.pages[index], self.pool.allocate(1)
            self.pool.release([source])
            sequence.pages[index] = sequence.page_table[index] = target
            plan.copies.append(Copy(source, target))
        elif offset > 0 and self.pool.is_findable(sequence.pages[index]):
            self.pool.unpublish([sequence.pages[index]])  # a fork may begin inside a page that its parent has filled
        if missing > 0:
            self._extend(sequence, self.pool.allocate(missing))
        return True

    def _slide(self, sequence: Sequence, window: int) -> None:
        """Give back the pages that neither the next token nor any after it will see."""
        unseen = max(0, sequence.num_computed_tokens - window + 1) // self.pool.page_size
        for index in range(min(unseen, len(sequence.digests)) - 1, -1, -1):
            page = sequence.pages[index]
            if page == NULL_PAGE:
                return
            self.pool.release(_real([page]))
            sequence.pages[index] = sequence.page_table[index] = NULL_PAGE

    def _extend(self, sequence: Sequence, pages: list[int]) -> None:
        held = len(sequence.pages)
        sequence.page_table[held : held + len(pages)] = pages
        sequence.pages += pages

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_order)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(_real(sequence.pages))
        sequence.page_table[: len(sequence.pages)] = 0
        sequence.pages, sequence.digests = [], []
        sequence.num_computed_tokens = 0

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.page_size)


def _is_forked(plan: Plan, sequence: Sequence) -> bool:
    """True where it samples in this step already."""
    return any(fork.sequence is sequence for fork in plan.forks)


def _real(pages: list[int]) -> list[int]:
    """Without those given back already and those yet to come from the host."""
    return [page for page in pages if page not in (NULL_PAGE, ON_HOST)]
