"""The scheduler's stories, and any order of events, in front of a model that notices every mix-up: see hash_engine."""

from __future__ import annotations

import sys

import pytest
from hash_engine import FAR, VOCAB, HashEngine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from jaxpaged.engine.drafts import Drafter
from jaxpaged.engine.scheduler import Chunk, Plan
from jaxpaged.speculative_config import SpeculativeConfig


def lengths(plan: Plan) -> list[int]:
    return [c.length for c in (*plan.decodes, *plan.chunks)]


# Small stories


def test_running_sequences_come_first_then_waiting_ones_under_one_budget() -> None:
    engine = HashEngine(budget=8)
    first, second = engine.add([0] * 6), engine.add([1] * 6)
    assert engine.step().chunks == [Chunk(first, 0, 6, True), Chunk(second, 0, 2, False)]
    third = engine.add([2] * 6)
    assert engine.step() == Plan([Chunk(first, 6, 1, True)], [Chunk(second, 2, 4, True), Chunk(third, 0, 3, False)])


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    engine = HashEngine(budget=7)
    engine.add([0, 1] * 9, max_tokens=2)
    assert [lengths(engine.step()) for _ in range(4)] == [[7], [7], [4], [1]]
    engine.run()


def test_no_step_holds_more_chunks_than_allowed() -> None:
    engine = HashEngine(max_chunks=2)
    for token in (0, 1, 2):
        engine.add([token] * 5)
    assert len(engine.step().chunks) == 2
    assert lengths(engine.step()) == [1, 1, 5]


def test_the_next_step_is_planned_before_tokens_are_read() -> None:
    engine = HashEngine()
    sequence = engine.add([0, 1], max_tokens=3)
    engine.step()
    assert engine.step().decodes == [Chunk(sequence, 2, 1, True)]
    assert sequence.num_output_tokens == 1
    assert sequence.num_pending_tokens == 1


def test_nothing_is_computed_past_the_last_token() -> None:
    engine = HashEngine()
    engine.add([0, 1], max_tokens=3)
    assert [lengths(engine.step()) for _ in range(4)] == [[2], [1], [1], []]
    assert not engine.unfinished


def test_a_stop_is_noticed_a_step_late_and_the_token_after_it_dropped() -> None:
    engine = HashEngine()
    sequence = engine.add([0, 1], max_tokens=30, stop_token_ids=range(VOCAB))
    engine.step()
    engine.step()
    assert sequence.finish_reason == "stop"
    assert sequence.num_pending_tokens == 1
    engine.run()
    assert sequence.num_output_tokens == 1
    assert engine.pool.num_held == 0


def test_penalties_wait_for_the_tokens_they_depend_on() -> None:
    engine = HashEngine()
    slow, fast = engine.add([0, 1], repetition_penalty=1.5), engine.add([0, 2])
    plans = [engine.step() for _ in range(6)]
    assert [any(c.sequence is slow for c in (*p.decodes, *p.chunks)) for p in plans] == [True, False] * 3
    assert fast.finished
    assert not slow.finished


def test_equal_prompts_added_together_share_pages_in_their_first_step() -> None:
    engine = HashEngine(page_size=2)
    first, second = engine.add([0, 1, 2, 0, 1]), engine.add([0, 1, 2, 0, 1])
    assert lengths(engine.step()) == [1, 5]
    assert second.pages[:2] == first.pages[:2]
    assert second.num_cached_tokens == 4
    assert (engine.scheduler.prefix_cache_queries, engine.scheduler.prefix_cache_hits) == (10, 4)
    engine.run()


def test_an_answer_is_found_as_the_beginning_of_the_next_prompt() -> None:
    engine = HashEngine(page_size=2)
    turn = engine.add([0, 1], max_tokens=3)
    engine.run()
    assert engine.add(turn.token_ids).salt == turn.salt
    assert lengths(engine.step()) == [1]


