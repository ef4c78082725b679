"""Scheduler, page pool and packing together, in front of a model simple enough to be right: a hash of what it reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.engine import batch
from jaxpaged.engine.page_pool import PagePool
from jaxpaged.engine.request import Sequence, needs_history
from jaxpaged.engine.scheduler import LONG_ROPE, Chunk, Plan, Scheduler
from jaxpaged.model.step import StepInputs
from jaxpaged.sampling_params import SamplingParams

VOCAB = 3  # few tokens, so that equal pages are common
NEVER = 10**6

# The model: layer 0 keeps tokens, layer 1 keeps hashes of all tokens so far, the next token is a hash of layer 1.


def entry(token: int, position: int, is_long: bool) -> int:
    """A key. All keys of a sequence are others once it is long, as with longrope."""
    return token + VOCAB * (2 * position + is_long)


def hashes(entries: list[int]) -> list[int]:
    found, value = [], 0
    for one in entries:
        value = hash((value, one))
        found.append(value)
    return found


def next_token(values: list[int], index: int) -> int:
    """Forks of the same tokens go on differently: `index` stands for their seeds."""
    return (hash(tuple(values)) + index) % VOCAB


@cache
def answer(
    prompt: tuple[int, ...], index: int, max_tokens: int, stop_token_ids: tuple[int, ...], long_after: int
) -> list[int]:
    """What the model says without pages, steps or batches."""
    token_ids = list(prompt)
    for _ in range(max_tokens):
        is_long = len(token_ids) > long_after
        entries = [entry(t, position, is_long) for position, t in enumerate(token_ids)]
        token_ids.append(next_token(hashes(entries), index))
        if token_ids[-1] in stop_token_ids:
            break
    return token_ids


class Device:
    """Runs the model on packed arrays alone. In a layer all writes come before all reads, as on a real device."""

    def __init__(self, num_pages: int, page_size: int, long_after: int) -> None:
        self.page_size = page_size
        self.long_after = long_after
        self.pools = np.random.default_rng(0).integers(-(2**60), 2**60, (2, num_pages * page_size))

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        pages = self.pools.reshape(2, -1, self.page_size)
        real = targets < pages.shape[1]
        assert np.unique(targets[real]).size == real.sum(), "two copies to one page"
        pages[:, targets[real]] = pages[:, sources[real]]

    def step(self, inputs: StepInputs, sampled: np.ndarray, indices: np.ndarray) -> np.ndarray:
        tokens = np.where(inputs.feedback >= 0, sampled[inputs.feedback], inputs.token_ids)
        written = inputs.slots < self.pools.shape[1]
        assert np.unique(inputs.slots[written]).size == written.sum(), "two tokens in one slot"
        assert (inputs.slots[written] >= self.page_size).all(), "written to the null page"
        is_long = inputs.rope_lens > self.long_after
        for at in np.flatnonzero(written):
            self.pools[0, inputs.slots[at]] = entry(int(tokens[at]), int(inputs.positions[at]), bool(is_long[at]))
        for row, queries in self.queries(inputs):
            values = np.asarray(hashes(self.read(0, inputs, row)))
            self.pools[1, inputs.slots[queries]] = values[inputs.positions[queries]]
        last = {queries.stop - 1: self.read(1, inputs, row) for row, queries in self.queries(inputs)}
        rows = np.zeros(len(inputs.logit_rows), np.int64)
        for row, at in enumerate(inputs.logit_rows):
            if at in last:
                rows[row] = next_token(last[at], int(indices[row]))
        return rows

    def read(self, layer: int, inputs: StepInputs, row: int) -> list[int]:
        slots = inputs.page_table[row][:, None] * self.page_size + np.arange(self.page_size)
        return self.pools[layer, slots.reshape(-1)[: inputs.kv_lens[row]]].tolist()

    def queries(self, inputs: StepInputs) -> list[tuple[int, slice]]:
        """The tokens of each row that is not padding."""
        starts = inputs.cu_q_lens
        decodes = len(inputs.kv_lens) - len(starts) + 1
        spans = [slice(n, n + 1) for n in range(decodes)]
        spans += [slice(decodes + a, decodes + b) for a, b in pairwise(starts)]
        return [(row, span) for row, span in enumerate(spans) if inputs.kv_lens[row] > 0]


# The engine around it, without text


class InFlight(NamedTuple):
    rows: list[tuple[int, Chunk]]
    tokens: np.ndarray


class Engine:
    """What `jaxpaged.engine.engine` does with a scheduler: dispatch a step, then read the one before it."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_chunks: int | None = None,
        caching: bool = True,
        long_after: int = NEVER,
    ) -> None:
        self.max_model_len = (num_pages - 1) * page_size
        self.pool = PagePool(num_pages, page_size, enable_caching=caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_num_chunks=max_chunks or batch.max_chunks(max_num_seqs),
            max_pages=num_pages - 1,
        )
        self.buckets = batch.make_buckets(max_num_seqs, budget)
        self.device = Device(num_pages, page_size, long_after)
        self.sequences: list[Sequence] = []
        self.forked_at: dict[Sequence, int] = {}  # how many tokens were another's
        self.in_flight: InFlight | None = None

    def add(self, prompt: list[int], max_tokens: int = 4, n: int = 1, priority: int = 0, **params: object) -> Sequence:
        is_long = len(prompt) > self.device.long_after
        sequence = Sequence(
            request_id=str(len(self.sequences)),
            index=0,
            params=SamplingParams(**params),
            prompt_len=len(prompt),
            token_ids=list(prompt),
            max_tokens=min(max_tokens, self.max_model_len - len(prompt)),
            seed=(0, 0),
            salt=LONG_ROPE if is_long else b"",
            long_after=None if is_long else self.device.long_after,
            priority=priority,
        )
        sequence.forks = [sequence.fork(index, (0, index)) for index in range(1, n)]
        self.sequences += [sequence, *sequence.forks]
        self.scheduler.add(sequence)
        return sequence

    def fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(1 + max(s.index for s in self.sequences if s.request_id == parent.request_id), (0, 0))
        self.sequences.append(child)
        self.forked_at[child] = len(child.token_ids)
        self.scheduler.fork(parent, child)
        return child

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for s in self.sequences if not s.finished]

    def step(self) -> Plan:
        held_before = {s: set(s.pages) for s in self.scheduler.running}
        plan = self.scheduler.schedule()
        self.check(plan, held_before)
        before = self.in_flight
        assert before or not plan.is_empty or not self.unfinished, "nothing to do, nothing to wait for, not finished"
        self.in_flight = None if plan.is_empty else self.dispatch(plan, before)
        if before is not None:
            self.read(before)
        return plan

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Step until then, or until all have finished. The oldest moves on in one step of two: there is a bound."""
        done = until or (lambda: not self.unfinished and self.in_flight is None)
        most = 2 + sum(2 * (s.prompt_len + s.max_tokens) + 4 for s in self.unfinished)
        for _ in range(most):
            if done():
                return
            self.step()
        assert done(), f"not there after {most} steps"

    def dispatch(self, plan: Plan, before: InFlight | None) -> InFlight:
        bucket = batch.choose(plan, self.buckets)
        feedback = {chunk.sequence: row for row, chunk in before.rows if chunk.samples} if before else {}
        size, pages = self.pool.page_size, self.pool.num_pages
        inputs = batch.pack(plan, bucket, feedback, max_pages=pages - 1, page_size=size, num_pages=pages)
        rows = list(batch.rows_of(plan, bucket))
        indices = np.zeros(bucket.num_rows, np.int64)
        for row, chunk in rows:
            indices[row] = chunk.sequence.index
        self.device.copy(*batch.pack_copies(plan, bucket.num_rows, pages))
        return InFlight(rows, self.device.step(inputs, before.tokens if before else np.zeros(1, np.int64), indices))

    def read(self, step: InFlight) -> None:
        for row, (sequence, _, _, samples) in step.rows:
            sequence.num_pending_tokens -= samples
            if not samples or sequence.finished:
                continue
            sequence.token_ids.append(int(step.tokens[row]))
            if sequence.token_ids[-1] in sequence.params.stop_token_ids:
                self.scheduler.finish(sequence, "stop", sequence.token_ids[-1])
            elif sequence.num_output_tokens == sequence.max_tokens:
                self.scheduler.finish(sequence, "length")

    def expected(self, sequence: Sequence) -> list[int]:
        """What it must hold in the end: the prompt and the answer to it."""
        begin = self.forked_at.get(sequence, sequence.prompt_len)
        given, left = tuple(sequence.token_ids[:begin]), sequence.max_tokens - (begin - sequence.prompt_len)
        return answer(given, sequence.index, left, tuple(sequence.params.stop_token_ids), self.device.long_after)

    def check(self, plan: Plan, held_before: dict[Sequence, set[int]]) -> None:
        """What holds of every plan and of everybody's pages right after it was made."""
        scheduler = self.scheduler
        planned = [*plan.decodes, *plan.chunks]
        assert sum(c.length for c in planned) <= scheduler.max_num_batched_tokens
        assert len(plan.chunks) <= scheduler.max_num_chunks
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert {c.length for c in plan.decodes} <= {1}
        assert all(c.length > 1 for c in plan.chunks)
        assert len({c.sequence for c in planned}) == len(planned)
        assert not {c.sequence for c in planned} & {f.sequence for f in plan.forks}
        for sequence, start, length, _ in planned:
            written = set(sequence.pages[start // self.pool.page_size : -(-(start + length) // self.pool.page_size)])
            for other in set(scheduler.running) - {sequence}:
                assert not written & held_before.get(other, set()) & set(other.pages), "written, and held by another"
        for sequence, start, length, samples in planned:
            assert sequence in scheduler.running
            assert start + length == sequence.num_computed_tokens
            assert samples == (sequence.num_computed_tokens == sequence.num_tokens - samples)
            assert sequence.num_tokens - sequence.prompt_len <= sequence.max_tokens
            if needs_history(sequence.params):
                assert sequence.num_pending_tokens == samples
        self.check_pages()

    def check_pages(self) -> None:
        size = self.pool.page_size
        held = Counter(page for s in self.scheduler.running for page in s.pages)
        assert [self.pool.references(p) for p in range(self.pool.num_pages)] == [
            held[p] for p in range(self.pool.num_pages)
        ]
        assert self.pool.num_held == len(held)
        for sequence in self.scheduler.running:
            pages = sequence.pages
            assert len(set(pages)) == len(pages) == -(-sequence.num_computed_tokens // size)
            np.testing.assert_array_equal(sequence.page_table, pages + [0] * (self.pool.num_pages - 1 - len(pages)))
        for sequence in (*self.scheduler.waiting, *(s for s in self.sequences if s.finished)):
            assert sequence.pages == []
            assert sequence.num_computed_tokens == 0


def lengths(plan: Plan) -> list[int]:
    return [c.length for c in (*plan.decodes, *plan.chunks)]


# Small stories


def test_running_sequences_come_first_then_waiting_ones_under_one_budget() -> None:
    engine = Engine(budget=8)
    first, second = engine.add([0] * 6), engine.add([1] * 6)
    assert engine.step().chunks == [Chunk(first, 0, 6, True), Chunk(second, 0, 2, False)]
    third = engine.add([2] * 6)
    assert engine.step() == Plan([Chunk(first, 6, 1, True)], [Chunk(second, 2, 4, True), Chunk(third, 0, 3, False)])


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    engine = Engine(budget=7)
    sequence = engine.add([0, 1] * 9, max_tokens=2)
    assert [lengths(engine.step()) for _ in range(4)] == [[7], [7], [4], [1]]
    engine.run()
    assert sequence.token_ids == engine.expected(sequence)


def test_no_step_holds_more_chunks_than_allowed() -> None:
    engine = Engine(max_chunks=2)
    for token in (0, 1, 2):
        engine.add([token] * 5)
    assert len(engine.step().chunks) == 2
    assert lengths(engine.step()) == [1, 1, 5]


def test_the_next_step_is_planned_before_tokens_are_read() -> None:
    engine = Engine()
    sequence = engine.add([0, 1], max_tokens=3)
    engine.step()
    assert engine.step().decodes == [Chunk(sequence, 2, 1, True)]
    assert sequence.num_output_tokens == 1
    assert sequence.num_pending_tokens == 1


def test_nothing_is_computed_past_the_last_token() -> None:
    engine = Engine()
    engine.add([0, 1], max_tokens=3)
    assert [lengths(engine.step()) for _ in range(4)] == [[2], [1], [1], []]
    assert not engine.unfinished


def test_a_stop_is_noticed_a_step_late_and_the_token_after_it_dropped() -> None:
    engine = Engine()
    sequence = engine.add([0, 1], max_tokens=30, stop_token_ids=range(VOCAB))
    engine.step()
    engine.step()
    assert sequence.finish_reason == "stop"
    assert sequence.num_pending_tokens == 1
    engine.run()
    assert sequence.token_ids == engine.expected(sequence)
    assert sequence.num_output_tokens == 1
    assert engine.pool.num_held == 0


def test_penalties_wait_for_the_tokens_they_depend_on() -> None:
    engine = Engine()
    slow, fast = engine.add([0, 1], repetition_penalty=1.5), engine.add([0, 2])
    plans = [engine.step() for _ in range(6)]
    assert [any(c.sequence is slow for c in (*p.decodes, *p.chunks)) for p in plans] == [True, False] * 3
    assert fast.finished
    assert not slow.finished


def test_equal_prompts_added_together_share_pages_in_their_first_step() -> None:
    engine = Engine(page_size=2)
    first, second = engine.add([0, 1, 2, 0, 1]), engine.add([0, 1, 2, 0, 1])
    assert lengths(engine.step()) == [1, 5]
    assert second.pages[:2] == first.pages[:2]
    assert second.num_cached_tokens == 4
    assert (engine.scheduler.prefix_cache_queries, engine.scheduler.prefix_cache_hits) == (10, 4)
    engine.run()
    assert first.token_ids == second.token_ids == engine.expected(first)


def test_an_answer_is_found_as_the_beginning_of_the_next_prompt() -> None:
    engine = Engine(page_size=2)
    turn = engine.add([0, 1], max_tokens=3)
    engine.run()
    assert engine.add(turn.token_ids).salt == turn.salt
    assert lengths(engine.step()) == [1]


def test_prompt_logprobs_compute_the_whole_prompt_and_leave_it_for_others() -> None:
    engine = Engine(page_size=2)
    engine.add([0, 1, 2, 0, 1])
    engine.run()
    whole = engine.add([0, 1, 2, 0, 1], prompt_logprobs=0)
    assert lengths(engine.step()) == [5]
    assert whole.num_cached_tokens == 0
    engine.run()
    assert engine.scheduler.prefix_cache_queries == 5
    engine.add([0, 1, 2, 0, 1])
    assert lengths(engine.step()) == [1]


def test_when_pages_run_out_the_youngest_gives_its_own_back_and_waits_at_the_head() -> None:
    engine = Engine(num_pages=5, page_size=2, caching=False)
    old, young = engine.add([0, 0], max_tokens=6), engine.add([1, 1], max_tokens=4)
    late = engine.add([2, 2], max_tokens=1)
    engine.run(until=lambda: young.num_preemptions > 0)
    assert list(engine.scheduler.waiting) == [young, late]
    assert young.pages == []
    engine.run()
    assert engine.scheduler.num_preemptions == young.num_preemptions > 0
    assert old.num_preemptions == 0
    for sequence in (old, young, late):
        assert sequence.token_ids == engine.expected(sequence)


def test_a_preempted_sequence_takes_back_its_pages_where_nobody_took_them() -> None:
    engine = Engine(num_pages=8, page_size=2)
    old, young = engine.add([0] * 6, max_tokens=4), engine.add([1, 2] * 3, max_tokens=3)
    engine.run(until=lambda: young.num_preemptions > 0)
    hits = engine.scheduler.prefix_cache_hits
    engine.run()
    assert old.num_preemptions == 0
    assert engine.scheduler.prefix_cache_hits > hits


@pytest.mark.parametrize("steps", range(6))
def test_a_sequence_can_be_aborted_at_any_moment(steps: int) -> None:
    engine = Engine(num_pages=4, page_size=2)
    kept, dropped = engine.add([0, 1], max_tokens=4), engine.add([1, 1], max_tokens=4)
    for _ in range(steps):
        engine.step()
    engine.scheduler.finish(dropped, "abort")
    engine.scheduler.finish(dropped, "stop")
    assert dropped.finish_reason == "abort"
    engine.run()
    assert kept.token_ids == engine.expected(kept)
    assert engine.pool.num_held == 0


def test_a_sequence_as_long_as_the_pool_runs() -> None:
    engine = Engine(num_pages=4, page_size=4)
    sequence = engine.add([0, 1, 2] * 3, max_tokens=99)
    engine.add([1], max_tokens=11)
    engine.run()
    assert len(sequence.token_ids) == 12
    assert sequence.token_ids == engine.expected(sequence)


@pytest.mark.parametrize("others", [0, 3])
def test_a_sequence_that_outgrows_its_ropes_is_computed_anew_and_shares_only_with_its_like(others: int) -> None:
    engine = Engine(page_size=2, budget=5, long_after=6)
    for token in range(others):
        engine.add([token] * 4, max_tokens=8)
    grown = engine.add([0, 1, 2, 0], max_tokens=8)
    engine.run()
    assert grown.token_ids == engine.expected(grown)
    engine.add(grown.token_ids[:6], max_tokens=1)
    engine.add(grown.token_ids, max_tokens=1)
    engine.run()
    assert engine.sequences[-2].num_cached_tokens == 4
    assert engine.sequences[-1].num_cached_tokens == 10
    assert all(s.token_ids == engine.expected(s) for s in engine.sequences)


def test_sequences_that_outgrow_their_ropes_together_still_share_the_chunks_of_a_step() -> None:
    engine = Engine(max_chunks=2, long_after=6)
    for prompt in ([0] * 5, [1] * 5, [2] * 6):  # the third comes a step later and outgrows them in the same one
        engine.add(prompt, max_tokens=3)
    engine.run()
    assert all(s.token_ids == engine.expected(s) for s in engine.sequences)


# Forks


def test_a_prompt_is_computed_once_for_all_its_forks_and_the_partial_page_shared() -> None:
    engine = Engine(page_size=4)
    parent = engine.add([0, 1, 2, 0, 1, 2], n=3)
    plan = engine.step()
    assert lengths(plan) == [6]
    assert [f.sequence.pages for f in plan.forks] == [parent.pages] * 2
    assert [engine.pool.references(page) for page in parent.pages] == [3, 3]
    assert engine.pool.num_held == 2
    engine.run()
    assert [s.token_ids for s in engine.sequences] == [engine.expected(s) for s in engine.sequences]
    assert len({tuple(s.token_ids) for s in engine.sequences}) == 3


def test_the_first_writers_copy_a_shared_page_and_the_last_writes_in_place() -> None:
    engine = Engine(page_size=4)
    parent = engine.add([0, 1, 2, 0, 1, 2], n=3)
    engine.step()
    shared = parent.pages[1]
    plan = engine.step()
    assert [copy.source for copy in plan.copies] == [shared] * 2
    assert [s.pages[1] == shared for s in engine.sequences] == [False, False, True]
    assert {tuple(s.pages[:1]) for s in engine.sequences} == {tuple(parent.pages[:1])}
    assert engine.step().copies == []


def test_forks_of_a_prompt_that_fills_its_pages_copy_nothing() -> None:
    engine = Engine(page_size=2)
    engine.add([0, 1, 2, 0], n=3)
    assert [engine.step().copies for _ in range(3)] == [[]] * 3


def test_forks_that_find_no_seat_are_computed_by_themselves() -> None:
    engine = Engine(max_num_seqs=2)
    engine.add([0, 1, 2, 0, 1], n=5)
    engine.run()
    assert [s.token_ids for s in engine.sequences] == [engine.expected(s) for s in engine.sequences]


@pytest.mark.parametrize("steps", range(8))
def test_a_sequence_can_be_forked_at_any_moment(steps: int) -> None:
    engine = Engine(page_size=2, budget=3)
    parent = engine.add([0, 1, 2, 0, 1], max_tokens=9)
    for _ in range(steps):
        engine.step()
    child, grandchild = engine.fork(parent), engine.fork(parent)
    engine.run()
    for sequence in (parent, child, grandchild):
        assert sequence.token_ids == engine.expected(sequence)
    assert engine.pool.num_held == 0


@pytest.mark.parametrize("steps", range(4))
def test_a_fork_that_has_not_begun_can_be_aborted_and_outlives_its_parent(steps: int) -> None:
    engine = Engine(budget=3)
    parent = engine.add([0, 1] * 4, n=3)
    first, second = parent.forks
    for _ in range(steps):
        engine.step()
    engine.scheduler.finish(first, "abort")
    engine.scheduler.finish(parent, "abort")
    engine.run()
    assert second.token_ids == engine.expected(second)
    assert engine.pool.num_held == 0


# Any order of events


class EngineMachine(RuleBasedStateMachine):
    """Sequences come, go on, stop and are aborted in pools so small that they fight for pages."""

    @initialize(
        pool=st.sampled_from([(18, 1), (9, 2), (14, 2), (6, 4), (9, 4)]),
        max_num_seqs=st.sampled_from([1, 2, 3, 6]),
        budget=st.sampled_from([1, 3, 8, 24]),
        max_chunks=st.sampled_from([1, 2, 6]),
        caching=st.sampled_from([True, True, False]),
        long_after=st.sampled_from([NEVER, 6]),
    )
    def start(self, pool: tuple[int, int], max_num_seqs: int, max_chunks: int, **limits: int) -> None:
        self.engine = Engine(*pool, max_num_seqs, max_chunks=min(max_chunks, max_num_seqs), **limits)

    @rule(
        data=st.data(),
        tails=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), min_size=1, max_size=4),
        max_tokens=st.sampled_from([1, 5, 12, 20]),
        stop=st.sampled_from([(), (), (), (0,)]),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        params=st.sampled_from([{}, {}, {}, {"repetition_penalty": 1.1}, {"prompt_logprobs": 1}]),
    )
    def add(
        self,
        data: st.DataObject,
        tails: list[list[int]],
        max_tokens: int,
        stop: tuple[int, ...],
        n: int,
        priority: int,
        params: dict[str, float],
    ) -> None:
        """Prompts that begin alike, some of them with what an earlier sequence holds."""
        head = data.draw(st.sampled_from(self.engine.sequences)).token_ids if self.engine.sequences else []
        head = head[: data.draw(st.sampled_from([0, 3, 6, 20]))]
        for tail in tails:
            prompt = (head + tail)[: self.engine.max_model_len - 1]
            self.engine.add(prompt, max_tokens, n, priority, stop_token_ids=stop, **params)

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Of sequences in any state but those that are forks to be themselves."""
        known = [*self.engine.scheduler.running, *self.engine.scheduler.waiting]
        self.engine.fork(data.draw(st.sampled_from(known)))

    @rule(times=st.sampled_from([1, 2, 5, 12]))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: len(self.engine.unfinished) > 3)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.scheduler.finish(data.draw(st.sampled_from(self.engine.unfinished)), "abort")

    @rule(times=st.integers(0, 4))
    def reset_prefix_cache(self, times: int) -> None:
        """Seldom, or there is nothing to reset."""
        if times == 1:
            self.engine.pool.reset_prefix_cache()

    @invariant()
    def pages_are_in_order_and_tokens_are_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_pages()
        for sequence in self.engine.sequences:
            expected = self.engine.expected(sequence)
            if sequence.finish_reason in ("stop", "length"):
                assert sequence.token_ids == expected
            else:
                assert sequence.token_ids == expected[: len(sequence.token_ids)]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        self.pages_are_in_order_and_tokens_are_right()
        assert self.engine.pool.num_held == 0
        assert self.engine.pool.num_available == self.engine.pool.num_pages - 1
        assert all(s.num_pending_tokens == 0 for s in self.engine.sequences)
        assert not self.engine.scheduler.running
        assert not self.engine.scheduler.waiting


def in_any_order(max_examples: int, steps: int) -> type:
    case = type("TestAnyOrder", (EngineMachine,), {}).TestCase
    case.settings = settings(max_examples=max_examples, stateful_step_count=steps, deadline=None)
    return case


TestAnyOrder = in_any_order(60, 40)
TestAnyOrderForLong = pytest.mark.slow(in_any_order(1000, 100))