def test_prompt_logprobs_compute_the_whole_prompt_and_leave_it_for_others() -> None:
    engine = HashEngine(page_size=2)
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
    engine = HashEngine(num_pages=5, page_size=2, max_num_seqs=2, caching=False)
    old, young = engine.add([0, 0], max_tokens=6), engine.add([1, 1], max_tokens=4)
    late = engine.add([2, 2], max_tokens=1)
    engine.run(until=lambda: young.num_preemptions > 0)
    assert list(engine.scheduler.waiting) == [young, late]
    assert young.pages == []
    engine.run()
    assert engine.scheduler.num_preemptions == young.num_preemptions > 0
    assert old.num_preemptions == 0


def test_a_preempted_sequence_takes_back_its_pages_where_nobody_took_them() -> None:
    engine = HashEngine(num_pages=8, page_size=2)
    old, young = engine.add([0] * 6, max_tokens=4), engine.add([1, 2] * 3, max_tokens=3)
    engine.run(until=lambda: young.num_preemptions > 0)
    hits = engine.scheduler.prefix_cache_hits
    engine.run()
    assert old.num_preemptions == 0
    assert engine.scheduler.prefix_cache_hits > hits


@pytest.mark.parametrize("steps", range(6))
def test_a_sequence_can_be_aborted_at_any_moment(steps: int) -> None:
    engine = HashEngine(num_pages=4, page_size=2)
    kept, dropped = engine.add([0, 1], max_tokens=4), engine.add([1, 1], max_tokens=4)
    for _ in range(steps):
        engine.step()
    engine.finish(dropped, "abort")
    engine.finish(dropped, "stop")
    assert dropped.finish_reason == "abort"
    engine.run()
    assert kept.num_output_tokens == 4
    assert engine.pool.num_held == 0


def test_a_sequence_as_long_as_the_pool_runs() -> None:
    engine = HashEngine(num_pages=4, page_size=4)
    sequence = engine.add([0, 1, 2] * 3, max_tokens=99)
    engine.add([1], max_tokens=11)
    engine.run()
    assert len(sequence.token_ids) == 12


@pytest.mark.parametrize("others", [0, 3])
def test_a_sequence_that_outgrows_its_ropes_is_computed_anew_and_shares_only_with_its_like(others: int) -> None:
    engine = HashEngine(page_size=2, budget=5, long_after=6)
    for token in range(others):
        engine.add([token] * 4, max_tokens=8)
    grown = engine.add([0, 1, 2, 0], max_tokens=8)
    engine.run()
    engine.add(grown.token_ids[:6], max_tokens=1)
    engine.add(grown.token_ids, max_tokens=1)
    engine.run()
    assert engine.sequences[-2].num_cached_tokens == 4
    assert engine.sequences[-1].num_cached_tokens == 10


def test_sequences_that_outgrow_their_ropes_together_still_share_the_chunks_of_a_step() -> None:
    engine = HashEngine(max_chunks=2, long_after=6)
    for prompt in ([0] * 5, [1] * 5, [2] * 6):  # the third comes a step later and outgrows them in the same one
        engine.add(prompt, max_tokens=3)
    engine.run()  # each plan is checked
    assert [s.num_output_tokens for s in engine.sequences] == [3] * 3


# Forks


def test_a_prompt_is_computed_once_for_all_its_forks_and_the_partial_page_shared() -> None:
    engine = HashEngine(page_size=4)
    parent = engine.add([0, 1, 2, 0, 1, 2], n=3)
    plan = engine.step()
    assert lengths(plan) == [6]
    assert [f.sequence.pages for f in plan.forks] == [parent.pages] * 2
    assert [engine.pool.references(page) for page in parent.pages] == [3, 3]
    assert engine.pool.num_held == 2
    engine.run()
    assert len({tuple(s.token_ids) for s in engine.sequences}) == 3


def test_the_first_writers_copy_a_shared_page_and_the_last_writes_in_place() -> None:
    engine = HashEngine(page_size=4)
    parent = engine.add([0, 1, 2, 0, 1, 2], n=3)
    engine.step()
    shared = parent.pages[1]
    plan = engine.step()
    assert [copy.source for copy in plan.copies] == [shared] * 2
    assert [s.pages[1] == shared for s in engine.sequences] == [False, False, True]
    assert {tuple(s.pages[:1]) for s in engine.sequences} == {tuple(parent.pages[:1])}
    assert engine.step().copies == []


def test_forks_of_a_prompt_that_fills_its_pages_copy_nothing() -> None:
    engine = HashEngine(page_size=2)
    engine.add([0, 1, 2, 0], n=3)
    assert [engine.step().copies for _ in range(3)] == [[]] * 3


def test_what_forks_generate_is_found_as_a_prefix_though_they_began_inside_their_first_page() -> None:
    engine = HashEngine(page_size=4)
    engine.add([0, 1, 2], max_tokens=6, n=3)
    engine.run()
    again = [engine.add(s.token_ids, max_tokens=1) for s in list(engine.sequences)]
    engine.run()
    assert [s.num_cached_tokens for s in again] == [8] * 3


def test_forks_that_find_no_seat_are_computed_by_themselves() -> None:
    engine = HashEngine(max_num_seqs=2)
    engine.add([0, 1, 2, 0, 1], n=5)
    engine.run()
    assert [s.num_output_tokens for s in engine.sequences] == [4] * 5


def test_a_fork_of_a_sequence_that_has_just_outgrown_its_ropes_shares_the_keys_computed_anew() -> None:
    engine = HashEngine(page_size=2, long_after=6)
    parent = engine.add([0, 1, 2, 0, 1], max_tokens=6, repetition_penalty=1.1)
    engine.run(until=lambda: len(parent.token_ids) == 7)
    child = engine.fork(parent)
    engine.step()
    assert child.pages == parent.pages
    assert child.salt == parent.salt != b""
    engine.run()


@pytest.mark.parametrize("steps", range(8))
def test_a_sequence_can_be_forked_at_any_moment(steps: int) -> None:
    engine = HashEngine(page_size=2, budget=3)
    parent = engine.add([0, 1, 2, 0, 1], max_tokens=9)
    for _ in range(steps):
        engine.step()
    child, grandchild = engine.fork(parent), engine.fork(parent)
    engine.run()
    assert len({tuple(s.token_ids) for s in (parent, child, grandchild)}) == 3
    assert engine.pool.num_held == 0


@pytest.mark.parametrize("steps", range(4))
def test_a_fork_that_has_not_begun_can_be_aborted_and_outlives_its_parent(steps: int) -> None:
    engine = HashEngine(budget=3)
    parent = engine.add([0, 1] * 4, n=3)
    first, second = parent.forks
    for _ in range(steps):
        engine.step()
    engine.finish(first, "abort")
    engine.finish(parent, "abort")
    engine.run()
    assert second.num_output_tokens == 4
    assert engine.pool.num_held == 0


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_fork_may_begin_with_another_last_token_inside_a_page_that_its_parent_has_filled(steps: int) -> None:
    engine = HashEngine(page_size=4, budget=3)
    parent = engine.add([0, 1, 2, 0, 1], max_tokens=9)
    for _ in range(steps):
        engine.step()
    child = engine.fork(parent, (parent.token_ids[-1] + 1) % VOCAB)
    engine.finish(parent, "abort")
    engine.run()
    again = engine.add(child.token_ids, max_tokens=1)
    engine.run()
    assert again.num_cached_tokens == (len(child.token_ids) - 1) // 4 * 4


def test_sequences_whose_tokens_the_host_chooses_take_turns_where_there_are_seats_for_fewer() -> None:
    engine = HashEngine(max_num_seqs=2)
    engine.add([0, 1, 2], max_tokens=5, n=4, chosen_on_host=True)
    engine.run()
    assert [s.num_output_tokens for s in engine.sequences] == [5] * 4


# Who comes first


def test_the_lowest_priority_is_admitted_first_then_the_first_to_arrive() -> None:
    engine = HashEngine(max_num_seqs=1)
    late, first, second = (engine.add([token], priority=priority) for token, priority in ((0, 1), (1, 0), (2, 0)))
    done = []
    while engine.unfinished:
        engine.step()
        done += [s for s in engine.sequences if s.finished and s not in done]
    assert done == [first, second, late]


def test_a_more_urgent_sequence_takes_the_pages_of_a_less_urgent_one_but_not_the_reverse() -> None:
    engine = HashEngine(num_pages=6, page_size=2, caching=False)
    patient = engine.add([0] * 4, max_tokens=6, priority=1)
    engine.step()
    urgent = engine.add([1] * 2, max_tokens=8)
    engine.run()
    assert patient.num_preemptions > 0
    assert urgent.num_preemptions == 0


def test_no_sequence_passes_another_that_came_before_it() -> None:
    engine = HashEngine(num_pages=5, page_size=2)
    engine.add([0] * 4, max_tokens=3)
    engine.step()
    large, small = engine.add([1] * 6, max_tokens=1), engine.add([2], max_tokens=1)
    engine.run(until=lambda: large.finished or small.finished)
    assert large.finished


# Limits of chunks


def test_a_long_prompt_leaves_room_for_others_in_each_step() -> None:
    engine = HashEngine(budget=10, long_prefill_token_threshold=4)
    engine.add([0] * 9)
    engine.add([1] * 3)
    assert lengths(engine.step()) == [4, 3]
    assert lengths(engine.step()) == [1, 4]


def test_only_so_many_prompts_are_under_way_at_once() -> None:
    engine = HashEngine(budget=10, long_prefill_token_threshold=4, max_num_partial_prefills=1)
    first, second, third = engine.add([0] * 9), engine.add([1] * 9), engine.add([2] * 2)
    engine.step()
    assert engine.scheduler.running == [first]
    assert engine.scheduler.waiting == [second, third]
    engine.run(until=lambda: second in engine.scheduler.running)
    assert first.num_computed_tokens >= 8


# Windows


def test_pages_that_have_left_the_window_are_given_back() -> None:
    engine = HashEngine(page_size=2, window=4, budget=3)
    sequence = engine.add([0, 1] * 8, max_tokens=20)
    held = set()
    while engine.unfinished:
        engine.step()
        held.add(engine.pool.num_held)
    assert sequence.num_output_tokens == 20
    assert max(held) <= 2 + 2 + 1  # the window, a chunk, and the page that the window begins in


def test_a_prefix_longer_than_the_window_is_found_and_only_its_end_is_held() -> None:
    engine = HashEngine(page_size=2, window=4)
    prompt = [0, 1, 2, 2, 1, 0] * 3
    engine.add(prompt, max_tokens=1)
    engine.run()
    again = engine.add([*prompt, 1], max_tokens=3)
    engine.step()
    assert again.num_cached_tokens == 18
    assert again.pages.count(0) >= 6


def test_a_page_that_leaves_the_window_before_its_token_is_read_can_be_found_all_the_same() -> None:
    engine = HashEngine(page_size=1, window=1)
    sequence = engine.add([0, 1], max_tokens=6)
    engine.run()
    again = engine.add(sequence.token_ids, max_tokens=2)
    engine.run()
    assert again.num_cached_tokens == 7


# Prefixes that are not to be shared


def test_callers_with_other_salts_share_nothing() -> None:
    engine = HashEngine(page_size=2)
    engine.add([0, 1, 2, 0, 1], cache_salt=b"a")
    engine.run()
    others = [engine.add([0, 1, 2, 0, 1], cache_salt=salt) for salt in (b"b", b"", b"a")]
    engine.step()
    assert [s.num_cached_tokens for s in others] == [0, 0, 4]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("steps", range(1, 9))
def test_keys_of_old_weights_are_found_by_nobody(steps: int, recompute: bool) -> None:
    """Not even those of pages that a sequence under way fills after the weights have changed."""
    engine = HashEngine(page_size=4)
    kept = engine.add([0, 1], max_tokens=12)
    for _ in range(steps):
        engine.step()
    engine.update_weights(recompute=recompute)
    engine.run()
    again = engine.add(kept.token_ids, max_tokens=2)
    engine.run()
    assert again.num_cached_tokens == (12 if recompute else 0)


# Drafts


def drafts_of(plan: Plan) -> list[int]:
    return [len(chunk.draft) for chunk in plan.decodes]


def test_a_draft_that_comes_true_saves_its_steps_and_changes_no_token() -> None:
    plain, ahead = HashEngine(num_pages=30), HashEngine(num_pages=30, drafts="oracle")
    want, got = plain.add([0, 1, 2], max_tokens=24), ahead.add([0, 1, 2], max_tokens=24)
    plain.run()
    ahead.run()
    assert got.token_ids == want.token_ids
    drafter = ahead.scheduler.drafter
    assert drafter.num_accepted_tokens > 10
    assert ahead.num_operations == plain.num_operations - drafter.num_accepted_tokens


def test_a_draft_that_does_not_come_true_gives_its_pages_back() -> None:
    engine = HashEngine(page_size=1, drafts="oracle")
    sequence = engine.add([0, 1, 2], max_tokens=12)
    plans = [engine.step() for _ in range(4)]
    assert [drafts_of(plan) for plan in plans] == [[], [2], [4], [2]]  # the third guess of each draft is wrong
    assert len(sequence.pages) == sequence.num_computed_tokens + 2
    assert sequence.num_output_tokens == 1 + 3 + 3


def test_drafts_end_before_the_last_token_and_where_pages_end() -> None:
    engine = HashEngine(num_pages=5, page_size=2, drafts="oracle")
    engine.add([0, 1, 2], max_tokens=3)
    assert [drafts_of(engine.step()) for _ in range(2)] == [[], [1]]
    engine.run()
    engine.add([0, 1], max_tokens=6)
    engine.add([1, 1], max_tokens=2)
    assert [drafts_of(engine.step()) for _ in range(2)] == [[], [1, 0]]
    assert engine.pool.num_available == engine.scheduler.num_preemptions == 0
    engine.run()


def test_nobody_gets_a_draft_beside_a_prompt_or_a_fork_nor_whose_logits_the_host_changes() -> None:
    engine = HashEngine(drafts="oracle")
    engine.add([0, 1])
    engine.step()
    engine.add([1, 1, 2])
    assert drafts_of(engine.step()) == [0]
    assert drafts_of(engine.step()) == [1, 2]
    engine.run()
    engine.add([0, 1], repetition_penalty=1.1)
    engine.add([2, 1], max_tokens=8, min_tokens=3)
    assert [drafts_of(engine.step()) for _ in range(4)] == [[], [0, 0], [0, 0], [0, 2]]


def test_whose_drafts_fail_pauses_for_longer_each_time() -> None:
    engine = HashEngine(num_pages=30, drafts="oracle")
    engine.scheduler.drafter = Drafter(
        SpeculativeConfig(method=lambda tokens, count: [(engine._foretell(tokens, 1)[0] + 1) % VOCAB]), VOCAB, 64
    )
    engine.add([0, 1], max_tokens=20)
    engine.step()
    assert [sum(drafts_of(engine.step())) for _ in range(13)] == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_a_draft_function_that_fails_or_guesses_no_tokens_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for method in (lambda tokens, count: [VOCAB, 0], lambda tokens, count: [-1], lambda tokens, count: 1 / 0):
        engine = HashEngine()
        engine.scheduler.drafter = Drafter(SpeculativeConfig(method=method), VOCAB, 64)
        sequence = engine.add([0, 1])
        engine.run()
        assert sequence.finish_reason == "length"
        assert engine.scheduler.drafter.num_drafts == 0
    assert "the draft function failed for request '0'" in caplog.text


# Any order of events


class EngineMachine(RuleBasedStateMachine):
    """Sequences come, go on, fork, stop and are aborted in pools so small that they fight for pages."""

    num_operations = 0  # of all runs: requests added, steps, forks, ...

    @initialize(
        pool=st.sampled_from([(18, 1), (9, 2), (14, 2), (6, 4), (9, 4)]),
        max_num_seqs=st.sampled_from([1, 2, 3, 6]),
        budget=st.sampled_from([1, 3, 8, 24]),
        max_chunks=st.sampled_from([1, 2, 6]),
        caching=st.sampled_from([True, True, False]),
        long_after=st.sampled_from([FAR, FAR, 6]),
        window=st.sampled_from([None, None, 5, 1]),
        long_prefill_token_threshold=st.sampled_from([None, None, 2]),
        max_num_partial_prefills=st.sampled_from([None, None, 1]),
        host_pages=st.sampled_from([0, 0, 1, 3, 8, 99]),
        min_host_pages=st.sampled_from([1, 1, 3]),
        groups_or_drafts=st.sampled_from([1, 2, 3, "ngram", "oracle"]),
        reads_first=st.sampled_from([True, True, False]),
    )
    def start(
        self, pool: tuple[int, int], max_num_seqs: int, max_chunks: int, groups_or_drafts: int | str, **limits: int
    ) -> None:
        name = "drafts" if isinstance(groups_or_drafts, str) else "groups"
        limits |= {"max_chunks": min(max_chunks, max_num_seqs), name: groups_or_drafts}
        self.engine = HashEngine(*pool, max_num_seqs, **limits)

    @rule(
        data=st.data(),
        tails=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), min_size=1, max_size=4),
        max_tokens=st.sampled_from([1, 5, 12, 20]),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        stop_token_ids=st.sampled_from([(), (), (), (0,)]),
        more=st.sampled_from(
            [
                *[{}] * 4,
                {"repetition_penalty": 1.1},
                {"prompt_logprobs": 1},
                {"cache_salt": b"salt"},
                {"chosen_on_host": True},
            ]
        ),
    )
    def add(
        self, data: st.DataObject, tails: list[list[int]], max_tokens: int, more: dict[str, object], **given: object
    ) -> None:
        """Prompts that begin alike, some of them with what an earlier sequence holds."""
        head = data.draw(st.sampled_from(self.engine.sequences)).token_ids if self.engine.sequences else []
        head = head[: data.draw(st.sampled_from([0, 3, 6, 20]))]
        for tail in tails:
            prompt = (head + tail)[: self.engine.max_model_len - 1]
            self.engine.add(prompt, max_tokens, **given, **more)

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data(), token=st.sampled_from([None, None, 0, 1]))
    def fork(self, data: st.DataObject, token: int | None) -> None:
        """Of sequences in any state but those that are forks to be themselves, and those whose turn is the host's."""
        known = [s for s in (*self.engine.scheduler.running, *self.engine.scheduler.waiting) if not s.chosen_on_host]
        if known:
            parent = data.draw(st.sampled_from(known))
            self.engine.fork(parent, token if parent.num_output_tokens else None)

    @rule(times=st.sampled_from([1, 2, 5, 12]))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: len(self.engine.unfinished) > 3)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "error"]))
    def finish(self, data: st.DataObject, reason: str) -> None:
        self.engine.finish(data.draw(st.sampled_from(self.engine.unfinished)), reason)

    @rule(num_pages=st.sampled_from([1, 3, 99]))
    def evict(self, num_pages: int) -> None:
        """Cached pages give way to something else that needs memory for a moment."""
        pool = self.engine.pool
        pool.release(pool.allocate(min(num_pages, pool.num_available)))

    @rule(what=st.integers(0, 12))
    def seldom(self, what: int) -> None:
        """Reset the prefix cache, change the weights or preempt all: seldom, or there is nothing to reset."""
        if what == 1:
            self.engine.pool.reset_prefix_cache()
        elif what in (2, 3):
            self.engine.update_weights(recompute=what == 2)
        elif what == 4:
            self.engine.scheduler.preempt_all()

    def teardown(self) -> None:
        if not hasattr(self, "engine") or sys.exc_info()[0] is not None:
            return
        engine = self.engine
        engine.run()
        engine.check_pages()
        assert engine.pool.num_held == 0
        assert engine.pool.num_available == engine.pool.num_pages - 1
        assert all(s.num_pending_tokens == 0 for s in engine.sequences)
        assert all(s.num_output_tokens == s.max_tokens for s in engine.sequences if s.finish_reason == "length")
        assert engine.scheduler.running == engine.scheduler.waiting == []
        EngineMachine.num_operations += engine.num_operations


def in_any_order(max_examples: int, steps: int) -> None:
    fixed = settings(max_examples=max_examples, stateful_step_count=steps, deadline=None)
    run_state_machine_as_test(EngineMachine, settings=fixed)


def test_any_order() -> None:
    in_any_order(max_examples=40, steps=40)


@pytest.mark.slow
def test_any_order_for_long() -> None:
    before = EngineMachine.num_operations
    in_any_order(max_examples=250, steps=100)
    assert EngineMachine.num_operations - before >= 100_000
